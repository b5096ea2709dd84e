"""What was used: recorded once for every request, added up without loss, equal to what clients were told."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import random
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select

from adapters.database.database import Database
from adapters.database.rows import UsageRow
from server.accounts import usage as module
from server.accounts.usage import SUMS, Question, Usage, UsageWriter, added_up, roll_up, usage
from server.app import create_app, drain
from server.errors import Unprocessable
from server.settings import Price, Settings
from tests.service.http.test_api import CHAT_URL, error
from tests.support import tiny
from tests.support.databases import KINDS, opened
from tests.support.fakes import FakeEngine, Times
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site, settings

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
ONE = Usage(
    NOON, "acme", "k1", "a", 1, "chat", "completed", "r", prompt_tokens=3, output_tokens=4, seconds=0.5
)


@pytest.fixture(params=KINDS)
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    async with opened(request.param, tmp_path) as database:
        yield database


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(
        tmp_path,
        FakeEngine(tiny.base(), times=Times(step=0.002)),
        prices={"*": {"input": 0.5, "output": 2}, "base": {"input": 0, "output": 0}},
    ) as site:
        yield site


async def write(database: Database, *records: Usage) -> None:
    usage_writer = UsageWriter(database, keep_days=90)
    for record in records:
        usage_writer.record(record)
    await usage_writer.stop()


def totals(records: list[Usage]) -> dict[str, float]:
    return {name: sum(getattr(record, name) for record in records) for name in SUMS}


# --- adding up --------------------------------------------------------------------------------------

RECORDS = st.lists(
    st.builds(
        replace,
        st.just(ONE),
        at=st.integers(0, 3).map(lambda hours: NOON + timedelta(hours=hours, minutes=7)),
        tenant=st.sampled_from(["acme", "globex"]),
        outcome=st.sampled_from(["completed", "disconnected"]),
        prompt_tokens=st.integers(0, 2**40),
        cost=st.integers(0, 2**50),
    )
)


@given(RECORDS)
def test_adding_up_keeps_every_sum_and_one_record_of_each_origin(records: list[Usage]) -> None:
    added = added_up(records)
    assert totals(added) == totals(records)
    assert len({record.origin() for record in added}) == len(added) == len({r.origin() for r in records})
    assert all((record.request_id is None) == (record.requests > 1) for record in added)


def test_a_price_is_exact() -> None:
    price = Price(input=0.5, output=2, cached=0.125)
    assert price.of(1_000_000, 0, 0) == 500_000_000
    assert price.of(8, 8, 3) == 8 * 125 + 3 * 2000
    assert Price(input=1, output=1).of(5, 5, 0) == 5000


async def test_sums_by_every_group(database: Database) -> None:
    later, other = replace(ONE, at=NOON + timedelta(hours=13)), replace(ONE, tenant="globex", key=None)
    base = replace(ONE, adapter=None, version=None, outcome="disconnected", cost=1_500_000_000)
    await write(database, ONE, later, other, base)
    (everything,) = await usage(database, Question())
    assert everything == {
        "requests": 4, "prompt_tokens": 12, "cached_tokens": 0, "output_tokens": 16, "total_tokens": 28,
        "queue_seconds": 0.0, "first_token_seconds": 0.0, "seconds": 2.0, "cost": 1.5,
        "load_seconds": 0.0,
    }  # fmt: skip

    async def by(*groups: Any, **filters: Any) -> list[tuple[Any, ...]]:
        rows = await usage(database, Question(by=groups, **filters))
        return [(*(row[group] for group in groups), row["requests"]) for row in rows]

    assert await by("tenant") == [("acme", 3), ("globex", 1)]
    assert await by("day") == [("2026-05-01T00:00:00+00:00", 3), ("2026-05-02T00:00:00+00:00", 1)]
    assert await by("hour", tenant="acme") == [
        ("2026-05-01T12:00:00+00:00", 2),
        ("2026-05-02T01:00:00+00:00", 1),
    ]
    assert await by("adapter", "version") == [(None, None, 1), ("a", 1, 3)]
    assert await by("key") == [(None, 1), ("k1", 3)]
    assert await by("endpoint", "outcome", adapter="a") == [("chat", "completed", 3)]
    assert await by("tenant", start=later.at) == [("acme", 1)]
    assert await by("tenant", end=later.at, key="k1") == [("acme", 2)]
    (nothing,) = await usage(database, Question(tenant="nobody"))
    assert nothing["requests"] == 0


async def test_too_many_groups_are_refused(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_GROUPS", 1)
    await write(database, ONE, replace(ONE, tenant="globex"))
    with pytest.raises(Unprocessable, match="more than 1 groups"):
        await usage(database, Question(by=("tenant",)))


async def test_old_days_are_rolled_up_once_and_no_sum_changes(database: Database) -> None:
    rng = random.Random(5)
    records = [
        replace(
            ONE,
            at=NOON + timedelta(hours=rng.randrange(96)),
            tenant=rng.choice(["acme", "globex"]),
            key=rng.choice(["k1", None]),
            request_id=f"r{number}",
            prompt_tokens=rng.randrange(1000),
            cost=rng.randrange(2**40),
        )
        for number in range(300)
    ]
    await write(database, *records)
    questions = [Question(by=("tenant", "key")), Question(by=("day", "tenant"))]
    before = [await usage(database, question) for question in questions]
    while await roll_up(database, NOON + timedelta(days=2)):
        pass
    assert [await usage(database, question) for question in questions] == before
    async with database.read() as session:
        count = await session.scalar(select(func.count()).select_from(UsageRow))
        left = await session.scalar(select(func.min(UsageRow.at)).where(UsageRow.request_id.is_not(None)))
    assert left is not None
    assert left >= NOON.replace(hour=0) + timedelta(days=2), "whole days only, and all of them"
    kept = sum(record.at >= NOON.replace(hour=0) + timedelta(days=2) for record in records)
    assert count == kept + 2 * 2 * 2
    assert not await roll_up(database, NOON + timedelta(days=2))


# --- the writer -------------------------------------------------------------------------------------


async def test_records_are_written_within_a_second_or_so(database: Database) -> None:
    usage_writer = UsageWriter(database, keep_days=10**4)
    usage_writer.start()
    usage_writer.record(ONE)
    async with asyncio.timeout(120):
        while (await usage(database, Question()))[0]["requests"] == 0:
            await asyncio.sleep(0.05)
    usage_writer.record(ONE)
    await usage_writer.stop()
    assert (await usage(database, Question()))[0]["requests"] == 2


async def test_a_record_waits_for_less_than_a_second_even_where_writes_take_long(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come just after a write has begun, and then waits for that one, the pause and its own."""
    working = database.append
    came: dict[str, int] = {}  # how many writes had begun before
    written_by: list[int] = []  # the how-manieth after that has it
    begun = 0
    usage_writer = UsageWriter(database, keep_days=10**4, rolls_up=False)

    @asynccontextmanager
    async def slow() -> AsyncIterator[Any]:
        nonlocal begun
        begun += 1
        mine = begun
        async with working() as session:
            await asyncio.sleep(0.25)
            yield session
        waiting = {record.request_id for record in usage_writer._waiting}
        written_by.extend(mine - came.pop(id_) for id_ in came.keys() - waiting)

    monkeypatch.setattr(database, "append", slow)
    usage_writer.start()
    for number in range(60):
        came[f"r{number}"] = begun
        usage_writer.record(replace(ONE, request_id=f"r{number}"))
        await asyncio.sleep(0.05)
    await usage_writer.stop()
    assert (await usage(database, Question()))[0]["requests"] == len(written_by) == 60
    assert set(written_by) <= {0, 1}, "that one, which takes what comes until it writes, or the next"
    assert module.FLUSH_INTERVAL_S <= 0.25, "between two"


