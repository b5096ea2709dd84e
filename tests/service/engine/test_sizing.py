"""A slot's size against what vLLM itself allocates for it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import parallel_state
from vllm.lora.utils import from_layer
from vllm.model_executor.layers import linear

from server.engine import sizing
from server.engine.sizing import Layer
from tests.pure.engine.test_sizing import FUSED


@pytest.fixture
def share(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes vLLM's layers those of the first of so many workers, without the workers."""

    def share_(workers: int) -> None:
        group = SimpleNamespace(world_size=workers, rank_in_group=0)
        monkeypatch.setattr(parallel_state, "_TP", group)

    with set_current_vllm_config(VllmConfig()), torch.device("meta"):
        yield share_


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["half", "fully_sharded"])
@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_a_slot_is_what_vllm_allocates(share: Any, workers: int, fully_sharded: bool) -> None:
    share(workers)
    slots, rank, dtype = 3, 16, torch.bfloat16
    lora = LoRAConfig(
        max_loras=slots, max_lora_rank=rank, lora_dtype=dtype, fully_sharded_loras=fully_sharded
    )
    inside = {"bias": False, "params_dtype": dtype}
    one_of_each = [
        (linear.QKVParallelLinear(64, 8, 8, 2, **inside), FUSED["qkv_proj"]),
        (linear.MergedColumnParallelLinear(64, [96, 96], **inside), FUSED["gate_up_proj"]),
        (linear.ColumnParallelLinear(64, 32, **inside), []),
        (linear.RowParallelLinear(96, 64, **inside), []),
        (linear.ReplicatedLinear(64, 8, **inside), []),
    ]
    wrapped: list[Any] = [from_layer(layer, slots, lora, parts) for layer, parts in one_of_each]
    allocated = sum(t.nbytes for w in wrapped for t in (*w.lora_a_stacked, *w.lora_b_stacked))
    layers = [
        Layer(64, 64, "column"), Layer(64, 16, "column", unit=8), Layer(64, 16, "column", unit=8),
        Layer(64, 96, "column"), Layer(64, 96, "column"), Layer(64, 32, "column"),
        Layer(96, 64, "row"), Layer(64, 8),
    ]  # fmt: skip
    counted = sizing.slot_bytes(
        layers, rank=rank, itemsize=dtype.itemsize, workers=workers, fully_sharded=fully_sharded
    )
    assert counted * slots == allocated
