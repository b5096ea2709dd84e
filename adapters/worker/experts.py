"""The experts of a mixture in vLLM's tables: which pairs of an adapter go where.

The engine is started with vLLM's ``enable_mixed_moe_lora_format``: one layer then takes experts that were
adapted together (``is_3d_lora_weight``) and apart. Both forms are told of in ``adapters.inspection.experts``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapters.inspection.experts import is_stacked
from adapters.inspection.safetensors_header import read_entries
from adapters.model import WEIGHTS_FILE


def expert_shapes(tables: Any, name: str, layer: Any) -> dict[str, list[int]]:
    """vLLM's name of each pair on the experts ``layer`` -> [inputs, outputs, experts]; {} for another layer.

    Sizes are the checkpoint's: vLLM rounds them up for some kernels, and its slots with them. Of experts
    without a gate nothing is served: how their pairs are laid out is not known. Nor where several workers
    share experts whose inner size is rounded: vLLM cuts an adapter at the rounded size, the base at its own.
    """
    from vllm.lora.layers import FusedMoEWithLoRA

    if not isinstance(layer, FusedMoEWithLoRA) or not layer.moe_config.is_act_and_mul:
        return {}
    sizes = layer.moe_config
    hidden, part = sizes.hidden_dim_unpadded, sizes.intermediate_size_per_partition_unpadded
    if layer.tp_size > 1 and part != layer.intermediate_size_per_partition:
        return {}
    inner, experts = part * layer.tp_size, layer.global_num_experts
    found: dict[str, list[int]] = {}
    if tables._enable_mixed_moe_lora_format or tables._is_3d_moe_model:
        found |= {f"{name}.base_layer": [hidden, 2 * inner, experts], name: [inner, hidden, experts]}
    if not tables._is_3d_moe_model:  # gate, down and up of one expert after the other
        for index, part in enumerate(tables.packed_modules.get(name, ())):
            found[part] = [inner, hidden, 1] if index % 3 == 1 else [hidden, inner, 1]
    return found


def largest_pairs(layer: Any, rank: int) -> int:
    """Elements of an adapter of ``rank`` on the experts ``layer``, which each worker keeps whole.

    0 for another layer. The form with gate and up apart is the larger one; sizes are as vLLM rounds them up.
    """
    from vllm.lora.layers import FusedMoEWithLoRA

    if not isinstance(layer, FusedMoEWithLoRA) or not layer.moe_config.is_act_and_mul:
        return 0
    inner = layer.intermediate_size_per_partition * layer.tp_size
    return 3 * rank * (int(layer.hidden_size) + int(inner)) * int(layer.global_num_experts)


def has_stacked_experts(folder: str) -> bool:
    """Whether the adapter in ``folder`` has its experts in one pair. Raises OSError and ValueError."""
    with (Path(folder) / WEIGHTS_FILE).open("rb", buffering=0) as file:
        _, tensors = read_entries(file.fileno())
    return any(is_stacked(name.partition(".lora_")[0]) for name in tensors)
