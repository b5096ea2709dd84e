"""Adapters that share slots answer as each does in a slot of its own, whatever came and went before."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import parallel_state
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights
from vllm.lora.utils import from_layer
from vllm.model_executor.layers import linear

from adapters.worker.cpu.kernels import GroupedPunicaWrapper
from adapters.worker.shared_slots import SharedRowsOnCPU, SharedSlots
from tests.pure.engine.test_sizing import FUSED

HIDDEN, HEADS, KV_HEADS, HEAD = 48, 6, 2, 8
RANK, SLOTS, ADAPTERS, TOKENS = 64, 3, 24, 40
OUTPUTS = {"qkv_proj": [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD], "o_proj": [HIDDEN]}


ONE_WORKER = SimpleNamespace(world_size=1, rank_in_group=0)


def layers_of(slots: int, wrapper: Any, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """vLLM's layers with so many slots, and its ``wrapper`` of kernels."""
    with set_current_vllm_config(VllmConfig()):
        lora = LoRAConfig(max_loras=slots, max_lora_rank=RANK, lora_dtype=dtype)
        inside = {"bias": False, "params_dtype": dtype}
        qkv = linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, **inside)
        out = linear.RowParallelLinear(HIDDEN, HIDDEN, **inside)
        made = {
            "qkv_proj": from_layer(qkv, slots, lora, FUSED["qkv_proj"]),
            "o_proj": from_layer(out, slots, lora, []),
        }
    for layer in made.values():
        layer.set_mapping(wrapper)
    return made


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(parallel_state, "_TP", ONE_WORKER)
    return layers_of


def adapter(load_id: int, rank: int, rng: random.Random) -> LoRAModel:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))

    def weights(outputs: int) -> LoRALayerWeights:
        # Scaled so that every rank matters as much: A x is about one, and so is what B makes of all ranks.
        a = torch.randn((rank, HIDDEN), generator=generator) / HIDDEN**0.5
        b = torch.randn((outputs, rank), generator=generator) / rank**0.5
        return LoRALayerWeights("layer", rank, rank, a, b)

    loras: dict[str, LoRALayerWeights] = {"o_proj": weights(HIDDEN)}
    parts = [weights(size) if rng.random() < 0.8 else None for size in OUTPUTS["qkv_proj"]]
    if any(parts):
        loras["qkv_proj"] = PackedLoRALayerWeights.pack(parts)
    return LoRAModel(load_id, rank, loras)


class Tables(SimpleNamespace):
    """What ``SharedSlots`` takes over of vLLM's LoRAModelManager."""

    @property
    def lora_slots(self) -> int:
        return int(self.lora_config.max_loras)

    def _get_lora_layer_weights(self, lora: LoRAModel, name: str) -> Any:
        return lora.get_lora(name)

    def deactivate(self, load_id: int) -> None:
        self._deactivate_adapter(load_id)
        self._active_adapters.pop(load_id, None)


def shared(
    layers: Any, slots: int = SLOTS, adapters: int = ADAPTERS
) -> tuple[Tables, SharedRowsOnCPU, SharedSlots]:
    wrapper = SharedRowsOnCPU(TOKENS, TOKENS, "cpu")
    config = LoRAConfig(max_loras=slots, max_lora_rank=RANK, max_cpu_loras=100, lora_dtype=torch.float32)
    tables = Tables(lora_config=config, modules=layers(slots, wrapper), _registered_adapters={})
    return tables, wrapper, SharedSlots(tables, wrapper, adapters)


def deltas(
    layers: dict[str, Any], wrapper: Any, ids: list[int], table: list[int | None], x: torch.Tensor
) -> list[torch.Tensor]:
    """What each layer adds to the rows of ``x``, of adapters ``ids`` (0: none)."""
    wrapper.update_metadata(LoRAMapping(tuple(ids), tuple(ids), is_prefill=True), table, len(table) + 1, 100)
    made = []
    for name, layer in layers.items():
        y = torch.zeros(len(ids), sum(OUTPUTS[name]), dtype=x.dtype)
        wrapper.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, layer.output_slices)
        made.append(y)
    return made


def padded(layers: Any, loras: list[LoRAModel], ids: list[int], x: torch.Tensor) -> list[torch.Tensor]:
    """The same with a slot for each adapter."""
    wrapper = GroupedPunicaWrapper(TOKENS, TOKENS, "cpu")
    alone = layers(len(loras), wrapper)
    for index, lora in enumerate(loras):
        for name, layer in alone.items():
            if one := lora.get_lora(name):
                layer.set_lora(index, one.lora_a, one.lora_b)
    return deltas(alone, wrapper, ids, [lora.id for lora in loras], x)


