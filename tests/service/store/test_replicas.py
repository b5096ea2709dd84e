"""The rows of a fleet's replicas and leases, where the machines' clocks do not agree."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import pytest

from adapters.database.database import Database
from adapters.database.rows import LeaseRow, ReplicaRow, VersionRow, now
from adapters.store import replicas
from adapters.store.replicas import SILENT_S, Replicas
from tests.service.store.test_migrations import adapter_row, tenant_row
from tests.support.databases import KINDS, opened


@pytest.fixture(params=KINDS)
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    async with opened(request.param, tmp_path) as made:
        yield made


def clock_is(monkeypatch: pytest.MonkeyPatch, off: float) -> None:
    """The machine's clock is so many seconds ahead from now on."""

    class Off(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(seconds=off)

    monkeypatch.setattr("adapters.database.rows.datetime", Off)
    assert abs((now() - datetime.now(UTC)).total_seconds() - off) < 1


@pytest.mark.parametrize("off", [-60.0, 60.0])
async def test_clocks_a_minute_apart(database: Database, monkeypatch: pytest.MonkeyPatch, off: float) -> None:
    rows = Replicas(database)
    clock_is(monkeypatch, off)
    await rows.beat("theirs", "http://theirs", "ready", {}, {})
    assert await rows.hold("chores", "theirs", 15.0)
    monkeypatch.undo()
    (theirs,) = await rows.all()
    assert not theirs.is_lost
    assert theirs.silent_s < 5
    assert not await rows.hold("chores", "ours", 15.0), "it is theirs for 15 s"
    await rows.forget(timedelta(seconds=30))
    assert await rows.all()


async def test_who_is_silent_is_lost_and_loses_what_it_held(database: Database) -> None:
    rows = Replicas(database)
    await rows.beat("theirs", "http://theirs", "ready", {}, {})
    assert await rows.hold("chores", "theirs", 15.0)
    async with database.append() as session:
        (await session.get_one(ReplicaRow, "theirs")).beat_at -= timedelta(seconds=SILENT_S + 1)
        (await session.get_one(LeaseRow, "chores")).until -= timedelta(seconds=16)
    (theirs,) = await rows.all()
    assert theirs.is_lost
    assert await rows.hold("chores", "ours", 15.0)
    assert not await rows.hold("chores", "theirs", 15.0)
    await rows.forget(timedelta(seconds=5))
    assert not await rows.all()


async def test_what_is_in_memory_is_named_by_version(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "LOOKED_UP_AT_ONCE", 2)
    async with database.write() as session:
        session.add(tenant_row("acme"))
        await session.flush()
        session.add(adapter_row("a", is_default=True))
        await session.flush()
        for number, digest in enumerate(("d1", "d2", "d1", "d3"), 1):
            about = {"digest": digest, "rank": 1, "size_bytes": 1, "report": {}, "created_at": now()}
            session.add(VersionRow(tenant="acme", adapter="a", number=number, **about))
    rows = Replicas(database)
    load = {"in_slots": ["acme/a@d1"], "in_host": ["acme/a@d1", "acme/a@d3", "acme/a@gone", "globex/a@d2"]}
    await rows.beat("one", "http://here", "ready", {}, load)
    assert await rows.names(await rows.all()) == {"acme/a@d1": "acme/a@3", "acme/a@d3": "acme/a@4"}


async def test_a_new_replica_takes_the_place_of_the_one_at_its_url(database: Database) -> None:
    rows = Replicas(database)
    assert await rows.beat("killed", "http://here", "ready", {}, {}) == []
    assert await rows.beat("other", "http://there", "ready", {}, {}) == []
    assert await rows.beat("again", "http://here", "ready", {}, {}) == ["killed"]
    assert await rows.beat("again", "http://here", "ready", {}, {}) == []
    assert [row.id for row in await rows.all()] == ["again", "other"]
