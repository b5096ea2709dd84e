"""An event loop whose clock jumps to the next timer when nothing else is left to do: no test waits."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

# No scenario simulates as much as a day; one that does will never end.
_FOREVER = 86_400.0


class VirtualLoop(asyncio.SelectorEventLoop):
    """``steps`` counts the loop's iterations; ``at_step`` runs something after one of them."""

    def __init__(self) -> None:
        super().__init__()
        self._virtual_now = 0.0
        self.steps = 0
        self._after: dict[int, Callable[[], object]] = {}

    def time(self) -> float:
        return self._virtual_now

    def stand_still(self, seconds: float) -> None:
        """As if the process had been stopped for so long: all that fell due meanwhile is due at once."""
        self._virtual_now += seconds

    def at_step(self, step: int, action: Callable[[], object]) -> None:
        self._after[step] = action

    def forget_actions(self) -> None:
        self._after.clear()

    def _run_once(self) -> None:
        timers: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        while timers and timers[0].cancelled():
            heapq.heappop(timers)._scheduled = False  # type: ignore[attr-defined]
            self._timer_cancelled_count -= 1  # type: ignore[attr-defined]
        if not self._ready:  # type: ignore[attr-defined]
            if not timers:
                raise RuntimeError("nothing will ever happen again")
            self._virtual_now = max(self._virtual_now, timers[0].when())
            if self._virtual_now > _FOREVER:
                raise RuntimeError("the scenario does not end")
        super()._run_once()  # type: ignore[misc]
        self.steps += 1
        action = self._after.pop(self.steps, None)
        if action is not None:
            action()


def run(scenario: Coroutine[Any, Any, T]) -> T:
    """The result of ``scenario`` on a loop of its own, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(scenario)


def stand_still(seconds: float) -> None:
    """The clock of the running ``VirtualLoop`` goes on, and nothing else."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.stand_still(seconds)