@pytest.mark.parametrize("seed", range(20))
def test_any_mix_of_ranks_is_answered_as_in_slots_of_their_own(layers: Any, seed: int) -> None:
    """Ten sets each, of adapters that arrive and leave in between; 200 together."""
    rng = random.Random(seed)
    tables, wrapper, slots = shared(layers)
    next_id = 1
    for _ in range(10):
        for load_id in list(tables._active_adapters):
            if rng.random() < 0.4:
                tables.deactivate(load_id)
        for _ in range(rng.randint(3, 12)):
            lora = adapter(next_id, rng.choice([1, 2, 4, 8, 8, 16, 24, 32, 64]), rng)
            if None not in tables.lora_index_to_id or not slots.ranges.fits(slots.ranks_of(lora)):
                continue
            tables._registered_adapters[next_id] = lora
            assert tables.activate_adapter(next_id)
            next_id += 1
        active = [tables._registered_adapters[i] for i in tables._active_adapters]
        ids = [rng.choice([0, *(lora.id for lora in active)]) for _ in range(TOKENS)]
        x = torch.randn((TOKENS, HIDDEN), generator=torch.Generator().manual_seed(seed))
        ours = deltas(tables.modules, wrapper, ids, tables.lora_index_to_id, x)
        for got, expected in zip(ours, padded(layers, active, ids, x), strict=True):
            assert torch.allclose(got, expected, atol=1e-5)
            assert not got[[row for row, i in enumerate(ids) if i == 0]].any(), "a row without an adapter"
        slots.ranges.check()


def test_eight_small_ones_take_the_memory_of_one_large(layers: Any) -> None:
    tables, wrapper, slots = shared(layers, slots=1, adapters=8)
    loras = [adapter(i, 8, random.Random(i)) for i in range(1, 9)]
    for lora in loras:
        tables._registered_adapters[lora.id] = lora
        tables.activate_adapter(lora.id)
    assert slots.ranges.free == 0
    assert tables.modules["o_proj"].lora_a_stacked[0].shape[0] == 1
    ids, x = [lora.id for lora in loras], torch.randn(8, HIDDEN)
    ours = deltas(tables.modules, wrapper, ids, tables.lora_index_to_id, x)
    assert all(
        torch.allclose(*both, atol=1e-5) for both in zip(ours, padded(layers, loras, ids, x), strict=True)
    )


def test_those_that_make_room_for_a_wide_one_answer_as_before(layers: Any) -> None:
    tables, wrapper, slots = shared(layers, slots=2, adapters=16)
    loras = [adapter(i, 8, random.Random(i)) for i in range(1, 17)] + [adapter(17, 64, random.Random(17))]
    tables._registered_adapters |= {lora.id: lora for lora in loras}
    for lora in loras[:16]:
        tables.activate_adapter(lora.id)
    for left in range(1, 17, 2):
        tables.deactivate(left)
    before = {lora.id: slots.ranges.place(lora.id) for lora in loras}
    tables.activate_adapter(17)
    moved = [i for i, place in before.items() if place and place != slots.ranges.place(i)]
    assert len(moved) == 4, "those of one slot, into the gaps of the other"
    active = [lora for lora in loras if lora.id in tables._active_adapters]
    ids = [lora.id for lora in active]
    x = torch.randn((len(ids), HIDDEN), generator=torch.Generator().manual_seed(5))
    ours = deltas(tables.modules, wrapper, ids, tables.lora_index_to_id, x)
    assert all(
        torch.allclose(*both, atol=1e-5) for both in zip(ours, padded(layers, active, ids, x), strict=True)
    )


def test_a_neighbour_that_overflows_is_not_noticed(layers: Any) -> None:
    """Finite weights may make an infinite product; zero times that would be no number."""
    tables, wrapper, _ = shared(layers, slots=1, adapters=8)
    calm, wild = adapter(1, 8, random.Random(1)), adapter(2, 8, random.Random(2))
    wild.loras["o_proj"].lora_a.fill_(3e38)
    for lora in (calm, wild):
        tables._registered_adapters[lora.id] = lora
        tables.activate_adapter(lora.id)
    x = torch.full((2, HIDDEN), 10.0)
    ours = deltas(tables.modules, wrapper, [1, 2], tables.lora_index_to_id, x)
    alone = padded(layers, [calm], [1, 0], x)
    assert not torch.isfinite(ours[1][1]).all(), "it does overflow"
    assert all(torch.allclose(got[0], one[0], atol=1e-4) for got, one in zip(ours, alone, strict=True))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_could_reach_its_neighbours_gets_no_place(layers: Any, broken: float) -> None:
    tables, _, slots = shared(layers)
    lora = adapter(1, 8, random.Random(1))
    lora.loras["o_proj"].lora_b[3, 3] = broken
    tables._registered_adapters[1] = lora
    with pytest.raises(ValueError, match="not finite"):
        tables.activate_adapter(1)
    assert slots.ranges.free == SLOTS * RANK
    assert 1 not in tables.lora_index_to_id


def test_a_shape_that_is_not_the_layers_gets_no_place(layers: Any) -> None:
    tables, _, slots = shared(layers)
    lora = adapter(1, 8, random.Random(1))
    lora.loras["o_proj"].lora_b = torch.ones(HIDDEN + 1, 8)
    tables._registered_adapters[1] = lora
    with pytest.raises(ValueError, match="does not fit"):
        tables.activate_adapter(1)
    assert slots.ranges.free == SLOTS * RANK