async def test_what_cannot_be_written_waits_added_up_and_nothing_is_lost(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 10)
    usage_writer = UsageWriter(database, keep_days=90)
    working = database.append

    def broken() -> Any:
        raise OSError("no disk")

    monkeypatch.setattr(database, "append", broken)
    for number in range(100):
        usage_writer.record(replace(ONE, request_id=f"r{number}"))
        if number % 7 == 0:
            with pytest.raises(OSError):
                await usage_writer.flush()
    assert len(usage_writer._waiting) <= 11
    monkeypatch.setattr(database, "append", working)
    await usage_writer.flush()
    (row,) = await usage(database, Question())
    assert (row["requests"], row["prompt_tokens"]) == (100, 300)


async def test_a_flush_that_is_cancelled_anywhere_counts_everything_once(database: Database) -> None:
    usage_writer = UsageWriter(database, keep_days=90)
    for turns in range(40):
        usage_writer.record(ONE)
        task = asyncio.create_task(usage_writer.flush())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    await usage_writer.stop()
    assert (await usage(database, Question()))[0]["requests"] == 40


# --- over HTTP --------------------------------------------------------------------------------------


async def test_what_was_spent_has_each_request_once_while_it_is_being_written(database: Database) -> None:
    usage_writer = UsageWriter(database, keep_days=90)
    writes: list[asyncio.Task[None]] = []
    for number in range(1, 31):
        usage_writer.record(replace(ONE, cost=2))
        usage_writer.record(replace(ONE, tenant="globex"))
        usage_writer.record(replace(ONE, requests=0))  # was refused
        writes.append(asyncio.create_task(usage_writer.flush()))
        await asyncio.sleep(random.random() * 0.01)
        assert await usage_writer.spent("acme", NOON, NOON + timedelta(hours=1)) == (7 * number, 2 * number)
    await asyncio.gather(*writes)
    assert await usage_writer.spent("acme", NOON - timedelta(hours=1), NOON) == (0, 0)
    await usage_writer.stop()


