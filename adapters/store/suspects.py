"""Which versions are suspected of having ended the engine, and its last losses, beyond a process's end.

See ``server.scheduling.suspects`` and ``evidence`` for what follows from that. A row of ``meta`` each has
them, as a JSON list. A loss is of one server's engine, and says nothing of what ran in others: it has an
``owner``, as the suspects that it makes have, and they are told to that one only. Suspects that a release
without owners left are everybody's until one server has settled them, as in an upgrade of one replica after
the other.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from adapters.database.database import Database
from adapters.database.rows import MetaRow

logger = logging.getLogger(__name__)

META_KEY = "suspects"
LOSSES_KEY = "losses"
KEPT_S = 3600.0  # a loss; longer than anything asks for it
GONE_S = 86400.0  # another server's suspects are kept for so long: it may never come back
RENEW_S = GONE_S / 4
RETRY_S = 2.0
STOP_S = 5.0

T = TypeVar("T")
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class KeptLoss(BaseModel):
    """What ``server.scheduling.evidence.Loss`` makes JSON of, and whose it is; see ``StoredSuspects``."""

    model_config = ConfigDict(extra="allow")

    at: FiniteFloat
    ran: dict[str, tuple[Share, Share | None]]
    owner: str = ""


def _named(row: object) -> object:
    """As releases before this one wrote them, which had no owners."""
    return {"version": row, "at": time.time(), "owner": None} if isinstance(row, str) else row


class KeptSuspect(BaseModel):
    """A version, when its server last said that it suspects it, and which server that is; None: all are."""

    version: str
    at: FiniteFloat
    owner: str | None = ""


SUSPECT: TypeAdapter[KeptSuspect] = TypeAdapter(Annotated[KeptSuspect, BeforeValidator(_named)])
LOSS = TypeAdapter(KeptLoss)


class StoredSuspects:
    """``versions`` are those of ``owner`` once it is open; then ``note`` says so, and a task writes it down.

    ``losses`` are those of ``owner`` that the database had, as ``note_losses`` was told them: objects of JSON
    with a moment ``at``, in seconds of ``time.time()``. ``owner`` is the same after a restart: the URL of a
    replica, "" for a server that has the database alone.
    """

    def __init__(self, database: Database, owner: str) -> None:
        self.versions: frozenset[str] = frozenset()
        self.losses: list[dict[str, Any]] = []
        self._database = database
        self._owner = owner
        self._mine: frozenset[str] = frozenset()  # as this process has written them
        self._everybodys: frozenset[str] = frozenset()  # at the start, and not settled here since
        self._now: frozenset[str] = frozenset()
        self._my_losses: list[dict[str, Any]] = []
        self._losses_now: list[dict[str, Any]] = []
        self._changed = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None

    async def open(self) -> Self:
        """Reads what the database has, and starts the task that writes it."""
        async with self._database.read() as session:
            suspects = await _value(session, META_KEY, SUSPECT)
            losses = await _value(session, LOSSES_KEY, LOSS)
        mine = [one for one in losses if one.owner == self._owner]
        self.losses = [one.model_dump(include={"at", "ran"}) for one in mine]
        self._everybodys = frozenset(one.version for one in suspects if one.owner is None)
        found = self._everybodys | {one.version for one in suspects if one.owner == self._owner}
        self.versions = self._mine = self._now = found
        self._my_losses = self._losses_now = self.losses
        self._writing = asyncio.create_task(self._write_forever(), name="loraplex-suspects")
        return self

    def note(self, versions: Iterable[str]) -> None:
        """Makes these versions, and no others, this process's suspects."""
        self._now = frozenset(versions)
        self._changed.set()

    def note_losses(self, losses: Sequence[dict[str, Any]]) -> None:
        """Makes these, and no others, the losses that this process knows."""
        self._losses_now = list(losses)
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
            try:
                async with asyncio.timeout(RENEW_S):
                    await self._changed.wait()
            except TimeoutError:
                self._mine = frozenset()  # written anew: those of a server that lives do not age
            self._changed.clear()
            try:
                await self._write()
            except Exception as exc:
                logger.warning("the suspects cannot be written down now: %s", exc)
                self._changed.set()
                await asyncio.sleep(RETRY_S)

    async def _write(self) -> None:
        """Servers that share a database keep each other's."""
        now, losses = self._now, self._losses_now
        settled = self._everybodys - now
        if now == self._mine and losses == self._my_losses:
            return
        async with self._database.write() as session:
            if now != self._mine:
                there = await _value(session, META_KEY, SUSPECT, lock=True)
                recent = [one for one in there if one.at > time.time() - GONE_S]
                kept = [one for one in recent if one.owner != self._owner]
                kept = [one for one in kept if one.owner is not None or one.version not in settled]
                for version in sorted(now):
                    kept.append(KeptSuspect(version=version, at=time.time(), owner=self._owner))
                await _put(session, META_KEY, [one.model_dump() for one in kept])
            if losses != self._my_losses:
                found = await _value(session, LOSSES_KEY, LOSS, lock=True)
                young = [one for one in found if one.at > time.time() - KEPT_S]
                others = [one.model_dump() for one in young if one.owner != self._owner]
                mine = [dict(one, owner=self._owner) for one in losses]
                await _put(session, LOSSES_KEY, others + mine)
        self._mine, self._my_losses = now, losses
        self._everybodys -= settled


async def _value(session: AsyncSession, key: str, form: TypeAdapter[T], *, lock: bool = False) -> list[T]:
    """Without what is of another form, as another release or a person may have left it.

    ``lock``: of what is to be changed, since another server may change it in this moment.
    """
    query = select(MetaRow.value).where(MetaRow.key == key)
    value = await session.scalar(query.with_for_update() if lock else query)
    try:
        rows = json.loads(value or "[]")
        if not isinstance(rows, list):
            raise ValueError(f"not a list: {type(rows).__name__}")
    except ValueError as exc:
        logger.warning("the %s in the database are of another form, and left out: %s", key, exc)
        return []
    found = []
    for row in rows:
        try:
            found.append(form.validate_python(row))
        except ValidationError as exc:
            logger.warning("one of the %s in the database is of another form, and left out: %s", key, exc)
    return found


async def _put(session: AsyncSession, key: str, value: list[Any]) -> None:
    row = await session.get(MetaRow, key)
    if row is None:
        session.add(MetaRow(key=key, value=json.dumps(value)))
    else:
        row.value = json.dumps(value)
