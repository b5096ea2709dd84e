"""Usage that the database did not take before its process was gone, or of whose commit nothing is known."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from adapters.database.database import Database
from adapters.database.rows import MetaRow, UsageRow
from adapters.errors import DatabaseUnavailable
from server.accounts import usage as module
from server.accounts.usage import Usage, UsageWriter
from server.accounts.usage_journal import FOLDER, left_behind
from server.accounts.usage_marks import META_PREFIX
from tests.support.databases import KINDS, opened

ONE = Usage(
    datetime(2026, 5, 1, 12, 0, 0, 7, tzinfo=UTC),
    "acme", "k1", "a", 1, "chat", "completed", "r", prompt_tokens=3, output_tokens=4, seconds=0.5, code="ü\n",
)  # fmt: skip


@pytest.fixture(params=KINDS)
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    async with opened(request.param, tmp_path / "db") as database:
        yield database


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def writer(database: Database, folder: Path) -> UsageWriter:
    return UsageWriter(database, folder, keep_days=10**4, rolls_up=False)


def record(one: UsageWriter, first: int, count: int) -> None:
    for number in range(first, first + count):
        one.record(replace(ONE, request_id=f"r{number}"))


def kill(one: UsageWriter) -> None:
    """As the kernel does: its locks go, its files stay."""
    one._journal.close()


async def recorded(database: Database) -> list[str]:
    async with database.read() as session:
        found = (await session.scalars(select(UsageRow.request_id))).all()
    return sorted(id_ for id_ in found if id_ is not None)


def names(count: int) -> list[str]:
    return sorted(f"r{number}" for number in range(count))


async def marks(database: Database) -> int:
    query = select(func.count()).select_from(MetaRow).where(MetaRow.key.startswith(META_PREFIX))
    async with database.read() as session:
        return await session.scalar(query) or 0


def commits(database: Database, monkeypatch: pytest.MonkeyPatch, *, made: bool) -> None:
    """The next transaction that has done something gets no answer to its commit."""
    real = database.append

    @asynccontextmanager
    async def append() -> AsyncIterator[Any]:
        if made:
            async with real() as session:
                yield session
        else:
            with suppress(ZeroDivisionError):
                async with real() as session:
                    yield session
                    await session.flush()
                    raise ZeroDivisionError  # it is rolled back
        monkeypatch.setattr(database, "append", real)
        raise DatabaseUnavailable("whether the change was made is not known")

    monkeypatch.setattr(database, "append", append)


async def test_the_next_process_writes_what_one_that_was_killed_did_not(
    database: Database, folder: Path
) -> None:
    killed = writer(database, folder)
    record(killed, 0, 5)
    await killed._keep()
    await killed.flush()
    record(killed, 5, 3)
    await killed._keep()
    kill(killed)
    assert await recorded(database) == names(5)
    for _ in range(2):
        await writer(database, folder).adopt()
        assert await recorded(database) == names(8)
    async with database.read() as session:
        row = (await session.scalars(select(UsageRow).where(UsageRow.request_id == "r7"))).one()
    assert Usage(**{name: getattr(row, name) for name in Usage.__slots__}) == replace(ONE, request_id="r7")
    assert list((folder / FOLDER).iterdir()) == []
    assert await marks(database) == 0


async def test_a_running_server_keeps_it_and_leaves_nothing_when_it_ends(
    database: Database, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_INTERVAL_S", 1e4)
    one = writer(database, folder)
    one.start()
    record(one, 0, 3)
    async with asyncio.timeout(120):
        while one._unwritten or not one._journal.size:
            await asyncio.sleep(0.01)
    (file,) = (folder / FOLDER).iterdir()
    assert file.stat().st_mode & 0o777 == 0o600, "it says who asked for what"
    assert file.read_bytes().count(b"\n") == 3
    await one.stop()
    assert await recorded(database) == names(3)
    assert list((folder / FOLDER).iterdir()) == []
    assert await marks(database) == 0


async def test_an_end_while_the_database_is_away_loses_nothing(
    database: Database, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> Any:
        raise DatabaseUnavailable("away")

    one, real = writer(database, folder), database.append
    one.start()
    monkeypatch.setattr(database, "append", away)
    record(one, 0, 3)
    with pytest.raises(DatabaseUnavailable):
        await one.stop()
    await writer(database, folder).adopt()  # says so in the log, and starts
    assert len(list((folder / FOLDER).iterdir())) == 1
    monkeypatch.setattr(database, "append", real)
    await writer(database, folder).adopt()
    assert await recorded(database) == names(3)


@pytest.mark.parametrize("made", [True, False], ids=["made", "not made"])
@pytest.mark.parametrize("killed", [True, False], ids=["killed", "goes on"])
async def test_what_may_be_committed_is_written_once(
    database: Database, folder: Path, monkeypatch: pytest.MonkeyPatch, made: bool, killed: bool
) -> None:
    """Else a customer would be billed twice, or not at all."""
    one = writer(database, folder)
    record(one, 0, 1)
    await one.flush()
    record(one, 1, 3)
    await one._keep()
    commits(database, monkeypatch, made=made)
    with pytest.raises(DatabaseUnavailable):
        await one.flush()
    spent = await one.spent("acme", ONE.at, ONE.at.replace(hour=13))
    assert spent[0] >= 7 * 4, "a budget counts it until it is known"
    record(one, 4, 2)
    await one._keep()
    if killed:
        kill(one)
        await writer(database, folder).adopt()
    else:
        await one.flush()
        assert await one.spent("acme", ONE.at, ONE.at.replace(hour=13)) == (7 * 6, 0)
        await one.stop()
    assert await recorded(database) == names(6)


async def test_the_journal_of_another_process_is_left_alone(database: Database, folder: Path) -> None:
    killed = writer(database, folder)
    record(killed, 0, 2)
    await killed._keep()
    kill(killed)
    (file,) = (folder / FOLDER).iterdir()
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX);"
        "print(1, flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    assert await asyncio.to_thread(other.stdout.readline) == b"1\n"
    live = writer(database, folder)  # and one of this process
    record(live, 2, 1)
    await live._keep()
    await writer(database, folder).adopt()
    assert await recorded(database) == []
    await asyncio.to_thread(other.communicate, b"\n")
    await writer(database, folder).adopt()
    assert await recorded(database) == names(2)
    await live.stop()


async def test_a_line_that_was_cut_costs_no_other(tmp_path: Path, folder: Path) -> None:
    async with opened("sqlite", tmp_path / "db") as database:
        killed = writer(database, folder)
        record(killed, 0, 4)
        await killed._keep()
        kill(killed)
        (file,) = (folder / FOLDER).iterdir()
        os.truncate(file, file.stat().st_size - 9)
        await writer(database, folder).adopt()
        assert await recorded(database) == names(3)


async def test_what_the_database_does_not_take_ends_no_start(tmp_path: Path, folder: Path) -> None:
    async with opened("postgres", tmp_path / "db") as database:
        killed = writer(database, folder)
        killed.record(replace(ONE, tenant="x" * 100))
        await killed._keep()
        kill(killed)
        next_one = writer(database, folder)
        await next_one.adopt()
        record(next_one, 0, 1)
        await next_one.stop()
        assert await recorded(database) == names(1)
        assert len(list((folder / FOLDER).iterdir())) == 1, "for the operator to look at"


async def test_the_journal_stays_small(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under load, and in hours without a database."""
    monkeypatch.setattr(module, "JOURNAL_BYTES", 10_000)
    monkeypatch.setattr(module, "MAX_WAITING", 20)
    async with opened("sqlite", tmp_path / "db") as database:
        one, most = writer(database, folder), 0
        for number in range(300):
            record(one, number, 1)
            await one._keep()
            most = max(most, one._journal.size)
            if number % 10 == 9:
                await one.flush()
        assert most < 20_000
        for number in range(300, 900):
            record(one, number, 1)
            await one._keep()
            most = max(most, one._journal.size)
        assert most < 60_000
        kill(one)
        await writer(database, folder).adopt()
        async with database.read() as session:
            assert await session.scalar(select(func.sum(UsageRow.requests))) == 900


