"""Judging others by time, in a process that may have stood still itself.

A process is stopped, or gets no processor, for seconds at a time: a suspended virtual machine, a debugger, a
machine with too much to do. It finds its clock far ahead, all its timers due at once, and what others said
meanwhile unread: uvloop calls the timers first. So that nobody is given up for that:

    AwakeTimeout   as ``asyncio.timeout``: for one answer that is awaited
    AwakeClock     a clock for ages: how long somebody has been silent, how fast something comes
    grace          for a callback of ``call_later``: in how long to look once more before it is believed
    stood_still    the same, where only a timer that is far too late is in doubt
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

# A look each so often whether the process still runs; a look that comes later than this says that it did not.
LOOK_S = 0.5
TICKS_AT_ONCE = 2  # what one look may add, in ticks: less is a busy loop, not one that stood still
# Seconds that a timer may be late on a loop that came round.
LATE_S = 1.0
# Seconds in which what came meanwhile is read.
GRACE_S = 1.0
READ_S = 0.05  # the same on a loop that came round: until it has read once


class AwakeTimeout:
    """As ``asyncio.timeout``, in time in which this process ran.

    A process that stood still, as one does whose machine is moved or has too much to do, finds its clock
    far ahead and the answers that came meanwhile unread: by the clock it would give up what needs only to
    be read. A part in which the event loop stood still does not count, unless the one before it did too, or
    a loop that is always late would wait for ever.
    """

    def __init__(self, seconds: float) -> None:
        self._part = min(LOOK_S, seconds / 4)
        self._seconds = self._left = seconds
        self._stood_still = False
        self._limit = asyncio.timeout(None)
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def expired(self) -> bool:
        """Whether it was this limit that raised TimeoutError."""
        return self._limit.expired()

    def restart(self) -> None:
        """All of the time is left again, from about now on: what is awaited has made headway."""
        self._left = self._seconds

    async def __aenter__(self) -> AwakeTimeout:
        await self._limit.__aenter__()
        self._wait()
        return self

    async def __aexit__(self, *raised: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await self._limit.__aexit__(*raised)

    def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        self._due = loop.time() + min(self._part, max(0.0, self._left))
        self._timer = loop.call_at(self._due, self._look)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        late = loop.time() - self._due > self._part
        if not late or self._stood_still:
            self._left -= self._part
        self._stood_still = late and not self._stood_still
        if self._left > 1e-9:
            self._wait()
        else:
            self._timer = None
            self._limit.reschedule(loop.time())


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


def stood_still(loop: asyncio.AbstractEventLoop, timer: asyncio.TimerHandle) -> bool:
    """Whether ``timer``, which has just fired, did so long after it was due."""
    return loop.time() - timer.when() > LATE_S


def grace(loop: asyncio.AbstractEventLoop, timer: asyncio.TimerHandle) -> float:
    """Seconds in which to read before ``timer``, which has just fired, is believed.

    A timer that is hardly late may have become due in the last moment of a long pause.
    """
    return GRACE_S if stood_still(loop, timer) else READ_S
