"""What is read from torch about the processor."""

from __future__ import annotations

import pytest
import torch

from adapters.worker.cpu.features import multiplies_bfloat16


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({}, False),
    ],
)
def test_bfloat16(monkeypatch: pytest.MonkeyPatch, found: dict[str, bool], expected: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "any"} | found)
    assert multiplies_bfloat16() is expected


def test_torch_says_what_is_asked_for() -> None:
    """A name that torch no longer uses would read as a processor without it."""
    assert {"avx512_bf16", "amx_bf16"} <= torch.cpu.get_capabilities().keys()
