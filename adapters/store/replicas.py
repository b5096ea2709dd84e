"""The replicas of a fleet, as they announce themselves, and what only one process of a fleet may do.

A row is written by its own replica alone. Times are of the database's clock: those of the machines need not
agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from adapters.database.database import Database
from adapters.database.rows import LeaseRow, ReplicaRow, VersionRow, database_now

# A replica that has not announced itself for so long is lost: it holds no lease and no pins.
SILENT_S = 10.0
IN_MEMORY = ("in_slots", "in_host")  # of a load: keys of versions
LOOKED_UP_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """``state`` is ``ready``, ``verifying``, ``restarting`` or ``draining``.

    ``facts`` and ``load`` are JSON of its own. ``silent_s`` is how many seconds ago it announced itself last.
    """

    id: str
    url: str
    state: str
    started_at: datetime
    beat_at: datetime
    facts: Mapping[str, Any]
    load: Mapping[str, Any]
    silent_s: float

    @property
    def is_lost(self) -> bool:
        """Whether it has been silent for ``SILENT_S``."""
        return self.silent_s > SILENT_S


class Replicas:
    """Rows of ``database`` that no read cache holds: writing them every few seconds empties none."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def all(self) -> list[ReplicaInfo]:
        """Every replica that has announced itself and has not left, by id; also those that are dead."""
        async with self._database.read() as session:
            rows = await session.execute(select(ReplicaRow, database_now()).order_by(ReplicaRow.id))
            return [_info(row, at) for row, at in rows]

    async def names(self, rows: Sequence[ReplicaInfo]) -> dict[str, str]:
        """``tenant/adapter@number`` of what is in memory there, by its key (``Version.key``).

        The newest number where the same files have several; what was deleted has none.
        """
        keys = {key for row in rows for where in IN_MEMORY for key in row.load[where]}
        digests = sorted({key.rpartition("@")[2] for key in keys})
        columns = VersionRow.tenant, VersionRow.adapter, VersionRow.number, VersionRow.digest
        found: dict[str, str] = {}
        async with self._database.read() as session:
            for begin in range(0, len(digests), LOOKED_UP_AT_ONCE):
                some = digests[begin : begin + LOOKED_UP_AT_ONCE]
                query = select(*columns).where(VersionRow.digest.in_(some)).order_by(VersionRow.number)
                for tenant, adapter, number, digest in await session.execute(query):
                    if (key := f"{tenant}/{adapter}@{digest}") in keys:
                        found[key] = f"{tenant}/{adapter}@{number}"
        return found

    async def beat(
        self, id: str, url: str, state: str, facts: Mapping[str, Any], load: Mapping[str, Any]
    ) -> list[str]:
        """Announces the replica, or says that it is still there.

        One that is new takes the place of those at its URL, whose ids are returned: where it listens they
        do not, and one that was killed has not left.
        """
        async with self._database.append() as session:
            at = await _time(session)
            values = {"url": url, "state": state, "beat_at": at, "facts": dict(facts), "load": dict(load)}
            row = await session.get(ReplicaRow, id)
            if row is not None:
                for name, value in values.items():
                    setattr(row, name, value)
                return []
            before = delete(ReplicaRow).where(ReplicaRow.url == url).returning(ReplicaRow.id)
            gone = list(await session.scalars(before))
            session.add(ReplicaRow(id=id, started_at=at, **values))
            return gone

    async def leave(self, id: str) -> None:
        """The replica has stopped."""
        async with self._database.append() as session:
            await session.execute(delete(ReplicaRow).where(ReplicaRow.id == id))

    async def forget(self, silent_for: timedelta) -> None:
        """Removes replicas without a beat for so long: they died without leaving."""
        async with self._database.append() as session:
            before = await _time(session) - silent_for
            await session.execute(delete(ReplicaRow).where(ReplicaRow.beat_at < before))

    async def hold(self, name: str, holder: str, seconds: float) -> bool:
        """Takes or keeps the lease ``name`` for so long; False while another holder has it."""
        try:
            async with self._database.append() as session:
                at = await _time(session)
                free = or_(LeaseRow.holder == holder, LeaseRow.until < at)
                values = {"holder": holder, "until": at + timedelta(seconds=seconds)}
                taken = await session.scalar(
                    update(LeaseRow)
                    .where(LeaseRow.name == name, free)
                    .values(values)
                    .returning(LeaseRow.name)
                )
                if taken is not None:
                    return True
                if await session.scalar(select(LeaseRow.name).where(LeaseRow.name == name)) is not None:
                    return False
                session.add(LeaseRow(name=name, **values))
        except IntegrityError:  # another process was first
            return False
        return True

    async def release(self, holder: str, name: str | None = None) -> None:
        """Gives up the lease ``name`` if ``holder`` has it, or every lease of ``holder``."""
        mine = LeaseRow.holder == holder
        async with self._database.append() as session:
            await session.execute(
                delete(LeaseRow).where(mine if name is None else mine & (LeaseRow.name == name))
            )


async def _time(session: AsyncSession) -> datetime:
    at: datetime | None = await session.scalar(select(database_now()))
    assert at is not None
    return at


def _info(row: ReplicaRow, at: datetime) -> ReplicaInfo:
    silent = max(0.0, (at - row.beat_at).total_seconds())
    return ReplicaInfo(row.id, row.url, row.state, row.started_at, row.beat_at, row.facts, row.load, silent)


def as_json(row: ReplicaInfo, names: Mapping[str, str]) -> dict[str, Any]:
    """As operators see it, with ``Replicas.names``; ``lost`` where it has been silent for ``SILENT_S``."""
    facts = ("base", "fingerprint", "engine", "dtype")
    sizes = ("max_model_len", "max_running", "gpu_slots", "host_slots")
    load = ("running", "queued", "busy_slots")
    return {
        "id": row.id,
        "url": row.url,
        "state": "lost" if row.is_lost else row.state,
        "started_at": row.started_at.isoformat(),
        "beat_at": row.beat_at.isoformat(),
        **{name: row.facts[name] for name in (*facts, *sizes)},
        **{name: row.load[name] for name in load},
        **{name: row.load.get(name) for name in ("backlog_seconds", "pressure")},  # an older one has none
        **{name: sorted(names.get(key, key) for key in row.load[name]) for name in IN_MEMORY},
    }
