"""What the database keeps of an engine's losses: to each server its own, and nothing that cannot be read."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text

from adapters.database.database import Database
from adapters.database.rows import MetaRow
from adapters.store import suspects
from adapters.store.suspects import GONE_S, KEPT_S, LOSSES_KEY, META_KEY, StoredSuspects
from server.scheduling.evidence import Loss
from tests.support.databases import KINDS, opened

_BLOCKED = text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
)


@pytest.fixture(params=KINDS)
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    async with opened(request.param, tmp_path) as made:
        yield made


def loss(ago: float, *versions: str) -> dict[str, Any]:
    return {"at": time.time() - ago, "ran": {version: [0.5, None] for version in versions}}


async def known_at_start(database: Database, url: str) -> list[dict[str, Any]]:
    """What a server there, started now, has before its own first loss."""
    stored = await StoredSuspects(database, url).open()
    await stored.stop()
    return json.loads(json.dumps(stored.losses))  # type: ignore[no-any-return]


async def lose(database: Database, url: str, *losses: dict[str, Any]) -> None:
    stored = await StoredSuspects(database, url).open()
    stored.note_losses(losses)
    await stored.stop()


async def put(database: Database, key: str, value: str) -> None:
    async with database.write() as session:
        session.add(MetaRow(key=key, value=value))


async def kept(database: Database) -> list[dict[str, Any]]:
    async with database.read() as session:
        value = await session.scalar(select(MetaRow.value).where(MetaRow.key == LOSSES_KEY))
    return json.loads(value or "[]")  # type: ignore[no-any-return]


async def test_a_server_is_told_its_own_losses_and_no_other_servers(database: Database) -> None:
    """Another engine's loss, at which a version did not run, would clear it."""
    mine, theirs, alone = loss(30, "a"), loss(20, "b"), loss(10, "c")
    await lose(database, "http://one", mine)
    await lose(database, "http://two", theirs)
    await lose(database, "", alone)
    assert await known_at_start(database, "http://one") == [mine]
    assert await known_at_start(database, "http://two") == [theirs]
    assert await known_at_start(database, "") == [alone]
    assert await known_at_start(database, "http://new") == []


async def suspected(database: Database, url: str) -> set[str]:
    """Whom a server there, started now, begins with."""
    stored = await StoredSuspects(database, url).open()
    await stored.stop()
    return set(stored.versions)


async def suspect(database: Database, url: str, *versions: str) -> None:
    stored = await StoredSuspects(database, url).open()
    stored.note(versions)
    await stored.stop()


async def test_a_server_is_told_its_own_suspects_and_clears_no_other_servers(database: Database) -> None:
    """What ran when another engine was lost may be there by chance: here it was there for the first time."""
    await suspect(database, "http://one", "a", "b")
    await suspect(database, "http://two", "b")
    assert await suspected(database, "http://new") == set()
    await suspect(database, "http://two")  # it has done its work in peace there
    assert await suspected(database, "http://two") == set()
    assert await suspected(database, "http://one") == {"a", "b"}


async def test_suspects_of_a_server_that_never_comes_back_are_forgotten(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await suspect(database, "http://gone", "a")
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + GONE_S + 1)
    await suspect(database, "http://one", "b")
    assert [one["version"] for one in (await written(database))[META_KEY]] == ["b"]


