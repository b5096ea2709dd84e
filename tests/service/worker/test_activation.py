"""Slots that are filled in slices: what is in them, in what order with steps, and what a failure leaves."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from adapters.worker.activation import CopiesOnCPU, CopiesOnGPU, SlotFiller, can_be_sliced
from tests.service.worker.test_shards import Worker, adapter, fill, stacked, tables_of, worker

__all__ = ["worker"]  # a fixture

SLICE = 3.0


class Event:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name, self.passed = log, name, False

    def query(self) -> bool:
        return self.passed


class Stream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: Stream) -> None:
        self.cuda.log.append(f"{self.name} after {other.name}")

    def record_event(self) -> Event:
        event = Event(self.cuda.log, f"event {len(self.cuda.events)}")
        self.cuda.events.append(event)
        self.cuda.log.append(f"{event.name} on {self.name}")
        return event

    def wait_event(self, event: Event) -> None:
        self.cuda.log.append(f"{self.name} after {event.name}")


class Cuda:
    """As much of ``torch.cuda`` as orders copies with steps; it keeps account."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.events: list[Event] = []
        self.steps = self.now = Stream(self, "steps")

    def Stream(self) -> Stream:
        return Stream(self, "copies")

    def current_stream(self) -> Stream:
        return self.now

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before


class Layer:
    """Takes a second, and says on which stream."""

    def __init__(self, tables: Tables, name: str) -> None:
        self.tables, self.name = tables, name

    def set_lora(self, index: int, a: Any, b: Any) -> None:
        self.tables.seconds += 1
        if a == "broken":
            raise ValueError(f"{self.name} does not fit")
        self.tables.cuda.log.append(f"{self.name} of slot {index} on {self.tables.cuda.now.name}")

    def reset_lora(self, index: int) -> None:
        self.set_lora(index, None, None)


class Weights:
    def __init__(self, a: str) -> None:
        self.lora_a = self.lora_b = a


class Tables:
    """As vLLM's LoRAModelManager, of five layers and two slots; a load is a layer's name -> weights."""

    def __init__(self) -> None:
        self.cuda = Cuda()
        self.seconds = 0.0
        self.modules = {name: Layer(self, name) for name in "abcde"}
        self.lora_index_to_id: list[int | None] = [None, None]
        self._registered_adapters: dict[int, dict[str, Weights]] = {
            1: {"a": Weights("fine"), "d": Weights("fine")},
            2: {"b": Weights("broken")},
            3: {},
        }
        self._active_adapters: dict[int, None] = {}

    def _get_lora_layer_weights(self, lora: dict[str, Weights], name: str) -> Weights | None:
        return lora.get(name)

    def remove_adapter(self, load_id: int) -> None:
        self._registered_adapters.pop(load_id, None)


@pytest.fixture
def tables() -> Tables:
    return Tables()


def filler(tables: Tables, **changes: Any) -> SlotFiller:
    options = {
        "seconds": SLICE,
        "copies": CopiesOnGPU(tables.cuda),
        "clock": lambda: tables.seconds,
    } | changes
    return SlotFiller(tables, **options)


def test_no_call_copies_for_longer_than_a_slice(tables: Tables) -> None:
    filling = filler(tables)
    filling.begin(1)
    for taken in (3.0, 5.0):
        before = tables.seconds
        assert filling.go_on() == []
        assert tables.seconds - before <= SLICE
        assert tables.seconds == taken
        assert (len(filling), tables._active_adapters) == (1, {}), "nobody may run on it"
    (event,) = tables.cuda.events
    assert filling.go_on() == [], "the copies are on their way"
    event.passed = True
    assert filling.go_on() == [(1, None, 5.0)]
    assert (tables._active_adapters, tables.lora_index_to_id) == ({1: None}, [1, None])
    copies = [f"{layer} of slot 0 on copies" for layer in "abcde"]
    assert tables.cuda.log == ["copies after steps", *copies, "event 0 on copies", "steps after event 0"]


def test_a_slice_is_one_layer_at_least(tables: Tables) -> None:
    filling = filler(tables, seconds=0.001)
    filling.begin(3)
    for number in range(1, 6):
        filling.go_on()
        assert tables.seconds == number


def test_several_slots_share_a_slice_in_their_order(tables: Tables) -> None:
    filling = filler(tables, copies=CopiesOnCPU())
    filling.begin(1)
    filling.begin(3)
    with pytest.raises(LookupError, match="no slot is free"):
        filling.begin(2)
    ended: list[Any] = []
    while filling:
        before = tables.seconds
        ended += filling.go_on()
        assert tables.seconds - before <= SLICE + 1
    assert [load for load, error, _ in ended if error is None] == [1, 3]
    assert tables.lora_index_to_id == [1, 3]


def test_half_an_adapter_is_never_left_in_a_slot(tables: Tables) -> None:
    filling = filler(tables, copies=CopiesOnCPU())
    filling.begin(2)
    filling.begin(1)
    ((load, error, _),) = filling.go_on()
    assert (load, error) == (2, "ValueError: b does not fit")
    assert 2 not in tables._registered_adapters
    assert tables.lora_index_to_id == [None, 1]
    while filling:
        filling.go_on()
    assert tables._active_adapters == {1: None}


def test_what_comes_last_can_fail_too(tables: Tables) -> None:
    def refuse(slot: int, load: int) -> None:
        raise ValueError(f"scales of {load} in {slot}")

    filling = filler(tables, copies=CopiesOnCPU(), on_active=refuse, seconds=0)
    filling.begin(1)
    assert filling.go_on() == [(1, "ValueError: scales of 1 in 0", 5.0)]
    assert (tables._active_adapters, tables.lora_index_to_id, len(filling)) == ({}, [None, None], 0)


def test_a_slot_that_is_given_up_is_free(tables: Tables) -> None:
    filling = filler(tables)
    filling.begin(1)
    filling.go_on()
    filling.give_up(1)
    filling.give_up(7)
    assert (len(filling), tables.lora_index_to_id, filling.go_on()) == (0, [None, None], [])


def test_memory_is_free_behind_copies_and_steps(tables: Tables) -> None:
    fence = CopiesOnGPU(tables.cuda).fence()
    assert tables.cuda.log == ["event 0 on copies", "event 1 on steps"]
    for event in tables.cuda.events:
        assert not fence.query()
        event.passed = True
    assert fence.query()


@pytest.mark.parametrize("seed", range(6))
def test_a_slot_holds_what_vllm_puts_there(worker: Worker, seed: int) -> None:
    theirs, ours = worker(1, 2, True), worker(1, 2, True)
    lora = adapter(random.Random(seed))
    fill(theirs, lora)
    tables = tables_of(ours)
    tables.lora_index_to_id, tables._registered_adapters, tables._active_adapters = [9, None], {4: lora}, {}
    assert can_be_sliced(tables)
    filling = SlotFiller(tables, CopiesOnCPU(), 1e-9)
    filling.begin(4)
    calls = 0
    while filling:
        filling.go_on()
        calls += 1
    assert calls > len(ours)
    assert tables._active_adapters == {4: None}
    assert all(torch.equal(a, b) for a, b in zip(stacked(theirs), stacked(ours), strict=True))
