"""A few beginnings in each turn of the event loop, however many there are.

Thousands of requests that come at the same moment would all take their first step in one turn, for which
every stream waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from weakref import WeakKeyDictionary

AT_ONCE = 16

_of_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, Turns] = WeakKeyDictionary()


class Turns:
    """Calls what it is given at once while that is the exception, else in order, a few in each turn."""

    def __init__(self, loop: asyncio.AbstractEventLoop, at_once: int = AT_ONCE) -> None:
        self._soon, self._at_once = loop.call_soon, at_once
        self._begun = 0  # in this turn
        self._waiting: deque[Callable[[], None]] = deque()

    def begin(self, step: Callable[[], None]) -> None:
        if self._begun == self._at_once:
            self._waiting.append(step)
            return
        if not self._begun:
            self._soon(self._next)
        self._begun += 1
        step()

    def _next(self) -> None:
        self._begun = min(self._at_once, len(self._waiting))
        if self._begun:
            self._soon(self._next)
        for _ in range(self._begun):
            self._waiting.popleft()()


def turns_of(loop: asyncio.AbstractEventLoop) -> Turns:
    """The one of ``loop``."""
    found = _of_loops.get(loop)
    return found if found is not None else _of_loops.setdefault(loop, Turns(loop))