async def test_suspects_of_a_server_that_lives_are_kept_however_long(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has asked for it since, so it is still not known whether it ends the engine."""
    monkeypatch.setattr(suspects, "RENEW_S", 0.01)
    lives = await StoredSuspects(database, "http://one").open()
    lives.note(["a"])
    while not (await written(database)).get(META_KEY):
        await asyncio.sleep(0.01)
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + GONE_S + 1)
    async with asyncio.timeout(60):
        while (await written(database))[META_KEY][0]["at"] < clock() + GONE_S:
            await asyncio.sleep(0.01)
    await suspect(database, "http://two", "b")
    assert {one["version"] for one in (await written(database))[META_KEY]} == {"a", "b"}
    await lives.stop()


async def test_suspects_of_a_release_that_had_no_owners_are_everybodys_until_one_has_settled_them(
    database: Database,
) -> None:
    """Replicas are upgraded one after the other, and each may be the one whose engine it ends next."""
    await put(database, META_KEY, json.dumps(["a", "b"]))
    for url in ("", "http://one", "http://two"):
        assert await suspected(database, url) == {"a", "b"}
    await suspect(database, "http://one", "b", "c")  # "a" did its work in peace, or is quarantined
    assert await suspected(database, "http://one") == {"b", "c"}
    assert await suspected(database, "http://two") == {"b"}
    await suspect(database, "http://two")
    assert await suspected(database, "http://new") == set()
    assert await suspected(database, "http://one") == {"b", "c"}, "its own by now"


async def test_what_a_release_without_owners_suspects_anew_is_not_taken_for_settled(
    database: Database,
) -> None:
    """One that still runs beside, and writes all of them."""
    await put(database, META_KEY, json.dumps(["a"]))
    mine = await StoredSuspects(database, "http://one").open()
    mine.note([])
    async with asyncio.timeout(60):
        while (await written(database))[META_KEY]:
            await asyncio.sleep(0.01)
    async with database.write() as session:
        (await session.get_one(MetaRow, META_KEY)).value = json.dumps(["a"])
    mine.note(["b"])
    await mine.stop()
    assert await suspected(database, "http://two") == {"a"}


async def test_a_loss_stays_one_when_it_is_told_again_with_its_moment_measured_anew(
    database: Database,
) -> None:
    first, other, second = loss(30, "a"), loss(25, "b"), loss(1, "a")
    await lose(database, "http://one", first)
    await lose(database, "http://two", other)
    again = dict(first, at=first["at"] + 1e-5)
    await lose(database, "http://one", again, second)
    assert await known_at_start(database, "http://one") == [again, second]
    await lose(database, "http://one")
    assert await known_at_start(database, "http://one") == [], "they have their reason"
    assert await known_at_start(database, "http://two") == [other]


async def test_what_nobody_asks_for_any_more_is_dropped_at_the_next_loss(database: Database) -> None:
    await lose(database, "http://gone", loss(KEPT_S + 10, "a"), loss(KEPT_S - 60, "b"))
    await lose(database, "http://one", loss(0, "c"))
    assert sorted(version for one in await kept(database) for version in one["ran"]) == ["b", "c"]


async def test_losses_of_a_release_that_had_no_owners_are_the_only_servers(database: Database) -> None:
    before = loss(5, "a")
    await put(database, LOSSES_KEY, json.dumps([before]))
    assert await known_at_start(database, "") == [before]
    assert await known_at_start(database, "http://one") == []


WRONG = [
    '{"at": 5.0}',
    '{"at": "soon", "ran": {}}',
    '{"at": NaN, "ran": {}}',
    '{"at": 5.0, "ran": ["a"]}',
    '{"at": 5.0, "ran": {"a": [0.5]}}',
    '{"at": 5.0, "ran": {"a": [0.5, null, 1]}}',
    '{"at": 5.0, "ran": {"a": [null, 0.5]}}',
    '{"at": 5.0, "ran": {"a": [-1, null]}}',
    '"a loss"',
    "null",
]


async def test_a_loss_of_another_form_is_dropped_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The plan could not be told of it when the engine is lost, which would then not be started again."""
    good = loss(5, "a")
    async with opened("sqlite", tmp_path) as database:
        await put(database, LOSSES_KEY, f"[{', '.join(WRONG)}, {json.dumps(good)}]")
        known = await known_at_start(database, "")
        assert known == [good]
        assert caplog.text.count("of another form") == len(WRONG)
        assert [Loss.of_json(one).as_json() for one in known] == [good]
        await lose(database, "http://one", good)
        assert len(await kept(database)) == 2


@pytest.mark.parametrize("wrong", ["no JSON", "{}", "null"])
async def test_a_row_of_another_form_does_not_keep_a_server_from_starting(tmp_path: Path, wrong: str) -> None:
    async with opened("sqlite", tmp_path) as database:
        for key in (LOSSES_KEY, META_KEY):
            await put(database, key, wrong)
        assert await known_at_start(database, "") == []
        stored = await StoredSuspects(database, "").open()
        assert stored.versions == frozenset()
        stored.note(["a"])
        await stored.stop()
        assert (await StoredSuspects(database, "").open()).versions == {"a"}


async def written(database: Database) -> dict[str, Any]:
    query = select(MetaRow.key, MetaRow.value).where(MetaRow.key.in_((META_KEY, LOSSES_KEY)))
    async with database.read() as session:
        return {key: json.loads(value) for key, value in await session.execute(query)}


async def blocked(database: Database) -> None:
    """Waits until a statement waits for a row that another transaction has changed."""
    async with asyncio.timeout(60):
        while True:
            async with database.read() as session:
                if await session.scalar(_BLOCKED):
                    return
            await asyncio.sleep(0.02)


async def test_servers_that_lose_their_engines_together_keep_each_others(tmp_path: Path) -> None:
    async with opened("postgres", tmp_path) as mine:
        theirs = Database(mine.url.render_as_string(hide_password=False), timeout=60.0)
        loss = {"at": 4e9, "ran": {"x": [0.5, None]}, "owner": "http://them"}
        suspect = {"version": "x", "at": 4e9, "owner": "http://them"}
        async with mine.write() as session:
            session.add_all([MetaRow(key=META_KEY, value="[]"), MetaRow(key=LOSSES_KEY, value="[]")])
        suspects = await StoredSuspects(mine, "http://me").open()
        async with theirs.write() as session:
            (await session.get_one(MetaRow, META_KEY)).value = json.dumps([suspect])
            (await session.get_one(MetaRow, LOSSES_KEY)).value = json.dumps([loss])
            await session.flush()
            suspects.note(["y"])
            suspects.note_losses([{"at": 4e9, "ran": {}}])
            await blocked(mine)
        async with asyncio.timeout(60):
            while len((found := await written(mine))[META_KEY]) < 2:
                await asyncio.sleep(0.02)
        await suspects.stop()
        await theirs.close()
    me = {"at": 4e9, "ran": {}, "owner": "http://me"}
    assert found[LOSSES_KEY] == [loss, me]
    assert found[META_KEY][0] == suspect
    assert (found[META_KEY][1]["version"], found[META_KEY][1]["owner"]) == ("y", "http://me")
