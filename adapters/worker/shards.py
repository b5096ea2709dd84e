"""Of an adapter in host memory, each worker keeps the part that it multiplies.

With tensor parallelism vLLM cuts an adapter when it fills a slot, so that each of four workers would hold
all of it in host memory. Here it is cut when it is read, by the same methods of each layer (``slice_lora_a``
and ``slice_lora_b``), into memory of its own; what was read is free again. With pipeline stages a worker also
leaves out the layers of the others. So one host holds, of an adapter, over all its workers

    fully_sharded_loras     one copy
    otherwise               one copy, and one more for each further worker of A where a layer is split by
                            column and of B where it is split by row, which vLLM wants whole on each

Of a mixture one worker keeps the whole in the same way: vLLM puts a layer's experts together in new tensors,
beside which what was read would stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

# Memory for so many elements of the adapters' dtype, as a flat tensor.
Room = Callable[[int], torch.Tensor]
Side = torch.Tensor | list[torch.Tensor | None]

_MARK = "_loraplex_part"  # on tensors that are a worker's part already


def is_divided(tables: Any) -> bool:
    """Whether other workers have a part of the model that ``tables`` (LoRAModelManager) adapt."""
    from vllm.model_executor.models.utils import PPMissingLayer

    return any(_is_shared(layer) for layer in tables.modules.values()) or any(
        isinstance(module, PPMissingLayer) for module in tables.model.modules()
    )


def is_merged(tables: Any) -> bool:
    """Whether one worker has all of a model whose experts vLLM puts together in new tensors."""
    return bool(getattr(tables, "_is_moe", False)) and not is_divided(tables)


def pin_nothing() -> None:
    """From now on vLLM pins no tensor of an adapter, in this process: each is copied into a room.

    One by one that is 288 calls of the driver for the experts of 48 layers, and a question for each of the
    36,864 tensors that 128 experts were read as.
    """
    from vllm.lora import lora_model, model_manager

    lora_model.PIN_MEMORY = model_manager.PIN_MEMORY = False


def cut_when_read(tables: Any, room: Room) -> None:
    """From now on ``tables`` (LoRAModelManager) keep of each adapter what this worker needs, in a ``room``.

    Uses of them ``_create_merged_loras_inplace``, which every load goes through, ``modules`` and
    ``_get_lora_layer_weights``; and ``slice_lora_a`` and ``slice_lora_b`` of the linear layers.
    """
    merge = tables._create_merged_loras_inplace

    def merge_and_cut(lora: Any) -> None:
        merge(lora)
        _cut(tables, lora, room)

    for layer in tables.modules.values():
        if _is_shared(layer):
            layer.slice_lora_a = _unless_cut(layer.slice_lora_a)
            layer.slice_lora_b = _unless_cut(layer.slice_lora_b)
    tables._create_merged_loras_inplace = merge_and_cut


def _is_shared(layer: Any) -> bool:
    """Whether workers share ``layer`` in the way of vLLM's linear layers; experts have one of their own."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    return bool(isinstance(layer, BaseLinearLayerWithLoRA) and layer.tp_size > 1)


def _cut(tables: Any, lora: Any, room: Room) -> None:
    """Leaves in ``lora`` (LoRAModel) what this worker's layers use, in memory that holds nothing else."""
    kept = set()
    parts: list[tuple[Any, str, Side, bool]] = []
    for name, layer in tables.modules.items():
        weights = tables._get_lora_layer_weights(lora, name)
        if not weights:
            continue
        kept.add(id(weights))
        shared = _is_shared(layer) and _is_whole(layer, weights)
        for side in ("lora_a", "lora_b"):
            part = getattr(weights, side)
            parts.append((weights, side, getattr(layer, f"slice_{side}")(part) if shared else part, shared))
    lora.loras = {name: weights for name, weights in lora.loras.items() if id(weights) in kept}
    _copy(parts, room)


def _is_whole(layer: Any, weights: Any) -> bool:
    """Whether vLLM hands the layer's slicing just this; other forms it rearranges first."""
    if isinstance(weights.lora_a, list):
        return bool(len(weights.lora_a) == len(weights.lora_b) == layer.n_slices)
    return bool(layer.n_slices == 1)


def _copy(parts: list[tuple[Any, str, Side, bool]], room: Room) -> None:
    """Puts a copy of each part where it belongs: (weights, name of the side, part, whether it was cut)."""
    # A tensor may be there twice, as the A that two halves of an expert have in common.
    tensors = {id(tensor): tensor for _, _, side, _ in parts for tensor in _tensors(side)}
    flat = room(sum(tensor.numel() for tensor in tensors.values()))
    copies, at = {}, 0
    for key, tensor in tensors.items():
        copies[key] = flat[at : at + tensor.numel()].view(tensor.shape).copy_(tensor)
        at += tensor.numel()
    for weights, name, side, cut in parts:
        for tensor in _tensors(side):
            setattr(copies[id(tensor)], _MARK, cut)
        if isinstance(side, list):
            setattr(weights, name, [None if t is None else copies[id(t)] for t in side])
        else:
            setattr(weights, name, copies[id(side)])


def _tensors(side: Side) -> Iterator[torch.Tensor]:
    yield from (t for t in (side if isinstance(side, list) else [side]) if t is not None)


def _unless_cut(slicing: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def slice_unless_cut(side: Any) -> Any:
        return side if any(getattr(t, _MARK, False) for t in _tensors(side)) else slicing(side)

    return slice_unless_cut