def test_usage_is_written_where_a_second_signal_ends_the_server_at_once(tmp_path: Path) -> None:
    """Nobody waits for the lifespan then: with the event loop all tasks are cancelled, those of usage too."""
    fake = FakeEngine(tiny.base())

    async def start(_: Settings) -> FakeEngine:
        return fake

    async def serve() -> None:
        app = create_app(settings(tmp_path), start_engine=start)  # type: ignore[arg-type]
        started = asyncio.Event()

        async def live() -> None:
            async with app.router.lifespan_context(app):
                started.set()
                await asyncio.Event().wait()

        living = asyncio.create_task(live())
        await started.wait()
        app.state.services.usage_writer.record(ONE)
        assert not living.done()

    asyncio.run(serve())
    with closing(sqlite3.connect(tmp_path / "loraplex.db")) as rows:
        assert rows.execute("SELECT request_id, output_tokens FROM usage").fetchall() == [("r", 4)]
    assert fake.stopped


async def test_usage_equals_what_clients_were_told_and_counts_those_who_left(site: Site) -> None:
    keys = {t: await site.tenant(t, {"a": tiny.adapter(1)}) for t in ("acme", "globex", "initech")}
    rng = random.Random(7)
    told: dict[str, tuple[str, int, int]] = {}
    left = 0

    async def ask(number: int) -> None:
        nonlocal left
        tenant = rng.choice(list(keys))
        body: dict[str, Any] = {
            "model": rng.choice(["a", "a", tiny.NAME]),
            "messages": [{"role": "user", "content": "word " * rng.randrange(1, 9)}],
            "max_tokens": rng.randrange(1, 30),
            "n": rng.choice([1, 1, 2]),
        }
        leave_after = rng.choice([999, 999, rng.randrange(1, 20)])
        await asyncio.sleep(number * 0.01)
        if rng.random() < 0.5:
            last = (await site.http.post(CHAT_URL, json=body, headers=bearer(keys[tenant]))).json()
        else:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            async with site.http.stream("POST", CHAT_URL, json=body, headers=bearer(keys[tenant])) as stream:
                async for line in stream.aiter_lines():
                    if line.startswith("data: {"):
                        last = json.loads(line[6:])
                        leave_after -= 1
                    if not leave_after:
                        left += 1
                        return
        said = last["usage"]
        told[last["id"].removeprefix("chatcmpl-")] = tenant, said["prompt_tokens"], said["completion_tokens"]

    await asyncio.gather(*(ask(number) for number in range(150)))
    assert await site.services.dispatcher.wait_until_idle(60)
    assert left > 5
    assert len(told) == 150 - left
    summed = (await site.admin.get("/admin/v1/usage", params={"by": "tenant"})).json()["data"]
    async with site.services.database.read() as session:
        rows = {row.request_id: row for row in await session.scalars(select(UsageRow))}
    assert len(rows) == 150
    for id_, said in told.items():
        assert (rows[id_].tenant, rows[id_].prompt_tokens, rows[id_].output_tokens) == said
        assert rows[id_].outcome == "completed"
    assert all(row.outcome in ("completed", "disconnected") for row in rows.values())
    metrics = (await site.http.get("/metrics")).text
    for total in summed:
        ours = [row for row in rows.values() if row.tenant == total["tenant"]]
        assert total["requests"] == len(ours)
        assert total["output_tokens"] == sum(row.output_tokens for row in ours)
        assert total["total_tokens"] == sum(row.prompt_tokens + row.output_tokens for row in ours)
        name = f'loraplex_output_tokens_total{{tenant="{total["tenant"]}"}}'
        assert f"{name} {float(total['output_tokens'])}" in metrics


