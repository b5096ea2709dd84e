"""Timers that fire after the process stood still: for what came meanwhile nobody has looked yet.

A process that was stopped, or whose machine was, finds all its timers due at once, and uvloop calls them
before it reads what has come. Whoever is judged by such a timer is judged after the reading.
"""

from __future__ import annotations

import asyncio

# Seconds that a timer may be late on a loop that came round.
LATE_S = 1.0
# Seconds in which what came meanwhile is read.
GRACE_S = 1.0


def stood_still(loop: asyncio.AbstractEventLoop, timer: asyncio.TimerHandle) -> bool:
    """Whether ``timer``, which has just fired, did so long after it was due."""
    return loop.time() - timer.when() > LATE_S
