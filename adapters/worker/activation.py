"""How an adapter gets from host memory into a slot without holding the engine for long.

vLLM fills a slot in one call between two steps: some 900 fills and copies for an 8B Llama, 13 ms at rank 64
by arithmetic, in which nobody gets a token. Here the slot is filled a slice at a time:

    begin     the slot is taken; nothing is copied yet
    go_on     copies layer after layer until the time of a slice is over; called once between two steps
    ended     once the copies are done the adapter is active, and only then may a request run on it

On a GPU the copies go on a stream of their own, beside the steps: behind those that had the slot before, and
before those that will have it. It has not been run on one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from adapters.worker.host_pool import Fence

SLICE_S = 0.002  # a quarter of a step of an 8B model on a GPU
SLICE_ON_CPU_S = 0.02  # a quarter of a step that takes 80 ms

# A load, why it is not active, and the seconds from ``begin`` on.
Ended = tuple[int, str | None, float]


class Copies(Protocol):
    """How copies into slots are ordered with the engine's steps."""

    def after_the_steps(self) -> None:
        """What is copied from now on waits for all steps so far."""

    def beside_the_steps(self) -> AbstractContextManager[Any]:
        """Within it copies do not wait for steps, nor steps for them."""

    def mark(self) -> Fence:
        """Behind all copies so far."""

    def fence(self) -> Fence:
        """Behind all copies and all steps so far."""

    def before_the_steps(self, mark: Fence) -> None:
        """The next steps wait for what ``mark`` is behind."""


class Done:
    """A fence behind nothing."""

    def query(self) -> bool:
        return True


class CopiesOnCPU:
    """A copy has ended when its call has."""

    def after_the_steps(self) -> None:
        pass

    def beside_the_steps(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def mark(self) -> Fence:
        return Done()

    fence = mark

    def before_the_steps(self, mark: Fence) -> None:
        pass


class CopiesOnGPU:
    """On a stream of its own. ``cuda`` is ``torch.cuda``. To be used on the engine's thread alone."""

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._stream = cuda.Stream()

    def after_the_steps(self) -> None:
        self._stream.wait_stream(self._cuda.current_stream())

    def beside_the_steps(self) -> AbstractContextManager[Any]:
        within: AbstractContextManager[Any] = self._cuda.stream(self._stream)
        return within

    def mark(self) -> Fence:
        event: Fence = self._stream.record_event()
        return event

    def fence(self) -> Fence:
        return _Both(self.mark(), self._cuda.current_stream().record_event())

    def before_the_steps(self, mark: Fence) -> None:
        self._cuda.current_stream().wait_event(mark)


@dataclass(frozen=True, slots=True)
class _Both:
    one: Fence
    other: Fence

    def query(self) -> bool:
        return self.one.query() and self.other.query()


@dataclass(slots=True)
class _Filling:
    load_id: int
    index: int
    layers: Iterator[None]
    began: float
    mark: Fence | None = None  # behind the last copy


class SlotFiller:
    """Fills slots of vLLM's ``tables`` (LoRAModelManager), as its ``activate_adapter`` does.

    ``seconds``: of a slice; 0 fills a slot in one. ``on_active`` is told slot and load when all is copied;
    what it raises is why the load is not active. A load that could not be copied is removed from ``tables``.
    """

    def __init__(
        self,
        tables: Any,
        copies: Copies,
        seconds: float,
        on_active: Callable[[int, int], None] = lambda _slot, _load: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._tables = tables
        self._copies = copies
        self._seconds = seconds
        self._on_active = on_active
        self._clock = clock
        self._fillings: list[_Filling] = []

    def __repr__(self) -> str:
        return f"SlotFiller({[filling.load_id for filling in self._fillings]})"

    def __len__(self) -> int:
        """How many slots are being filled."""
        return len(self._fillings)

    def begin(self, load_id: int) -> None:
        """Takes a slot for a load that is in host memory. Raises LookupError where none is free."""
        slots = self._tables.lora_index_to_id
        if None not in slots:
            raise LookupError("no slot is free")
        index = slots.index(None)
        slots[index] = load_id
        self._copies.after_the_steps()
        self._fillings.append(_Filling(load_id, index, self._layers(index, load_id), self._clock()))

    def give_up(self, load_id: int) -> None:
        """Its slot is free again, where it was being filled."""
        for filling in [one for one in self._fillings if one.load_id == load_id]:
            self._fillings.remove(filling)
            self._tables.lora_index_to_id[filling.index] = None

    def go_on(self) -> list[Ended]:
        """Copies for one slice, one layer at least, and says what has ended."""
        until = self._clock() + self._seconds if self._seconds else float("inf")
        ended: list[Ended] = []
        for filling in list(self._fillings):
            try:
                if filling.mark is None and not self._copied(filling, until):
                    break
                assert filling.mark is not None
                if not filling.mark.query():
                    continue
                self._finish(filling, filling.mark)
            except Exception as exc:  # whatever vLLM raises belongs to this load alone
                self.give_up(filling.load_id)
                self._tables.remove_adapter(filling.load_id)
                error = f"{type(exc).__name__}: {exc}"
                ended.append((filling.load_id, error, self._clock() - filling.began))
            else:
                ended.append((filling.load_id, None, self._clock() - filling.began))
        return ended

    def _copied(self, filling: _Filling, until: float) -> bool:
        """Whether all of it is on its way."""
        with self._copies.beside_the_steps():
            for _ in filling.layers:
                if self._clock() >= until:
                    return False
            filling.mark = self._copies.mark()
        return True

    def _layers(self, index: int, load_id: int) -> Iterator[None]:
        lora = self._tables._registered_adapters[load_id]
        for name, layer in self._tables.modules.items():
            weights = self._tables._get_lora_layer_weights(lora, name)
            if weights:
                layer.set_lora(index, weights.lora_a, weights.lora_b)
            else:
                layer.reset_lora(index)
            yield

    def _finish(self, filling: _Filling, mark: Fence) -> None:
        self._copies.before_the_steps(mark)
        self._on_active(filling.index, filling.load_id)
        self._tables._active_adapters[filling.load_id] = None
        self._fillings.remove(filling)


def can_be_sliced(tables: Any) -> bool:
    """Whether a slot of ``tables`` holds layers alone, and not a head of a classifier's own."""
    return not any(hasattr(layer, "reset_module_to_save") for layer in tables.modules.values())
