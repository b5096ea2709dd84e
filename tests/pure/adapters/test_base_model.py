"""Fingerprints of checkpoints as quantizers write them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapters.inspection.base_model import fingerprint

WEIGHTS = {"b.weight": torch.ones(4, 8), "d.weight": torch.ones(4, 8), "f.weight": torch.ones(4, 8)}
SCALAR = torch.tensor(0.5)


def made(folder: Path, tensors: dict[str, torch.Tensor]) -> str | None:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return fingerprint(folder)


@pytest.mark.parametrize("name", ["a.scale", "c.scale", "d.scale", "z.scale"])
def test_a_scalar_among_the_weights_is_sampled_as_it_is(name: str, tmp_path: Path) -> None:
    """First, in the middle, and last: those are sampled."""
    found = made(tmp_path / "one", WEIGHTS | {name: SCALAR})
    assert found is not None
    assert found == made(tmp_path / "same", WEIGHTS | {name: SCALAR})
    assert found != made(tmp_path / "none", WEIGHTS)


def test_a_sampled_scalar_counts(tmp_path: Path) -> None:
    assert made(tmp_path / "a", {"s": SCALAR}) != made(tmp_path / "b", {"s": SCALAR * 2})


def test_fp8_weights_with_scalar_scales_have_a_fingerprint(tmp_path: Path) -> None:
    fp8 = {f"{n}.weight": torch.ones(4, 8).to(torch.float8_e4m3fn) for n in "abc"}
    scales = {f"{n}.weight_scale": SCALAR.clone() for n in "abc"}
    assert made(tmp_path / "fp8", fp8 | scales) is not None
