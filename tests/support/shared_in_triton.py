"""What ``interpreted`` runs: adapters in shared slots and in their own, by a GPU's wrappers of kernels.

Also with the kernels written out in torch (``kernels_in_torch``).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from adapters.worker.scheduler import ADAPTERS
from adapters.worker.shared_rows_gpu import SharedRowsOnGPU
from adapters.worker.shared_slots import SharedSlots
from tests.service.worker.test_shared_slots import (
    HIDDEN,
    RANK,
    SLOTS,
    Tables,
    adapter,
    deltas,
    layers_of,
)

TOKENS, MOST = 24, 24


def launched_whole(op_type: str, **_: Any) -> dict[str, int]:
    """How kernels are launched: in few large blocks, since the interpreter runs one after the other.

    vLLM's own choice for a small batch is 64 blocks for each product, as a GPU has room for.
    """
    return {
        "block_m": 32,
        "block_n": 64,
        "block_k": 64,
        "split_k": 1,
        "num_warps": 4,
        "num_ctas": 1,
        "num_stages": 2,
    }


lora_shrink_op.get_lora_op_configs = lora_expand_op.get_lora_op_configs = launched_whole


def lora_config(slots: int) -> LoRAConfig:
    return LoRAConfig(max_loras=slots, max_lora_rank=RANK, max_cpu_loras=100, lora_dtype=torch.float16)


def shared() -> tuple[Tables, Any, SharedSlots]:
    """As the worker on a GPU makes it: the wrapper first, by vLLM's hook, then the tables."""
    config = lora_config(SLOTS)
    with set_current_vllm_config(VllmConfig(additional_config={ADAPTERS: MOST})):
        wrapper = SharedRowsOnGPU(TOKENS, TOKENS, "cpu", lora_config=config)
    modules = layers_of(SLOTS, wrapper, torch.float16)
    tables = Tables(lora_config=config, modules=modules, _registered_adapters={})
    return tables, wrapper, SharedSlots(tables, wrapper, MOST)


def padded(loras: list[Any], ids: list[int], x: torch.Tensor) -> list[torch.Tensor]:
    """With a slot for each adapter, by vLLM's own wrapper."""
    wrapper = PunicaWrapperGPU(TOKENS, TOKENS, "cpu", lora_config=lora_config(len(loras)))
    layers = layers_of(len(loras), wrapper, torch.float16)
    for index, lora in enumerate(loras):
        for name, layer in layers.items():
            if one := lora.get_lora(name):
                layer.set_lora(index, one.lora_a, one.lora_b)
    return deltas(layers, wrapper, ids, [lora.id for lora in loras], x)


def differences(sets: int, seed: int = 1) -> list[float]:
    """The largest of each set of adapters; between sets some leave and others come."""
    rng, found, next_id = random.Random(seed), [], 1
    tables, wrapper, slots = shared()
    for _ in range(sets):
        for load_id in list(tables._active_adapters):
            if rng.random() < 0.4:
                tables.deactivate(load_id)
        for _ in range(rng.randint(3, 12)):
            lora = adapter(next_id, rng.choice([1, 2, 4, 8, 8, 16, 24, 32, 64]), rng)
            if None in tables.lora_index_to_id and slots.ranges.fits(slots.ranks_of(lora)):
                tables._registered_adapters[next_id] = lora
                tables.activate_adapter(next_id)
                next_id += 1
        active = [tables._registered_adapters[load_id] for load_id in tables._active_adapters]
        ids = [rng.choice([0, *(lora.id for lora in active)]) for _ in range(TOKENS)]
        x = torch.randn((TOKENS, HIDDEN), generator=torch.Generator().manual_seed(next_id)).half()
        ours = deltas(tables.modules, wrapper, ids, tables.lora_index_to_id, x)
        pairs = zip(ours, padded(active, ids, x), strict=True)
        found.append(max(float((one - other).abs().max()) for one, other in pairs))
        assert all(one.abs().max() > 0.5 for one in ours), "nothing was added"
        assert not any(one[[row for row, i in enumerate(ids) if i == 0]].any() for one in ours)
    return found
