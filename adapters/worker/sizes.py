"""What slots and adapters take, in bytes, by what vLLM has really allocated."""

from __future__ import annotations

from typing import Any

from adapters.worker.dora_gpu import tables_bytes
from adapters.worker.heads import heads_bytes, slots_bytes


def allocated(model: Any) -> int:
    """Bytes of all slots of ``model``, of layers that Loraplex serves no adapters on too."""
    from vllm.lora.layers import BaseLayerWithLoRA

    total = 0
    for layer in model.modules():
        if isinstance(layer, BaseLayerWithLoRA):
            total += slots_bytes(layer)
            total += len(layer.lora_b_stacked[0]) * tables_bytes(layer)
            for side in (layer.lora_a_stacked, layer.lora_b_stacked):
                total += sum(t.nbytes for t in (side if isinstance(side, tuple | list) else [side]))
    return total


def size_of(lora: Any) -> int:
    """Bytes of host memory that the adapter's tensors take."""
    total = 0
    for layer in lora.loras.values():
        for side in (layer.lora_a, layer.lora_b):
            tensors = side if isinstance(side, list) else [side]
            total += sum(t.numel() * t.element_size() for t in tensors if t is not None)
    return total + heads_bytes(lora)
