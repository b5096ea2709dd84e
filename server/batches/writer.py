"""Results of a batch on their way to the database: those that come while one write runs are the next one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from adapters.errors import AdapterError
from adapters.store.batches import Result
from adapters.tasks import uninterruptible

logger = logging.getLogger(__name__)

RETRY_S = 2.0


class Writer:
    """``record`` commits results; what it cannot commit now is tried again, and waits here meanwhile."""

    def __init__(self, record: Callable[[Sequence[Result]], Awaitable[bool]]) -> None:
        self._record = record
        self._results: list[Result] = []
        self._written = asyncio.get_running_loop().create_future()
        self._writing: asyncio.Task[None] | None = None

    async def write(self, result: Result) -> None:
        """Returns once ``result`` is on disk, or its batch is gone."""
        self._results.append(result)
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        await asyncio.shield(self._written)

    async def _write(self) -> None:
        while self._results:
            results, written = self._results, self._written
            self._results, self._written = [], asyncio.get_running_loop().create_future()
            await self._commit(results)
            written.set_result(None)
        self._writing = None

    async def _commit(self, results: Sequence[Result]) -> None:
        while True:
            try:
                await self._record(results)
                return
            except AdapterError as exc:
                logger.warning("results of a batch cannot be written: %s", exc)
                await asyncio.sleep(RETRY_S)

    async def close(self) -> None:
        """Writes what is left."""
        if self._writing is not None:
            await uninterruptible(asyncio.wait([self._writing], timeout=RETRY_S))
            self._writing and self._writing.cancel()
