"""Writers of one process take turns, in the order in which they came."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from adapters.awake import AwakeTimeout

# How long a writer waits while the one before it makes no headway, and how long in all, in seconds.
STUCK_S = 5.0
LONGEST_S = 60.0


class QueueStuck(Exception):
    """The writer whose turn it was has made no headway for ``STUCK_S``: something holds the database."""


class QueueTooLong(Exception):
    """Writers make headway, but so many are before this one that it has waited for ``LONGEST_S``."""


class Turns:
    """One writer at a time, the one that has waited longest first.

    On a busy machine each write may take seconds and ten may wait, without anything being wrong: whoever
    waits is refused where the queue stands still, not because it is long. The same limit on the whole wait
    refused changes on machines that had only much to do. Who writes says ``headway`` after each statement.
    """

    def __init__(self, stuck: float = STUCK_S, longest: float = LONGEST_S) -> None:
        self._stuck, self._longest = stuck, longest
        self._turn = asyncio.Lock()  # wakes in order
        self._waiting: set[AwakeTimeout] = set()

    def __repr__(self) -> str:
        return f"Turns(taken={self._turn.locked()}, waiting={len(self._waiting)})"

    @asynccontextmanager
    async def mine(self) -> AsyncIterator[None]:
        """A turn. Raises QueueStuck and QueueTooLong before it."""
        await self._wait()
        try:
            yield
        finally:
            self._turn.release()

    def headway(self) -> None:
        """The database has answered the writer whose turn it is, and not with an error."""
        for limit in self._waiting:
            limit.restart()

    @asynccontextmanager
    async def last(self) -> AsyncIterator[None]:
        """As ``mine``, however long those before it take."""
        async with self._turn:
            yield

    async def _wait(self) -> None:
        stuck, longest = AwakeTimeout(self._stuck), AwakeTimeout(self._longest)
        self._waiting.add(stuck)
        try:
            async with longest, stuck:
                await self._turn.acquire()
        except TimeoutError as error:
            raise (QueueStuck if stuck.expired() else QueueTooLong)(repr(self)) from error
        finally:
            self._waiting.discard(stuck)
