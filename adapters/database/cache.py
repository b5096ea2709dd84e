"""Answers of the database, kept until something is written."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from cachetools import LRUCache

from adapters.database.database import Database
from adapters.errors import DatabaseUnavailable

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class ReadCache(Generic[K, T]):
    """The ``size`` most recently used answers of ``database`` since its last write.

    Sound for this process's writes: an answer is kept only if no write ended while it was read. Writes of
    others are seen as soon as ``Database.watch`` sees them.
    """

    def __init__(self, database: Database, size: int) -> None:
        self._database = database
        self._generation = database.generation
        self._answers: LRUCache[K, T] = LRUCache(maxsize=size)

    def __len__(self) -> int:
        return len(self._answers)

    def forget(self) -> None:
        """Reads everything anew."""
        self._answers.clear()

    async def get(self, key: K, read: Callable[[], Awaitable[T]]) -> T:
        """The answer to ``key``, from ``read`` if it is not known. What ``read`` raises is not kept."""
        generation = self._database.generation
        if self._generation != generation:
            self._answers.clear()
            self._generation = generation
        if key in self._answers:
            return self._answers[key]
        answer = await self._read(read)
        if self._database.generation == generation:
            self._answers[key] = answer
        return answer

    async def _read(self, read: Callable[[], Awaitable[T]]) -> T:
        """Once more where a connection was lost: the next one is new. Not after a silence."""
        try:
            return await read()
        except DatabaseUnavailable as error:
            if isinstance(error.__cause__, TimeoutError):
                raise
            return await read()
