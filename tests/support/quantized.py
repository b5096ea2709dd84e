"""Tiny bases in the quantized formats that people serve, each with the same weights written out in float32.

Written by hand, bit by bit, so that what reads them is held against the formats and not against itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from tests.support.trainer import SIZES, Base, build

GROUP = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FP8 = torch.float8_e4m3fn

Tensors = dict[str, torch.Tensor]
# A weight in float32 -> (what the checkpoint has of it, by suffix; the weight that this means)
Rounding = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]


def _grouped(weight: torch.Tensor, size: int) -> torch.Tensor:
    return weight.view(len(weight), -1, size)


def _packed(values: torch.Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Numbers of 0 to 15, eight in an int32 along ``dim``."""
    values = values.to(torch.int64).movedim(dim, -1)
    eights = values.reshape(*values.shape[:-1], -1, 8)
    words = sum(eights[..., of] << (4 * bit) for bit, of in enumerate(order))
    assert isinstance(words, torch.Tensor)
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return signed.to(torch.int32).movedim(-1, dim).contiguous()


def _symmetric(weight: torch.Tensor, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(numbers of -8 to 7, a scale for each group, the weight that this means)."""
    groups = _grouped(weight, size)
    scale = (groups.abs().amax(2) / 7).to(dtype)
    values = (groups / scale.float()[..., None]).round().clamp(-8, 7)
    meant = (values * scale.float()[..., None]).view_as(weight)
    return values.view_as(weight), scale, meant


def _asymmetric(weight: torch.Tensor, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(numbers of 0 to 15, a scale and a zero of 0 to 15 for each group, the weight that this means)."""
    groups = _grouped(weight, size)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scale = ((high - low) / 15).to(dtype)
    zero = (-low / scale.float()).round().clamp(0, 15)
    values = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15)
    meant = ((values - zero[..., None]) * scale.float()[..., None]).view_as(weight)
    return values.view_as(weight), scale, zero, meant


def _w4a16(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    values, scale, meant = _symmetric(weight, GROUP, torch.bfloat16)
    return {
        "weight_packed": _packed(values + 8, 1),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }, meant


def _w4a16_asymmetric(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    values, scale, zero, meant = _asymmetric(weight, GROUP, torch.bfloat16)
    return {
        "weight_packed": _packed(values, 1),
        "weight_scale": scale,
        "weight_zero_point": _packed(zero, 0),
        "weight_shape": torch.tensor(weight.shape),
    }, meant


def _w8a8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
    values = (weight / scale.float()).round().clamp(-127, 127)
    return {"weight": values.to(torch.int8), "weight_scale": scale}, values * scale.float()


def _fp8_channels(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    values = (weight / scale.float()).to(_FP8)
    return {"weight": values, "weight_scale": scale}, values.float() * scale.float()


def _fp8_whole(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().max() / 448  # of no dimension
    values = (weight / scale).to(_FP8)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def _fp8_static(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    tensors, meant = _fp8_whole(weight)
    return {**tensors, "input_scale": torch.tensor(0.02)}, meant


def _fp8_blocks(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    rows, columns = weight.shape
    tall, wide = -(-rows // 128), -(-columns // 128)
    padded = torch.zeros(tall * 128, wide * 128)
    padded[:rows, :columns] = weight
    blocks = padded.view(tall, 128, wide, 128)
    scale = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scale[:, None, :, None]).to(_FP8)
    meant = (values.float() * scale[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    stored = values.reshape(padded.shape)[:rows, :columns].contiguous()
    return {"weight": stored, "weight_scale_inv": scale}, meant.contiguous()


def _gptq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    values, scale, meant = _symmetric(weight, GROUP, torch.float16)
    return {
        "qweight": _packed((values + 8).T.contiguous(), 0),
        # What is stored is one less.
        "qzeros": _packed(torch.full((scale.shape[1], len(weight)), 7), 1),
        "scales": scale.T.contiguous(),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).to(torch.int32),
    }, meant


def _gptq_by_activation(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """With ``desc_act`` a group's columns lie anywhere."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(weight.shape[1]))
    tensors, meant = _gptq(weight[:, order])
    back = order.argsort()
    values, _, _ = _symmetric(weight[:, order], GROUP, torch.float16)
    tensors["qweight"] = _packed((values[:, back] + 8).T.contiguous(), 0)
    tensors["g_idx"] = (torch.arange(weight.shape[1]) // GROUP)[back].to(torch.int32)
    return tensors, meant[:, back]


def _awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    values, scale, zero, meant = _asymmetric(weight, GROUP, torch.float16)
    return {
        "qweight": _packed(values.T.contiguous(), 1, _AWQ_ORDER),
        "qzeros": _packed(zero.T.contiguous(), 1, _AWQ_ORDER),
        "scales": scale.T.contiguous(),
    }, meant


def _compressed(form: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    plain = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {
        "targets": ["Linear"],
        "weights": plain | dict(weights),
        "input_activations": None if inputs is None else plain | dict(inputs),
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


_FOUR = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
_TOKENS = {"strategy": "token", "dynamic": True}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}

# Kind -> (its quantization_config, how a weight is rounded)
KINDS: dict[str, tuple[dict[str, Any], Rounding]] = {
    "w4a16": (_compressed("pack-quantized", _FOUR, None), _w4a16),
    "w4a16, asymmetric": (
        _compressed("pack-quantized", {**_FOUR, "symmetric": False}, None),
        _w4a16_asymmetric,
    ),
    "w8a8": (_compressed("int-quantized", {}, _TOKENS), _w8a8),
    "GPTQ": ({**_GPTQ, "lm_head": False}, _gptq),
    "GPTQ, desc_act": ({**_GPTQ, "desc_act": True, "lm_head": False}, _gptq_by_activation),
    "AWQ": (
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
        _awq,
    ),
    "FP8 by channel": (
        _compressed("float-quantized", {"type": "float"}, {"type": "float", **_TOKENS}),
        _fp8_channels,
    ),
    "FP8 by tensor": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, _fp8_whole),
    "FP8 by tensor, static": ({"quant_method": "fp8", "activation_scheme": "static"}, _fp8_static),
    "FP8 by block": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        _fp8_blocks,
    ),
}

# Blocks of 128 fit.
_SIZES = {**SIZES, "intermediate_size": 256, "num_key_value_heads": 4}


def make_plain(folder: Path) -> Base:
    """A Llama in float32 whose sizes every kind can hold."""
    return build(LlamaConfig(**_SIZES, tie_word_embeddings=False), folder)


def quantize(plain: Path, kind: str, folder: Path) -> Base:
    """Writes ``plain`` as ``kind`` to ``folder``; returns what that means, in float32, beside it."""
    config, rounding = KINDS[kind]
    stored: Tensors = {}
    meant: Tensors = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = tensor.to(torch.bfloat16)
            meant[name] = stored[name].float()
            continue
        stem = name.removesuffix("weight")
        made, meant[name] = rounding(tensor.float())
        stored |= {f"{stem}{suffix}": one for suffix, one in made.items()}
    reference = folder.with_name(f"{folder.name}-meant")
    described = json.loads((plain / "config.json").read_text())
    _write(folder, stored, {**described, "dtype": "bfloat16", "quantization_config": config}, plain)
    _write(reference, meant, described, plain)
    return Base(reference)


def _write(folder: Path, tensors: Tensors, config: Mapping[str, Any], plain: Path) -> None:
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copytree(plain / "tokenizer", folder / "tokenizer")