async def test_a_disk_that_fails_stops_nothing_and_is_made_up_for(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fails = os.write, True

    def write(file: int, data: memoryview) -> int:
        if fails and b"acme" in bytes(data):
            real(file, data[:50])
            raise OSError(28, "No space left on device")
        return real(file, data)

    async with opened("sqlite", tmp_path / "db") as database:
        one = writer(database, folder)
        record(one, 0, 2)
        await one._keep()
        monkeypatch.setattr(os, "write", write)
        record(one, 2, 2)
        assert not await one._keep()
        assert not await one._keep()
        await one.flush()
        record(one, 4, 2)
        fails = False
        assert await one._keep()
        kill(one)
        assert [lines for left in left_behind(folder / FOLDER) if (lines := len(left.lines()))] == [2]
        await writer(database, folder).adopt()
        assert await recorded(database) == names(6)


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_happens_each_record_is_written_once(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Writes that fail before and at their commits, made or not, and processes that are killed."""
    monkeypatch.setattr(module, "JOURNAL_BYTES", 2_000)
    rng, number = random.Random(seed), 0
    async with opened("sqlite", tmp_path / "db") as database:
        one = writer(database, folder)
        for _ in range(60):
            match rng.choice(["record", "record", "keep", "flush", "lost", "made", "kill"]):
                case "record":
                    count = rng.randrange(1, 5)
                    record(one, number, count)
                    number += count
                case "keep":
                    await one._keep()
                case "flush":
                    await one.flush()
                case "kill":
                    await one._keep()
                    kill(one)
                    one = writer(database, folder)
                    await one.adopt()
                    assert await recorded(database) == names(number)
                case what:
                    commits(database, monkeypatch, made=what == "made")
                    with suppress(DatabaseUnavailable):
                        await one.flush()
                    monkeypatch.undo()
                    monkeypatch.setattr(module, "JOURNAL_BYTES", 2_000)
        await one.stop()
        assert await recorded(database) == names(number)
