"""What each of several workers keeps of an adapter, against what vLLM puts into its slots by itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import parallel_state
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights
from vllm.lora.utils import from_layer
from vllm.model_executor.layers import linear
from vllm.model_executor.models.utils import PPMissingLayer

from adapters.worker.shards import cut_when_read, is_divided
from tests.pure.engine.test_sizing import FUSED

HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 64, 96, 8, 2, 8
MAX_RANK = 16

# One worker's layers, in vLLM's terms: their names, and how a model has them.
Worker = Callable[[int, int, bool], dict[str, Any]]


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """The layers of one of so many workers, without the others."""

    def layers(rank: int, workers: int, fully_sharded: bool) -> dict[str, Any]:
        monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(world_size=workers, rank_in_group=rank))
        lora = LoRAConfig(
            max_loras=2, max_lora_rank=MAX_RANK, lora_dtype=torch.float32, fully_sharded_loras=fully_sharded
        )
        inside = {"bias": False, "params_dtype": torch.float32}
        made: dict[str, tuple[Any, list[str]]] = {
            "qkv_proj": (
                linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, **inside),
                FUSED["qkv_proj"],
            ),
            "gate_up_proj": (
                linear.MergedColumnParallelLinear(HIDDEN, [INNER, INNER], **inside),
                FUSED["gate_up_proj"],
            ),
            "one_gate_up": (
                linear.MergedColumnParallelLinear(HIDDEN, [INNER, INNER], **inside),
                ["one_gate_up"],
            ),
            "dense": (linear.ColumnParallelLinear(HIDDEN, 32, **inside), []),
            "down_proj": (linear.RowParallelLinear(INNER, HIDDEN, **inside), []),
            "router": (linear.ReplicatedLinear(HIDDEN, 8, **inside), []),
        }
        return {name: from_layer(layer, 2, lora, parts) for name, (layer, parts) in made.items()}

    with set_current_vllm_config(VllmConfig()):
        yield layers


OUTPUTS = {
    "qkv_proj": [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD],
    "gate_up_proj": [INNER, INNER],
    "one_gate_up": [2 * INNER],
    "dense": [32],
    "down_proj": [HIDDEN],
    "router": [8],
}


def adapter(rng: random.Random) -> LoRAModel:
    """On some layers and slices, each slice with a rank of its own, and on a layer that nobody has."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))

    def weights(name: str, inputs: int, outputs: int, rank: int) -> LoRALayerWeights:
        a, b = (torch.randn(shape, generator=generator) for shape in ((rank, inputs), (outputs, rank)))
        return LoRALayerWeights(name, rank, rank, a, b)

    loras: dict[str, LoRALayerWeights] = {}
    for name, outputs in OUTPUTS.items():
        inputs = INNER if name == "down_proj" else HIDDEN
        parts = [weights(name, inputs, size, rng.choice([1, 4, 7, 8, 16])) for size in outputs]
        if len(parts) == 1:
            loras[name] = parts[0]
            continue
        some = [part if rng.random() < 0.7 else None for part in parts]
        if any(some):
            loras[name] = PackedLoRALayerWeights.pack(some)
    kept = {name: one for name, one in loras.items() if rng.random() < 0.8}
    return LoRAModel(1, MAX_RANK, {**kept, "another_stage": weights("another_stage", HIDDEN, HIDDEN, 8)})


def tables_of(layers: dict[str, Any]) -> Any:
    return SimpleNamespace(
        modules=layers,
        model=torch.nn.ModuleDict(layers),
        _create_merged_loras_inplace=lambda lora: None,
        _get_lora_layer_weights=lambda lora, name: lora.get_lora(name),
    )


def fill(layers: dict[str, Any], lora: LoRAModel) -> None:
    """As ``activate_adapter`` does."""
    for name, layer in layers.items():
        if one := lora.get_lora(name):
            layer.set_lora(1, one.lora_a, one.lora_b)
        else:
            layer.reset_lora(1)


def stacked(layers: dict[str, Any]) -> list[torch.Tensor]:
    return [t for layer in layers.values() for t in (*layer.lora_a_stacked, *layer.lora_b_stacked)]


