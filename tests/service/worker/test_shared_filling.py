"""Shared slots that are filled a layer at a time: whatever is half written, nobody's answer is another's."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from adapters.worker.shared_filling import SharedFiller
from adapters.worker.shared_slots import SharedSlots
from tests.service.worker.test_shared_slots import (
    HIDDEN,
    RANK,
    SLOTS,
    Tables,
    adapter,
    deltas,
    layers,
    padded,
    shared,
)

__all__ = ["layers"]  # a fixture


def tables_of(layers: Any, **size: int) -> tuple[Tables, Any, SharedSlots, SharedFiller]:
    """With a filler whose slices are over after each layer."""
    tables, wrapper, slots = shared(layers, **size)

    def remove(load_id: int) -> None:
        tables._registered_adapters.pop(load_id, None)
        tables.deactivate(load_id)

    tables.remove_adapter = remove
    return tables, wrapper, slots, SharedFiller(slots, 1e-9)


def check(layers: Any, tables: Tables, wrapper: Any) -> None:
    """All that are active answer as in slots of their own."""
    active = [tables._registered_adapters[load_id] for load_id in tables._active_adapters]
    if not active:
        return
    ids = [lora.id for lora in active] + [0]
    x = torch.randn((len(ids), HIDDEN), generator=torch.Generator().manual_seed(len(ids)))
    ours = deltas(tables.modules, wrapper, ids, tables.lora_index_to_id, x)
    for got, expected in zip(ours, padded(layers, active, ids, x), strict=True):
        assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_between_any_two_slices_every_answer_is_right(layers: Any, seed: int) -> None:
    """Adapters come, leave and are given up while others are half written or half moved."""
    rng = random.Random(seed)
    tables, wrapper, slots, filler = tables_of(layers)
    next_id, begun, seen = 1, set[int](), 0
    for _ in range(45):
        wanted = adapter(next_id, rng.choice([1, 4, 8, 8, 16, 32, 64]), rng)
        if rng.random() < 0.4 and slots.ranges.fits(slots.ranks_of(wanted)):
            tables._registered_adapters[next_id] = wanted
            filler.begin(next_id)
            begun.add(next_id)
            next_id += 1
        if rng.random() < 0.3 and (there := [*tables._active_adapters, *sorted(begun)]):
            gone = rng.choice(there)
            filler.give_up(gone)
            tables.deactivate(gone)
            begun.discard(gone)
        for load_id, error, _ in filler.go_on():
            assert error is None
            begun.remove(load_id)
            seen += 1
        assert len(filler) == len(begun)
        check(layers, tables, wrapper)
        slots.ranges.check()
    assert seen > 3


def test_without_slices_one_call_writes_all(layers: Any) -> None:
    tables, _, slots, _ = tables_of(layers)
    filler = SharedFiller(slots, 0.0)
    tables._registered_adapters |= {i: adapter(i, 8, random.Random(i)) for i in (1, 2)}
    filler.begin(1)
    filler.begin(2)
    assert [(load_id, error) for load_id, error, _ in filler.go_on()] == [(1, None), (2, None)]
    assert len(filler) == 0


def test_one_call_writes_no_more_than_a_slice_holds(layers: Any) -> None:
    """Two layers, and four that move first: ten calls, and none of them switches what is not whole."""
    tables, wrapper, _, filler = tables_of(layers, slots=2, adapters=16)
    loras = [adapter(i, 8, random.Random(i)) for i in range(1, 17)] + [adapter(17, RANK, random.Random(17))]
    tables._registered_adapters |= {lora.id: lora for lora in loras}
    for lora in loras[:16]:
        tables.activate_adapter(lora.id)
    for left in range(1, 17, 2):
        tables.deactivate(left)
    filler.begin(17)
    calls = 0
    while not (ended := filler.go_on()):
        calls += 1
        assert 17 not in tables._active_adapters
        check(layers, tables, wrapper)
    assert [one[:2] for one in ended] == [(17, None)]
    assert calls == 10
    check(layers, tables, wrapper)
    assert not len(filler)


def test_what_cannot_be_written_takes_no_place(layers: Any) -> None:
    tables, _, slots, filler = tables_of(layers)
    broken, whole = adapter(1, 8, random.Random(1)), adapter(2, 8, random.Random(2))
    broken.loras["o_proj"].lora_b[3, 3] = float("nan")
    tables._registered_adapters |= {1: broken, 2: whole}
    filler.begin(1)
    filler.begin(2)
    ended = {}
    while len(filler):
        ended |= {load_id: error for load_id, error, _ in filler.go_on()}
    assert ended[2] is None
    assert "not finite" in str(ended[1])
    assert slots.ranges.free == SLOTS * RANK - 8
    assert 1 not in tables.lora_index_to_id
    assert 1 not in tables._registered_adapters, "half of it must not be mistaken for all of it"
    wide = {load_id: adapter(load_id, RANK, random.Random(load_id)) for load_id in range(3, 3 + SLOTS)}
    tables._registered_adapters |= wide
    *fitting, last = wide
    for load_id in fitting:
        filler.begin(load_id)
    with pytest.raises(ValueError, match="ranks are not free"):
        filler.begin(last)
