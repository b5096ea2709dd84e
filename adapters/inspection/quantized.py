"""Quantized checkpoints: which layers of a base are in few bits, and what they mean in float32.

    compressed-tensors  ``weight_packed`` of 4 or 8 bits in int32, or ``weight`` in int8 or FP8, and
                        ``weight_scale``, for the whole, each row, groups of columns or blocks
    fp8, fbgemm, modelopt   ``weight`` in FP8, ``weight_scale`` or ``weight_scale_inv`` (for blocks)
    gptq, awq           ``qweight``, ``qzeros`` and ``scales``, transposed
    bitsandbytes        ``weight`` of 4 bits as places in a table (nf4, fp4), ``absmax`` for blocks of it

Which of them a layer is in is told from the tensors that it has. A layer is read at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from adapters.inspection.base_config import quantization_in, read_base_config

# A tensor by the name within its layer; None where the layer has none of that name.
Read = Callable[[str], torch.Tensor | None]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FEW_BITS = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
# What marks a layer as quantized, and what it has besides its weight, by the end of the name.
_MARKS = ("weight_packed", "qweight", "weight_scale", "weight_scale_inv", "weight.absmax", "SCB")
_BESIDE = (
    *_MARKS,
    "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale", "weight_scale_2",
    "qzeros", "scales", "g_idx", "weight_format", "weight.quant_map", "weight.nested_absmax",
    "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4",
    "input_scale", "input_zero_point", "input_global_scale", "output_scale", "k_scale", "v_scale",
)  # fmt: skip


class UnknownQuantization(ValueError):
    """The message says which format, and what to do instead."""


def quantization_of(model_dir: Path) -> Mapping[str, Any] | None:
    """``quantization_config`` of the model in ``model_dir``; None where its weights are as they were trained.

    Raises OSError where there is no config.json, ValueError where it is no JSON object.
    """
    if (config := read_base_config(model_dir)) is None:
        raise FileNotFoundError(f"{model_dir} holds no config.json of a base model")
    return quantization_in(config)


def method_of(quantization: Mapping[str, Any]) -> str:
    """``gptq``, ``awq``, ``fp8``, ``compressed-tensors``, ``bitsandbytes`` …, in small letters."""
    return str(quantization.get("quant_method") or "unknown").casefold()


def layer_of_tensor(name: str) -> tuple[str, str]:
    """``a.b.qweight`` -> ``a.b``, ``qweight``; what has more than one part within its layer, too."""
    for end in _BESIDE:
        if name.endswith(f".{end}"):
            return name.removesuffix(f".{end}"), end
    stem, _, last = name.rpartition(".")
    return stem, last


def quantized_layers(names: Iterable[str]) -> frozenset[str]:
    """The layers among the tensors ``names`` of a checkpoint that are in few bits."""
    found = (layer_of_tensor(name) for name in names)
    return frozenset(layer for layer, end in found if end in _MARKS)


def belongs_to_quantization(name: str, layers: frozenset[str]) -> bool:
    """Whether the tensor has no place in a checkpoint of ordinary weights."""
    layer, end = layer_of_tensor(name)
    return end in ("k_scale", "v_scale") or (layer in layers and end in _BESIDE)


def shape_of(
    read_shape: Callable[[str], tuple[int, ...] | None], read: Read, quantization: Mapping[str, Any]
) -> tuple[int, int]:
    """(outputs, inputs) of a layer, whose weight is not read. Raises UnknownQuantization."""
    noted = read("weight_shape")
    states = noted if noted is not None else _states(read)
    if states is not None:
        outputs, inputs = noted.tolist() if noted is not None else _state(states)["shape"]
        return int(outputs), int(inputs)
    packed, scales = read_shape("qweight"), read_shape("scales")
    if packed is not None and scales is not None:
        # GPTQ packs along the inputs, AWQ along the outputs.
        along_inputs = packed[1] == scales[1]
        return scales[1], packed[0] * (32 // _bits(quantization) if along_inputs else 1)
    weight = read_shape("weight")
    if weight is None or len(weight) != 2:
        raise UnknownQuantization(_unknown("a layer without a matrix"))
    return weight[0], weight[1]


def weight_of(read: Read, quantization: Mapping[str, Any]) -> torch.Tensor:
    """(outputs, inputs) of a layer in float32. Raises UnknownQuantization."""
    if (qweight := read("qweight")) is not None:
        return _of_qweight(qweight, read, quantization)
    if (packed := read("weight_packed")) is not None:
        return _of_packed(packed, read)
    weight = read("weight")
    if weight is not None and (absmax := read("weight.absmax")) is not None:
        return _of_table(weight, absmax, read)
    if weight is not None and weight.dtype in _FEW_BITS:
        return _of_scaled(weight, read, quantization)
    dtype = "no weight" if weight is None else str(weight.dtype).removeprefix("torch.")
    raise UnknownQuantization(_unknown(f"{method_of(quantization)} with {dtype}"))


def _unknown(what: str) -> str:
    return f"{what} cannot be written out here; use the checkpoint that was quantized"


def _of_packed(packed: torch.Tensor, read: Read) -> torch.Tensor:
    shape, scale = read("weight_shape"), read("weight_scale")
    if packed.dtype != torch.int32 or shape is None or scale is None:
        raise UnknownQuantization(_unknown("four bits of floating point"))
    outputs, inputs = (int(size) for size in shape)
    bits = 4 if -(-inputs // 8) == packed.shape[1] else 8
    values = _unpacked(packed, 1, bits)[:, :inputs].float()
    zero = read("weight_zero_point")
    if zero is None:
        values -= 1 << (bits - 1)
        return values * _by_column(scale, inputs, read("weight_g_idx"))
    zeros = _unpacked(zero, 0, bits)[:outputs].float()
    index = read("weight_g_idx")
    return (values - _by_column(zeros, inputs, index)) * _by_column(scale, inputs, index)


def _of_qweight(qweight: torch.Tensor, read: Read, quantization: Mapping[str, Any]) -> torch.Tensor:
    """Transposed at last: (inputs, outputs) until then."""
    scales, qzeros = read("scales"), read("qzeros")
    bits = _bits(quantization)
    if scales is None or qzeros is None or bits not in (4, 8):
        raise UnknownQuantization(_unknown(f"{method_of(quantization)} of {bits} bits"))
    if qweight.shape[1] != scales.shape[1]:  # AWQ
        if bits != 4:
            raise UnknownQuantization(_unknown(f"AWQ of {bits} bits"))
        values, zeros = (_unpacked(one, 1, 4, _AWQ_ORDER).float() for one in (qweight, qzeros))
        index = None
    else:
        values, zeros = _unpacked(qweight, 0, bits).float(), _unpacked(qzeros, 1, bits).float()
        # The first form stores one less than what is subtracted.
        if quantization.get("checkpoint_format") != "gptq_v2":
            zeros += 1
        index = read("g_idx")
    inputs = len(values)
    difference = values.T - _by_column(zeros.T, inputs, index)
    return (difference * _by_column(scales.T, inputs, index)).contiguous()


def _of_scaled(weight: torch.Tensor, read: Read, quantization: Mapping[str, Any]) -> torch.Tensor:
    scale, inverse = read("weight_scale"), read("weight_scale_inv")
    found = scale if scale is not None else inverse
    if found is None:
        raise UnknownQuantization(_unknown(f"{method_of(quantization)} without a scale"))
    values, outputs, inputs = weight.float(), *weight.shape
    if (zero := read("weight_zero_point")) is not None:
        values = values - _spread(zero.float(), outputs, inputs, quantization)
    return values * _spread(found.float(), outputs, inputs, quantization)


def _spread(scale: torch.Tensor, outputs: int, inputs: int, quantization: Mapping[str, Any]) -> torch.Tensor:
    """A scale of the whole, of each row, of groups of columns or of blocks, for each number."""
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.ndim == 1:
        scale = scale.unsqueeze(1)
    tall, wide = quantization.get("weight_block_size") or (
        -(-outputs // scale.shape[0]),
        -(-inputs // scale.shape[1]),
    )
    if scale.shape[0] != outputs:
        scale = scale.repeat_interleave(int(tall), 0)[:outputs]
    if scale.shape[1] not in (1, inputs):
        scale = scale.repeat_interleave(int(wide), 1)[:, :inputs]
    return scale


def _of_table(weight: torch.Tensor, absmax: torch.Tensor, read: Read) -> torch.Tensor:
    states = _states(read)
    table = read("weight.quant_map")
    if states is None or table is None:
        raise UnknownQuantization(_unknown("bitsandbytes of 8 bits"))
    state = _state(states)
    outputs, inputs = state["shape"]
    if (nested := read("weight.nested_absmax")) is not None:
        codes = read("weight.nested_quant_map")
        assert codes is not None
        scales = codes.float()[absmax.long()]
        absmax = scales * _by_block(nested, state["nested_blocksize"], len(scales)) + state["nested_offset"]
    both = weight.flatten()
    places = torch.stack((both >> 4, both & 15), 1).flatten()[: outputs * inputs]
    values = table.float()[places.long()]
    return (values * _by_block(absmax, state["blocksize"], len(values))).view(outputs, inputs)


def _by_block(of_blocks: torch.Tensor, size: int, count: int) -> torch.Tensor:
    """One number for each of ``count``, of which ``size`` after each other share one."""
    return of_blocks.float().repeat_interleave(int(size))[:count]


def _bits(quantization: Mapping[str, Any]) -> int:
    return int(quantization.get("bits") or quantization.get("w_bit") or 4)


def _states(read: Read) -> torch.Tensor | None:
    found = read("weight.quant_state.bitsandbytes__nf4")
    return found if found is not None else read("weight.quant_state.bitsandbytes__fp4")


def _state(states: torch.Tensor) -> dict[str, Any]:
    """What bitsandbytes notes of a layer: JSON in bytes."""
    return dict(json.loads(bytes(states.tolist())))


def _by_column(of_groups: torch.Tensor, inputs: int, index: torch.Tensor | None) -> torch.Tensor:
    """(rows, groups) -> (rows, inputs); ``index`` names each column's group."""
    of_groups = of_groups.float()
    if index is not None:
        return of_groups[:, index.long()]
    return of_groups.repeat_interleave(-(-inputs // of_groups.shape[1]), 1)[:, :inputs]


def _unpacked(packed: torch.Tensor, dim: int, bits: int, order: Iterable[int] | None = None) -> torch.Tensor:
    """The numbers in the int32 of ``packed``, one after the other along ``dim``."""
    words = packed.movedim(dim, -1)
    count, mask = 32 // bits, (1 << bits) - 1
    places = list(order or range(count))
    shifts = torch.tensor([bits * places.index(at) for at in range(count)], dtype=torch.int32)
    values = (words.unsqueeze(-1) >> shifts) & mask
    return values.flatten(-2).movedim(-1, dim)
