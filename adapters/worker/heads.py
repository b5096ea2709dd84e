"""A classifier's head in vLLM's tables: the base's own, and room for one of each adapter's in its slot."""

from __future__ import annotations

from typing import Any

# (name, inputs, labels of the base, the most labels of an adapter's own)
Described = tuple[str, int, int, int]


def head_of(tables: Any, *, alone: bool) -> Described | None:
    """Of vLLM's ``LRUCacheLoRAModelManager``; None where the model has none that adapters can replace.

    Without ``alone``, where several workers share the model or adapters a slot, an adapter has none.
    """
    found = getattr(tables, "_classification_head", None)
    if found is None:
        return None
    name, layer = found
    most = int(layer.max_lora_cls_labels) if alone else 0
    return name, int(layer.input_size), int(layer.output_size), most


def slots_bytes(layer: Any) -> int:
    """What the heads of all slots take in ``layer``, beside its pairs; 0 for another layer than a head."""
    stacked = [getattr(layer, name, None) for name in ("full_weight_stacked", "full_bias_stacked")]
    return sum(tensor.nbytes for tensor in stacked if tensor is not None)


def heads_bytes(lora: Any) -> int:
    """Host memory of the heads of ``lora``, vLLM's ``LoRAModel``."""
    heads = getattr(lora, "modules_to_save", None) or {}
    tensors = [tensor for head in heads.values() for tensor in (head.weight, head.bias) if tensor is not None]
    return sum(tensor.nbytes for tensor in tensors)
