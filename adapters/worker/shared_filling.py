"""Shared slots, filled a slice at a time, as ``adapters.worker.activation`` does with slots of one adapter.

What an adapter's place needs is a row of writes: first of those that move out of its way, then of itself.
They are carried out in order, whosoever they are for, a layer at a time, on the engine's own stream: each
step sees an adapter whole, in its old place or in its new one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from adapters.worker.activation import Ended
from adapters.worker.ranges import Move, Put
from adapters.worker.shared_slots import SharedSlots


@dataclass(slots=True)
class _Write:
    effect: Put
    layers: Iterator[None]
    began: float


class SharedFiller:
    """Fills places of ``slots``; the same calls as ``SlotFiller`` has. ``seconds``: of a slice; 0 fills
    a place in one."""

    def __init__(
        self, slots: SharedSlots, seconds: float, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._slots = slots
        self._seconds = seconds
        self._clock = clock
        self._writes: list[_Write] = []

    def __repr__(self) -> str:
        return f"SharedFiller({[write.effect for write in self._writes]})"

    def __len__(self) -> int:
        """How many adapters are on their way."""
        return sum(not isinstance(write.effect, Move) for write in self._writes)

    def begin(self, load_id: int) -> None:
        """Takes a place for a load that is in host memory. Raises LookupError or ValueError where none is."""
        now = self._clock()
        for effect in self._slots.take(load_id):
            self._writes.append(_Write(effect, self._slots.write(effect), now))

    def give_up(self, load_id: int) -> None:
        """Nothing more is written of it, and the place that it was to have is free."""
        filling = any(self._is_new(write, load_id) for write in self._writes)
        self._writes = [write for write in self._writes if write.effect.load != load_id]
        if filling:
            self._slots.give_back(load_id)

    def go_on(self) -> list[Ended]:
        """Writes for one slice, one layer at least, and says what has ended.

        A load that cannot be written is removed from vLLM's tables. One that moves was written before, from
        the same memory: what is raised then is raised here, since its tokens would be answered wrongly.
        """
        until = self._clock() + self._seconds if self._seconds else float("inf")
        ended: list[Ended] = []
        while self._writes:
            write = self._writes[0]
            load_id = write.effect.load
            try:
                for _ in write.layers:
                    if self._clock() >= until:
                        return ended
            except Exception as exc:
                if isinstance(write.effect, Move):
                    raise
                self.give_up(load_id)
                self._slots.remove(load_id)
                ended.append((load_id, f"{type(exc).__name__}: {exc}", self._clock() - write.began))
                continue
            self._slots.settle(write.effect)
            self._writes.pop(0)
            if not isinstance(write.effect, Move):
                ended.append((load_id, None, self._clock() - write.began))
        return ended

    @staticmethod
    def _is_new(write: _Write, load_id: int) -> bool:
        return write.effect.load == load_id and not isinstance(write.effect, Move)
