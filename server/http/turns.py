"""A few beginnings in each turn of the event loop, however many there are, and not strangers first.

Thousands of requests that come at the same moment would all take their first step in one turn, for which
every stream waits. Nor may a customer's request wait until two thousand without a key have had their 401:
whose key was let in before goes first, one of each key at a time; the rest have a place in every turn.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

# Each takes up to a millisecond, and a token takes several turns from the engine to its client.
AT_ONCE = 4
REMEMBERED = 8192  # keys that were let in
_WHO = frozenset({b"authorization", b"x-api-key", b"x-customer-id"})
# What machines ask to know whether this process lives; without a key, and rarely.
_PULSE = frozenset({"/health", "/ready"})

_of_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, Turns] = WeakKeyDictionary()
Step = Callable[[], None]


class Turns:
    """Calls what it is given at once while that is the exception, else a few in each turn."""

    def __init__(self, loop: asyncio.AbstractEventLoop, at_once: int = AT_ONCE) -> None:
        self._soon, self._at_once = loop.call_soon, at_once
        self._begun = 0  # in this turn
        self._known: OrderedDict[int, None] = OrderedDict()
        self._guests: OrderedDict[int, deque[Step]] = OrderedDict()  # of the known, by key
        self._strangers: deque[Step] = deque()
        self._waiting = 0

    def let_in(self, scope: Any) -> None:
        """Whoever makes the request of ``scope`` has a right key, and will be known by it."""
        who = _who(scope)
        self._known[who] = None
        self._known.move_to_end(who)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def begin(self, step: Step, scope: Any) -> None:
        """``step`` begins the request of ``scope``."""
        if self._begun == self._at_once:
            self._waiting += 1
            who = _who(scope)
            if who in self._known or scope["path"] in _PULSE:
                self._guests.setdefault(who, deque()).append(step)
            else:
                self._strangers.append(step)
            return
        if not self._begun:
            self._soon(self._next)
        self._begun += 1
        step()

    def _next(self) -> None:
        self._begun = min(self._at_once, self._waiting)
        if self._begun:
            self._soon(self._next)
        for place in range(self._begun):
            self._waiting -= 1
            last = place == self._begun - 1
            self._take(strangers_first=last)()

    def _take(self, *, strangers_first: bool) -> Step:
        if self._strangers and (strangers_first or not self._guests):
            return self._strangers.popleft()
        who, steps = self._guests.popitem(last=False)
        step = steps.popleft()
        if steps:
            self._guests[who] = steps
        return step


def _who(scope: Any) -> int:
    """A number for who asks, as far as headers say it; the same for all without a key."""
    return hash(tuple(value for name, value in scope["headers"] if name in _WHO))


def turns_of(loop: asyncio.AbstractEventLoop) -> Turns:
    """The one of ``loop``."""
    found = _of_loops.get(loop)
    return found if found is not None else _of_loops.setdefault(loop, Turns(loop))
