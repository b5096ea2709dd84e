"""Which versions are suspected of having ended the engine, beyond the end of the process.

See ``server.scheduling.suspects`` for what follows from that. One row of ``meta`` holds them as a JSON list.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable

from sqlalchemy import select

from adapters.database.database import Database
from adapters.database.rows import MetaRow

logger = logging.getLogger(__name__)

META_KEY = "suspects"
RETRY_S = 2.0
STOP_S = 5.0


class StoredSuspects:
    """``open`` says who they are; from then on ``note`` says so, and a task writes it down."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._mine: frozenset[str] = frozenset()  # as this process has written them
        self._now: frozenset[str] = frozenset()
        self._changed = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None

    async def open(self) -> frozenset[str]:
        """Starts the task that writes them; returns the suspects that the database has."""
        async with self._database.read() as session:
            found = _of(await session.scalar(select(MetaRow.value).where(MetaRow.key == META_KEY)))
        self._mine = self._now = found
        self._writing = asyncio.create_task(self._write_forever(), name="loraplex-suspects")
        return found

    def note(self, versions: Iterable[str]) -> None:
        """Makes these versions, and no others, this process's suspects."""
        self._now = frozenset(versions)
        self._changed.set()

    async def stop(self) -> None:
        """Writes what is not written yet, unless the database keeps it waiting for ``STOP_S`` seconds."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.wait([self._writing])
        try:
            async with asyncio.timeout(STOP_S):
                await self._write()
        except Exception as exc:
            logger.warning("the suspects cannot be written down: %s", exc)

    async def _write_forever(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self._write()
            except Exception as exc:
                logger.warning("the suspects cannot be written down now: %s", exc)
                self._changed.set()
                await asyncio.sleep(RETRY_S)

    async def _write(self) -> None:
        """Servers that share a database keep each other's."""
        now = self._now
        if now == self._mine:
            return
        async with self._database.write() as session:
            row = await session.get(MetaRow, META_KEY, with_for_update=True)
            if row is None:
                row = MetaRow(key=META_KEY, value="[]")
                session.add(row)
            row.value = json.dumps(sorted(_of(row.value) - self._mine | now))
        self._mine = now


def _of(value: str | None) -> frozenset[str]:
    return frozenset(json.loads(value)) if value else frozenset()
