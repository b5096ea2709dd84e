"""Files of usage, and their marks, that are not as a process in good health leaves them."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Never

import pytest
from sqlalchemy import event

from adapters.database.database import Database
from adapters.database.rows import MetaRow, now
from adapters.errors import DatabaseUnavailable
from server.accounts import usage as module
from server.accounts import usage_marks
from server.accounts.usage_journal import FOLDER, left_behind
from tests.service.accounts.test_usage_journal import (
    ONE,
    commits,
    kill,
    marks,
    names,
    record,
    recorded,
    writer,
)
from tests.support.databases import KINDS, opened

LOCKED = (
    "import fcntl, sys; file = open(sys.argv[1], 'a')\n"
    "try: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
    "except BlockingIOError: print('locked')\n"
    "else: print('free')"
)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    async with opened("sqlite", tmp_path / "db") as database:
        yield database


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


async def left(database: Database, folder: Path, first: int, count: int) -> Path:
    """The file of a process that was killed over so many records."""
    before = set((folder / FOLDER).glob("*"))
    killed = writer(database, folder)
    record(killed, first, count)
    assert await killed._keep()
    kill(killed)
    (file,) = set((folder / FOLDER).iterdir()) - before
    return file


def fails(*_: Any, **__: Any) -> Never:
    raise OSError(errno.EROFS, "Read-only file system")


async def test_a_file_that_cannot_be_removed_keeps_its_mark(
    database: Database, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the next start would write all of it again."""
    one = writer(database, folder)
    record(one, 0, 3)
    await one._keep()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fails)
        await one.stop()
        assert await marks(database) == 1
        await writer(database, folder).adopt()
        assert await marks(database) == 1
    await writer(database, folder).adopt()
    assert await recorded(database) == names(3)
    assert await marks(database) == 0
    assert list((folder / FOLDER).iterdir()) == []


@pytest.mark.parametrize("adopts", [True, False], ids=["adopted", "own"])
async def test_a_mark_goes_after_the_disk_has_that_its_file_is_gone(
    database: Database, folder: Path, monkeypatch: pytest.MonkeyPatch, adopts: bool
) -> None:
    one, real, at = writer(database, folder), os.fsync, []
    record(one, 0, 3)
    await one._keep()

    def fsync(file: int) -> None:
        at.append(Path(os.readlink(f"/proc/self/fd/{file}")))
        real(file)

    async def forget(*_: Any) -> None:
        at.append(Path("forget"))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(usage_marks, "forget", forget)
    if adopts:
        kill(one)
        await writer(database, folder).adopt()
    else:
        await one.stop()
    assert at[-2:] == [folder / FOLDER, Path("forget")]