async def test_a_row_says_who_what_and_how_long(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    shown = (await site.admin.get("/admin/v1/tenants/acme/keys")).json()["data"][0]
    await site.chat(key, "hi", max_tokens=5)
    await site.chat(key, "hi", model=tiny.NAME, max_tokens=5)
    await site.chat(key, "hi", model="nobody")
    await site.services.usage_writer.flush()
    async with site.services.database.read() as session:
        *rows, refused = await session.scalars(select(UsageRow).order_by(UsageRow.id))
    assert (refused.requests, refused.outcome, refused.code) == (0, "rejected", "model_not_found")
    assert [(row.adapter, row.version, row.cost) for row in rows] == [
        ("a", 1, 2 * 500 + 5 * 2000),
        (None, None, 0),
    ]
    for row in rows:
        assert (row.tenant, row.key, row.endpoint) == ("acme", shown["id"], "chat")
        assert (row.outcome, row.prompt_tokens, row.output_tokens) == ("completed", 2, 5)
        assert 0 <= row.queue_seconds < row.first_token_seconds <= row.seconds < 60
        assert abs((datetime.now(UTC) - row.at).total_seconds()) < 60
        assert row.hour == int(row.at.timestamp() // 3600)


async def test_usage_as_csv(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    await site.chat(key, "hi", max_tokens=5)
    url = "/admin/v1/usage"
    by_format = await site.admin.get(url, params={"by": "tenant,adapter", "format": "csv"})
    by_accept = await site.admin.get(url, params={"by": "tenant,adapter"}, headers={"Accept": "text/csv"})
    assert by_format.text == by_accept.text
    assert by_format.headers["content-type"].startswith("text/csv")
    (row,) = csv.DictReader(io.StringIO(by_format.text))
    assert (row["tenant"], row["adapter"], row["requests"], row["output_tokens"]) == ("acme", "a", "1", "5")
    for more in ({}, {"percentiles": "true"}):
        asked = {"by": "tenant,adapter", "format": "csv", **more}
        some = await site.admin.get(url, params=asked)
        empty = await site.admin.get(url, params={**asked, "tenant": "nobody"})
        assert empty.status_code == 200
        assert (len(some.text.splitlines()), empty.text.splitlines()) == (2, some.text.splitlines()[:1])


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("by=week", "by"),
        ("by=day,day", "by"),
        ("from=yesterday", "query.from"),
        ("format=xml", "query.format"),
    ],
)
async def test_questions_that_have_no_answer(site: Site, query: str, param: str) -> None:
    refused = await site.admin.get(f"/admin/v1/usage?{query}")
    error(refused, 422, "unprocessable" if param == "by" else "invalid_request", param)


async def test_a_drain_writes_what_it_cuts(tmp_path: Path) -> None:
    """What SIGTERM leads to: a stream that goes on is cut, and its tokens are on disk at the end."""
    engine = FakeEngine(tiny.base(), times=Times(step=0.02))
    async with fake_site(tmp_path, engine, drain_timeout=0.2) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 400, "stream": True}
        async with site.http.stream("POST", CHAT_URL, json=body, headers=bearer(key)) as stream:
            await drain(site.app)
            lines = [line async for line in stream.aiter_lines()]
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'loraplex.db'}")
    (row,) = await usage(database, Question(by=("outcome",)))
    await database.close()
    assert row["outcome"] == "cut"
    received = sum('"content": " ' in line for line in lines) + 1
    assert received <= row["output_tokens"] < 400
