"""A clock that stands still while this process does: for judging others by how long they were silent.

A process is stopped, or gets no processor, for seconds at a time: a suspended virtual machine, a debugger, a
machine with too much to do. What others said meanwhile waits to be read, so that time says nothing of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

TICKS_AT_ONCE = 2  # what one look may add, in ticks: less is a busy loop, not one that stood still


class AwakeClock:
    """Seconds in which the event loop came round at least every few ticks. It never goes back.

    ``tick`` is in seconds: a pause counts as ``TICKS_AT_ONCE`` of them, however long it was. ``run`` must run
    beside whoever asks ``now``.
    """

    def __init__(self, tick: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.tick = tick
        self._clock = clock
        self._seconds = 0.0
        self._seen = clock()

    def now(self) -> float:
        """Awake seconds since the clock was made."""
        return self._seconds + self._counted(self._clock())

    def look(self) -> None:
        """The event loop came round."""
        now = self._clock()
        self._seconds += self._counted(now)
        self._seen = now

    async def run(self) -> None:
        """Look at every tick, until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(self.tick)

    def _counted(self, now: float) -> float:
        return min(now - self._seen, TICKS_AT_ONCE * self.tick)