def size_of(lora: LoRAModel, names: list[str]) -> int:
    sides = [side for name in names if (one := lora.get_lora(name)) for side in (one.lora_a, one.lora_b)]
    return sum(
        t.numel() for side in sides for t in (side if isinstance(side, list) else [side]) if t is not None
    )


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["half", "fully_sharded"])
@pytest.mark.parametrize("workers", [2, 4])
def test_a_slot_holds_what_vllm_cuts_by_itself(worker: Worker, workers: int, fully_sharded: bool) -> None:
    for seed in range(12):
        for rank in range(workers):
            theirs, ours = worker(rank, workers, fully_sharded), worker(rank, workers, fully_sharded)
            fill(theirs, adapter(random.Random(seed)))
            tables = tables_of(ours)
            cut_when_read(tables, torch.empty)
            lora = adapter(random.Random(seed))
            tables._create_merged_loras_inplace(lora)
            fill(ours, lora)
            fill(ours, lora)  # from host memory once more
            for expected, got in zip(stacked(theirs), stacked(ours), strict=True):
                assert torch.equal(expected, got)
            assert "another_stage" not in lora.loras


@pytest.mark.parametrize("workers", [2, 4])
def test_all_workers_together_keep_one_copy(worker: Worker, workers: int) -> None:
    """Where they are fully sharded; what vLLM wants whole on each worker is there once for each."""
    divided = ["qkv_proj", "gate_up_proj", "dense", "down_proj"]
    for seed in range(12):
        whole = adapter(random.Random(seed))
        once = size_of(whole, divided)
        for fully_sharded in (False, True):
            kept = 0
            for rank in range(workers):
                tables, room = tables_of(worker(rank, workers, fully_sharded)), Mock(side_effect=torch.empty)
                cut_when_read(tables, room)
                lora = adapter(random.Random(seed))
                tables._create_merged_loras_inplace(lora)
                kept += size_of(lora, divided)
                room.assert_called_once_with(size_of(lora, list(OUTPUTS)))  # and nothing else is kept
            heads = (
                2 if workers > KV_HEADS else 1
            )  # a KV head is on two workers where there are more than heads
            assert once <= kept <= (heads * once if fully_sharded else workers * once)
            if fully_sharded and heads == 1:
                assert kept == once


def test_an_adapter_that_was_not_cut_still_is_by_vllm(worker: Worker) -> None:
    """As those are that vLLM makes itself, to try its kernels."""
    theirs, ours = worker(1, 2, True), worker(1, 2, True)
    cut_when_read(tables_of(ours), torch.empty)
    for layers in (theirs, ours):
        fill(layers, adapter(random.Random(3)))
    assert all(torch.equal(*pair) for pair in zip(stacked(theirs), stacked(ours), strict=True))


def test_one_worker_alone_has_nothing_to_cut(worker: Worker) -> None:
    assert not is_divided(tables_of(worker(0, 1, False)))
    assert is_divided(tables_of(worker(0, 2, False)))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pipeline_stage_keeps_its_own_layers(worker: Worker, workers: int) -> None:
    """Two stages, each of so many workers: every layer is in one of them, and both fill slots as vLLM does.

    vLLM leaves a placeholder for what another stage has; on a CPU its stages do not run (``bases.py``).
    """
    stages = (("qkv_proj", "dense", "router"), ("gate_up_proj", "one_gate_up", "down_proj"))
    for seed in range(6):
        whole = adapter(random.Random(seed))
        for rank in range(workers):
            kept: list[str] = []
            for stage in stages:
                theirs, ours = worker(rank, workers, workers > 1), worker(rank, workers, workers > 1)
                tables = tables_of({name: ours[name] for name in stage})
                others = [name for name in ours if name not in stage]
                tables.model.update({name: PPMissingLayer() for name in others})
                assert is_divided(tables)
                room = Mock(side_effect=torch.empty)
                cut_when_read(tables, room)
                lora = adapter(random.Random(seed))
                tables._create_merged_loras_inplace(lora)
                room.assert_called_once_with(size_of(lora, list(stage)))
                kept += lora.loras
                fill(tables.modules, lora)
                fill({name: theirs[name] for name in stage}, adapter(random.Random(seed)))
                for name in stage:
                    both = stacked({name: theirs[name]}), stacked({name: ours[name]})
                    assert all(torch.equal(*pair) for pair in zip(*both, strict=True))
            assert sorted(kept) == sorted(whole.loras.keys() - {"another_stage"})
