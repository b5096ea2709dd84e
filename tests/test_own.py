"""What a load copies out of an adapter's mapped file, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from adapters.model import WEIGHTS_FILE
from adapters.worker import _mapped, _own

A, B = torch.arange(8.0).view(2, 4), torch.arange(6.0).view(3, 2)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({"a": A, "b": B}, tmp_path / WEIGHTS_FILE)
    return tmp_path / WEIGHTS_FILE


def read(file: Path, dtype: torch.dtype = torch.float32, scaling: float = 2.0) -> Any:
    with safe_open(file, framework="pt") as content:
        a, b = (content.get_tensor(name).to(dtype) for name in "ab")
    layer = SimpleNamespace(lora_a=a, lora_b=b, scaling=scaling)
    return SimpleNamespace(loras={"layer": layer})


def is_mapped(tensor: torch.Tensor, file: Path) -> bool:
    return any(tensor.data_ptr() in addresses for addresses in _mapped(str(file)))


def test_a_mapped_tensor_is_seen_by_every_name_of_its_file(file: Path, tmp_path: Path) -> None:
    lora = read(file)
    (tmp_path / "link").symlink_to(tmp_path)
    assert is_mapped(lora.loras["layer"].lora_a, file)
    assert is_mapped(lora.loras["layer"].lora_b, tmp_path / "link" / WEIGHTS_FILE)
    assert not is_mapped(A, file)


@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_what_is_mapped_is_copied_and_scaled(file: Path, scaling: float) -> None:
    lora = read(file, scaling=scaling)
    layer = lora.loras["layer"]
    _own(lora, str(file))
    assert torch.equal(layer.lora_a, A)
    assert torch.equal(layer.lora_b, B * scaling)
    assert layer.scaling == 1
    assert not is_mapped(layer.lora_a, file)
    assert not is_mapped(layer.lora_b, file)
    assert torch.equal(read(file).loras["layer"].lora_b, B)


def test_a_file_that_is_deleted_meanwhile_is_copied_all_the_same(file: Path) -> None:
    lora = read(file)
    file.unlink()
    before = lora.loras["layer"].lora_a.data_ptr()
    _own(lora, str(file))
    assert lora.loras["layer"].lora_a.data_ptr() != before


@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_what_another_dtype_has_copied_already_is_not_copied_again(file: Path, scaling: float) -> None:
    lora = read(file, torch.bfloat16, scaling)
    layer = lora.loras["layer"]
    before = layer.lora_a.data_ptr(), layer.lora_b.data_ptr()
    _own(lora, str(file))
    assert (layer.lora_a.data_ptr(), layer.lora_b.data_ptr()) == before
    assert torch.equal(layer.lora_b, (B * scaling).to(torch.bfloat16))
    assert layer.scaling == 1


def test_a_layer_with_one_side_only_is_left_for_others_to_refuse(file: Path) -> None:
    lora = read(file)
    lora.loras["layer"].lora_b = None
    _own(lora, str(file))
    assert lora.loras["layer"].lora_b is None