async def test_what_takes_a_journals_place_is_on_disk_before(
    database: Database, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, sync, move = writer(database, folder), os.fsync, Path.replace
    synced: list[int] = []
    moved: list[bool] = []

    def fsync(file: int) -> None:
        sync(file)
        synced.append(os.fstat(file).st_ino)

    def replaced(path: Path, target: Path) -> Path:
        moved.append(path.stat().st_ino in synced)
        return move(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replaced)
    record(one, 0, 3)
    await one._keep()
    one._most = -1
    await one._keep()
    assert moved == [True, True]
    await one.stop()


async def test_a_file_stays_locked_while_it_is_read(database: Database, folder: Path) -> None:
    """Or two processes that start on one folder both write it."""
    file = await left(database, folder, 0, 3)
    (one,) = left_behind(folder / FOLDER)
    assert len(one.lines()) == 3
    command = [sys.executable, "-c", LOCKED, str(file)]
    asked = await asyncio.to_thread(subprocess.run, command, stdout=subprocess.PIPE, text=True, check=True)
    assert asked.stdout == "locked\n"
    assert len(one.lines()) == 3
    one.close()


async def test_a_file_with_a_damaged_line_is_kept(
    database: Database, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = await left(database, folder, 0, 4)
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = b"\0" * (len(lines[1]) - 1) + b"\n"
    file.write_bytes(b"".join(lines))
    for _ in range(2):
        await writer(database, folder).adopt()
        assert await recorded(database) == ["r0", "r2", "r3"]
    aside = file.with_suffix(".damaged")
    assert aside.read_bytes() == b"".join(lines)
    assert list((folder / FOLDER).iterdir()) == [aside]
    assert f"1 lines are no records of usage; they are in {aside}" in caplog.text
    assert await marks(database) == 0


@pytest.mark.parametrize("lost", [b"\0", b'{"7 {\xff'], ids=["zeros", "like-a-beginning"])
async def test_what_lies_behind_damage_in_the_middle_of_a_file_is_written(
    database: Database, folder: Path, lost: bytes
) -> None:
    """A block that the disk lost ends in the middle of a line, and has taken the ends of those within."""
    file = await left(database, folder, 0, 6)
    whole = file.read_bytes()
    ends = [at for at, byte in enumerate(whole) if byte == ord("\n")]
    begin, end = ends[0] + 20, ends[2]  # the second line from its middle, and the third with its end
    block = (lost * (end - begin + 1))[: end + 1 - begin]
    file.write_bytes(whole[:begin] + block + whole[end + 1 :])
    writing = writer(database, folder)
    assert writing.set_aside() == 0
    await writing.adopt()
    assert await recorded(database) == ["r0", "r3", "r4", "r5"]
    assert writing.set_aside() == 1
    await writing.adopt()
    assert await recorded(database) == ["r0", "r3", "r4", "r5"], "once each"


@pytest.mark.parametrize("line", [1, 2], ids=["middle", "end"])
async def test_digits_before_a_turn_behind_damage_do_not_make_it_another(
    database: Database, folder: Path, line: int
) -> None:
    """By a later turn, what the database has already would be written again."""
    file = await left(database, folder, 0, 3)
    lines = file.read_bytes().splitlines(keepends=True)
    lines[line] = b'1 {"tokens":20' + lines[line]
    file.write_bytes(b"".join(lines))
    (one,) = left_behind(folder / FOLDER)
    assert [turn for turn, _ in one.lines()] == [1, 1]
    one.remove()
    one.close()
    assert list((folder / FOLDER).iterdir()) == [file.with_suffix(".damaged")]


async def test_files_that_cannot_be_opened_end_no_start(
    database: Database, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = await left(database, folder, 0, 3)
    (folder / FOLDER / "0.jsonl").mkdir()
    private, real = folder / FOLDER / "1.jsonl", os.open
    private.touch()

    def opens(path: Any, *args: Any, **options: Any) -> int:
        if path == private:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", opens)
    await writer(database, folder).adopt()
    assert await recorded(database) == names(3)
    assert not file.exists()
    for name in ("0.jsonl", "1.jsonl"):
        assert f"left in {folder / FOLDER / name} cannot be read" in caplog.text


async def test_a_folder_that_cannot_be_looked_into_ends_no_start(
    database: Database, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / FOLDER).touch()
    await writer(database, folder).adopt()
    assert "cannot be looked for" in caplog.text


async def test_a_file_that_was_being_written_anew_goes(database: Database, folder: Path) -> None:
    file = await left(database, folder, 0, 3)
    gone = file.rename(file.with_suffix(".partial"))
    live = writer(database, folder)
    record(live, 0, 1)
    await live._keep()
    own = live._journal._path.with_suffix(".partial")
    own.touch()  # another thread is at it
    await writer(database, folder).adopt()
    assert not gone.exists()
    assert own.exists()
    assert await recorded(database) == []
    await live.stop()


async def test_an_error_in_the_journal_ends_neither_it_nor_what_it_is_for(
    database: Database, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(_: Any) -> Never:
        raise KeyError(0)

    one = writer(database, folder)
    monkeypatch.setattr(one._journal, "rewrite", wrong)
    record(one, 0, 3)
    assert not await one._keep()
    assert "KeyError" in caplog.text
    monkeypatch.undo()
    assert await one._keep(), "all of it is due again"
    assert one._journal.size
    monkeypatch.setattr(one._journal, "append", wrong)
    record(one, 3, 2)
    await one.stop()
    assert await recorded(database) == names(5)


async def test_much_that_was_left_is_written_in_parts(
    database: Database, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 4)
    parts: list[int] = []
    await left(database, folder, 0, 10)

    def executed(_c: Any, _cursor: Any, statement: str, parameters: Any, _x: Any, many: bool) -> None:
        if statement.startswith("INSERT INTO usage"):
            parts.append(len(parameters) if many else 1)

    event.listen(database._engine.sync_engine, "before_cursor_execute", executed)
    await writer(database, folder).adopt()
    assert parts == [4, 4, 2]
    assert await recorded(database) == names(10)


async def test_what_the_database_did_not_take_at_the_start_is_written_later(
    database: Database, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> Never:
        raise DatabaseUnavailable("away")

    monkeypatch.setattr(module, "ADOPT_AGAIN_S", 0.01)
    file = await left(database, folder, 0, 3)
    one = writer(database, folder)
    with monkeypatch.context() as patch:
        patch.setattr(database, "append", away)
        await one.adopt()
        one.start()
    async with asyncio.timeout(120):
        while file.exists():
            await asyncio.sleep(0.01)
    await one.stop()
    assert await recorded(database) == names(3)
    assert await marks(database) == 0


async def test_commits_that_fail_hold_no_more_than_others(
    database: Database, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 20)
    one = writer(database, folder)
    for first in range(0, 100, 10):
        record(one, first, 10)
        commits(database, monkeypatch, made=False)
        with pytest.raises(DatabaseUnavailable):
            await one.flush()
        assert one._count <= 30
    assert one._count == len(one._taken.records if one._taken else ()) > 0
    await one.stop()
    assert await module.spent(database, "acme", ONE.at, ONE.at.replace(hour=13)) == (700, 0)


async def test_the_log_counts_what_is_on_its_way(
    database: Database, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = writer(database, folder)
    record(one, 0, 3)
    commits(database, monkeypatch, made=False)
    one.start()
    async with asyncio.timeout(120):
        while "could not be written" not in caplog.text:
            await asyncio.sleep(0.01)
    await one.stop()
    assert "3 records wait" in caplog.text
    assert await recorded(database) == names(3)


@pytest.mark.parametrize("kind", KINDS)
async def test_marks_of_lost_journals_go_after_months(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    async with opened(kind, tmp_path / "db") as database:
        lost, idle, later = writer(database, folder), writer(database, folder), writer(database, folder)
        past = now() - timedelta(days=usage_marks.MARK_DAYS + 1)
        with monkeypatch.context() as patch:
            patch.setattr(usage_marks, "now", lambda: past)
            for one in (lost, idle):
                record(one, 0, 1)
                await one.flush()
        async with database.append() as session:
            session.add(MetaRow(key=f"{usage_marks.META_PREFIX}old", value="7"))
            session.add(MetaRow(key="usage_", value="no mark"))
        record(later, 1, 1)
        await later.flush()
        await idle.renew_mark()
        await later.roll_up()
        assert await marks(database) == 3
        async with database.append() as session:
            assert await usage_marks.written(session, "old") == 7, "one without a time"
            assert await usage_marks.written(session, idle._journal.id) == 1
            assert await usage_marks.written(session, lost._journal.id) == 0


async def test_a_file_that_may_have_outlived_its_mark_is_kept_and_not_written(
    database: Database, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be written already."""
    file = await left(database, folder, 0, 3)
    past = (now() - timedelta(days=usage_marks.MARK_DAYS + 1)).timestamp()
    os.utime(file, (past, past))
    await writer(database, folder).adopt()
    assert await recorded(database) == []
    assert list((folder / FOLDER).iterdir()) == [file.with_suffix(".damaged")]
    assert "whether it is in the database is not known" in caplog.text
    assert await marks(database) == 0


async def test_an_old_file_whose_mark_is_there_is_written(database: Database, folder: Path) -> None:
    killed = writer(database, folder)
    record(killed, 0, 1)
    await killed.flush()
    killed.record(replace(ONE, request_id="r1"))
    await killed._keep()
    kill(killed)
    (file,) = (folder / FOLDER).iterdir()
    os.utime(file, (0, 0))
    await writer(database, folder).adopt()
    assert await recorded(database) == names(2)
