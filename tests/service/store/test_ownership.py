"""One process owns a data folder, and no start with a wrong database touches an adapter."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, nullcontext
from pathlib import Path
from typing import NoReturn

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from adapters.database import audit
from adapters.database.database import MIGRATIONS
from adapters.database.glance import glance
from adapters.database.urls import checked_url
from adapters.errors import StorageFailed
from adapters.store.blobs import BlobStore
from adapters.store.ownership import (
    INSTALLATION_FILE,
    LOCK_FILE,
    META_KEY,
    FolderInUse,
    FolderLock,
    Ownership,
    WrongDatabase,
)
from server.app import create_app
from server.cli import data
from server.settings import Settings
from tests.support import tiny
from tests.support.databases import KINDS, empty, opened
from tests.support.tiny import fake_site, settings

DB = "loraplex.db"


def blobs_in(folder: Path) -> set[str]:
    return {path.name for path in (folder / "blobs").iterdir()}


def grow_old(folder: Path) -> None:
    """Lets all blobs be old enough for the sweep."""
    for path in (folder / "blobs").iterdir():
        os.utime(path, times=(0, time.time() - 90_000))


def set_aside(folder: Path, name: str = DB) -> Path:
    """Copies the database out of the folder, whole."""
    copy = folder.parent / f"{folder.name}-{name}"
    with sqlite3.connect(folder / DB) as source, sqlite3.connect(copy) as target:
        source.backup(target)
    return copy


def put_back(copy: Path, folder: Path) -> None:
    for path in folder.glob(f"{DB}*"):
        path.unlink()
    shutil.copyfile(copy, folder / DB)


async def filled(folder: Path) -> set[str]:
    """Two adapters of one tenant; their blobs are old."""
    async with fake_site(folder) as site:
        await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2)})
    grow_old(folder)
    return blobs_in(folder)


async def refused(folder: Path, **changes: object) -> None:
    """A start on ``folder`` fails before the engine."""

    async def start(_: Settings) -> NoReturn:
        raise AssertionError("the engine was started")

    app = create_app(settings(folder, **changes), start_engine=start)
    with pytest.raises((ValueError, OSError, StorageFailed)):
        async with app.router.lifespan_context(app):
            pass


async def test_a_new_empty_database_is_refused_and_deletes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data"
    before = await filled(folder)
    url = f"sqlite+aiosqlite:///{tmp_path / 'other.db'}"
    await refused(folder, database_url=url)
    assert "the database is not the one" in caplog.text
    assert "it is a new one" in caplog.text
    assert "loraplex adopt" in caplog.text
    assert blobs_in(folder) == before
    async with fake_site(folder) as site:
        assert len((await site.admin.get("/admin/v1/tenants/acme/adapters")).json()["data"]) == 2


async def test_a_database_of_another_installation_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    before = await filled(one)
    await filled(other)
    await refused(one, database_url=f"sqlite+aiosqlite:///{other / DB}")
    assert "the folder's is" in caplog.text
    assert blobs_in(one) == before


async def test_an_older_database_is_refused_until_it_is_adopted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data"
    await filled(folder)
    copy = set_aside(folder)
    async with fake_site(folder) as site:
        assert (await site.upload("acme", "c", tiny.adapter(3))).status_code == 201
    grow_old(folder)
    before = blobs_in(folder)
    assert len(before) == 3
    put_back(copy, folder)
    await refused(folder)
    assert "the database is older" in caplog.text
    assert blobs_in(folder) == before

    assert await asyncio.to_thread(data.adopt, settings(folder)) == 0
    for _ in range(2):
        async with fake_site(folder) as site:
            shown = (await site.admin.get("/admin/v1/tenants/acme/adapters")).json()["data"]
            assert [adapter["name"] for adapter in shown] == ["a", "b"]
        grow_old(folder)
        assert blobs_in(folder) == before, "what had no row when it was adopted stays"


async def test_the_same_database_from_a_copy_is_the_right_one(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    await filled(folder)
    put_back(set_aside(folder), folder)
    async with fake_site(folder):
        pass


async def test_an_installation_from_before_ids_is_joined(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    before = await filled(folder)
    forget(folder)
    orphan = folder / "blobs" / ("0" * 64)
    orphan.mkdir()
    grow_old(folder)
    async with fake_site(folder):
        pass
    assert blobs_in(folder) == before | {orphan.name}, "nothing goes on the day of the upgrade"
    mark = json.loads((folder / INSTALLATION_FILE).read_bytes())
    assert mark["kept"] == [orphan.name]
    assert mark["audit"] > 0


async def test_an_installation_from_before_ids_with_another_database_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data"
    before = await filled(folder)
    forget(folder)
    await refused(folder, database_url=f"sqlite+aiosqlite:///{tmp_path / 'other.db'}")
    assert "the database has none on record" in caplog.text
    assert blobs_in(folder) == before


async def test_a_folder_without_the_databases_files_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, empty = tmp_path / "data", tmp_path / "empty"
    await filled(folder)
    await refused(empty, database_url=f"sqlite+aiosqlite:///{folder / DB}")
    assert "none of them is in the data folder" in caplog.text


async def test_a_new_folder_is_refused_by_a_database_in_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two servers would run each batch twice. What has never been used may be joined to any folder."""
    folder, other = tmp_path / "data", tmp_path / "other"
    url = f"sqlite+aiosqlite:///{folder / DB}"
    async with fake_site(folder):
        pass
    async with fake_site(tmp_path / "third", database_url=url) as site:
        await site.admin.post("/admin/v1/tenants", json={"id": "acme"})
    await refused(other, database_url=url)
    assert "belongs to another data folder" in caplog.text
    assert not (other / INSTALLATION_FILE).exists()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite+aiosqlite:///{folder}", "Is a directory"),
        ("sqlite+aiosqlite:////dev/null", "Not an ordinary file"),
        ("sqlite+aiosqlite:///{folder}/file/x.db", "File exists"),
        ("postgresql+asyncpg://me:secret@127.0.0.1:9/db", "Connect call failed"),
    ],
)
async def test_a_database_that_cannot_be_used_is_named_with_the_cause(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, url: str, says: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").touch()
    named = url.format(folder=folder)
    await refused(tmp_path / "data", database_url=named)
    (said,) = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert named.replace("secret", "***") in said.getMessage()
    assert says in said.getMessage()
    assert not said.exc_info


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("loraplex.db secret", "LORAPLEX_DATABASE_URL"),
        ("postgresql://me:secret@host:port/db", "LORAPLEX_DATABASE_URL"),
        ("postgresql://me:secret@127.0.0.1:9/db?poolsize=5&ssl=require", "has poolsize behind the question"),
        ("mysql://me:secret@host/db", "not mysql"),
    ],
)
async def test_a_url_that_is_none_is_said_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, url: str, says: str
) -> None:
    await refused(tmp_path / "data", database_url=url)
    (said,) = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert says in said.getMessage()
    assert "secret" not in said.getMessage()
    assert not said.exc_info


def test_sslmode_is_the_drivers_ssl() -> None:
    url = checked_url("postgres://me@host/db?sslmode=require")
    assert (url.drivername, dict(url.query)) == ("postgresql+asyncpg", {"ssl": "require"})


@pytest.mark.parametrize("table", ["users", "tenants"])
async def test_another_programs_database_is_left_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, table: str
) -> None:
    file = tmp_path / "other.db"
    with closing(sqlite3.connect(file)) as other:
        other.execute(f"CREATE TABLE {table} (x)")
    before = file.read_bytes()
    await refused(tmp_path / "data", database_url=f"sqlite:///{file}")
    assert f"another program's tables ({table})" in caplog.text
    assert str(file) in caplog.text
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "other.db"]


async def test_tables_of_others_may_lie_beside_ours_in_postgresql_only(tmp_path: Path) -> None:
    async with empty("postgres", tmp_path) as url:
        server = create_async_engine(url)
        for table, refuses in (("users", False), ("tenants", True)):
            async with server.begin() as connection:
                await connection.execute(text(f"CREATE TABLE {table} (x int)"))
            with pytest.raises(ValueError, match=r"tables \(tenants\)") if refuses else nullcontext():
                await glance(checked_url(url), META_KEY)
        await server.dispose()


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ("", "LORAPLEX_DATA_DIR"),  # a file
        (".lock/", "LORAPLEX_DATA_DIR"),
        ("blobs", "NotADirectoryError"),
        ("quarantine", "quarantine"),
        ("loraplex.db/", "Is a directory"),
    ],
)
async def test_a_folder_that_cannot_be_used_is_named_with_the_cause(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, made: str, says: str
) -> None:
    folder = tmp_path / "data"
    if made.endswith("/"):
        (folder / made).mkdir(parents=True)
    elif made:
        folder.mkdir()
        (folder / made).touch()
    else:
        folder.touch()
    await refused(folder)
    (said,) = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert says in said.getMessage()
    assert str(folder) in said.getMessage()
    assert not said.exc_info


async def test_a_damaged_mark_is_no_reason_to_guess(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "data"
    before = await filled(folder)
    (folder / INSTALLATION_FILE).write_text("{")
    await refused(folder)
    assert "is damaged" in caplog.text
    assert blobs_in(folder) == before


@pytest.mark.parametrize("revision", ["0001", "0003"])
async def test_an_older_release_s_database_is_refused_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, revision: str
) -> None:
    """It would be upgraded in its place, and no longer be what it was restored as."""
    folder = tmp_path / "data"
    await filled(folder)
    old = tmp_path / "old.db"
    await asyncio.to_thread(make_old, old, revision)
    before, names = old.read_bytes(), sorted(path.name for path in tmp_path.iterdir())
    await refused(folder, database_url=f"sqlite+aiosqlite:///{old}")
    assert "it is a new one" in caplog.text
    assert old.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == names


async def test_a_database_that_is_refused_is_not_made(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    await filled(folder)
    absent = tmp_path / "deep" / "absent.db"
    await refused(folder, database_url=f"sqlite+aiosqlite:///{absent}")
    assert not absent.parent.exists()


async def test_a_database_of_a_newer_release_is_refused_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data"
    await filled(folder)
    with sqlite3.connect(folder / DB) as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
        database.execute("PRAGMA journal_mode = DELETE")
    before = (folder / DB).read_bytes()
    await refused(folder)
    assert "last used by a newer version" in caplog.text
    assert (folder / DB).read_bytes() == before


def make_old(path: Path, revision: str) -> None:
    """The database of an earlier release, with a tenant."""
    config = Config()
    config.set_main_option("script_location", MIGRATIONS)
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


@pytest.mark.parametrize("kind", KINDS)
async def test_folder_and_database_are_joined_on_either_database(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as database, opened(kind, tmp_path / "more") as other:
        blobs = BlobStore(tmp_path / "data", max_bytes=1)
        await blobs.open()
        for _ in range(2):
            ownership = Ownership(blobs, database)
            await ownership.verify()
            await ownership.join()
        with pytest.raises(WrongDatabase, match="it is a new one"):
            await Ownership(blobs, other).verify()
        await Ownership(blobs, other).adopt()
        await Ownership(blobs, other).verify()
        with pytest.raises(WrongDatabase, match="its id is"):
            await Ownership(blobs, database).verify()


async def test_a_second_server_on_a_folder_touches_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data"
    async with fake_site(folder) as site:
        await site.tenant("acme")
        async with site.services.blobs.receive() as incoming:
            await incoming.write("adapter_config.json", b"{}")
            await refused(folder)
            assert "belongs to a server that is running" in caplog.text
            assert incoming.path.is_dir()


def test_the_lock_is_the_processes_own(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path).acquire()
    with pytest.raises(FolderInUse, match=f"process {os.getpid()}"):
        FolderLock(tmp_path).acquire()
    assert "FolderInUse" in acquire_elsewhere(tmp_path)
    assert f"process {os.getpid()}" in acquire_elsewhere(tmp_path)
    lock.release()
    lock.release()
    assert acquire_elsewhere(tmp_path) == "held"
    FolderLock(tmp_path).acquire().release()


def test_the_lock_holds_where_its_file_is_removed_or_the_folder_has_another_name(tmp_path: Path) -> None:
    folder, link = tmp_path / "data", tmp_path / "link"
    lock = FolderLock(folder).acquire()
    link.symlink_to(folder)
    for step in ("linked", "removed", "made again"):
        with pytest.raises(FolderInUse, match="belongs to a server that is running"):
            FolderLock(link).acquire()
        if step == "linked":
            (folder / LOCK_FILE).unlink()
        elif step == "removed":
            (folder / LOCK_FILE).touch()
    lock.release()
    FolderLock(link).acquire().release()


def test_a_child_that_outlives_the_server_does_not_keep_the_folder(tmp_path: Path) -> None:
    script = (
        "import os, sys, time; from pathlib import Path; from adapters.store.ownership import FolderLock;"
        "FolderLock(Path(sys.argv[1])).acquire(); child = os.fork();"
        "child or (os.close(1), time.sleep(60), os._exit(0)); print(child, flush=True); os._exit(0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=True
    )
    child = int(done.stdout)
    try:
        FolderLock(tmp_path).acquire().release()
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("kind", KINDS)
async def test_of_two_servers_that_find_a_new_database_at_once_one_gets_it(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as database:
        owners = []
        for name in ("one", "other"):
            blobs = BlobStore(tmp_path / name, max_bytes=1)
            await blobs.open()
            owners.append(Ownership(blobs, database))
        for owner in owners:
            await owner.verify()
        ended = await asyncio.gather(*(owner.join() for owner in owners), return_exceptions=True)
        (refusal,) = [error for error in ended if error is not None]
        assert isinstance(refusal, WrongDatabase)
        assert "LORAPLEX_ROLE" in str(refusal)
        assert len(list(tmp_path.glob(f"*/{INSTALLATION_FILE}"))) == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_the_processes_of_a_fleet_that_begin_at_once_agree(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as database:
        owners = []
        for name in ("one", "other"):
            blobs = BlobStore(tmp_path / name, max_bytes=1)
            await blobs.open()
            owners.append(Ownership(blobs, database, alone=False))
        for owner in owners:
            await owner.verify()
        await asyncio.gather(*(owner.join() for owner in owners))
        marks = [json.loads(path.read_bytes()) for path in tmp_path.glob(f"*/{INSTALLATION_FILE}")]
        assert len(marks) == 2
        assert marks[0]["id"] == marks[1]["id"]


def test_a_model_that_is_not_there_costs_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    variables = {"LORAPLEX_MODEL": str(tmp_path / "nonexistent"), "LORAPLEX_DATA_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "server", "serve"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "there is no" in done.stderr
    assert not folder.exists()


def acquire_elsewhere(folder: Path) -> str:
    script = (
        "import sys; from pathlib import Path; from adapters.store.ownership import FolderLock;"
        "FolderLock(Path(sys.argv[1])).acquire(); print('held')"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)
    return done.stdout.strip() or done.stderr


def forget(folder: Path) -> None:
    """What a server before ids has left."""
    (folder / INSTALLATION_FILE).unlink()
    with sqlite3.connect(folder / DB) as database:
        database.execute("DELETE FROM meta WHERE key = 'installation'")


async def test_what_the_folder_has_seen_grows_with_the_audit(tmp_path: Path) -> None:
    async with opened("sqlite", tmp_path) as database:
        blobs = BlobStore(tmp_path / "data", max_bytes=1)
        await blobs.open()
        ownership = Ownership(blobs, database)
        await ownership.verify()
        await ownership.join()
        for expected in (1, 2):
            async with database.write() as session:
                audit.note(session, "tenant.create", "acme")
            await ownership.remember()
            assert json.loads((blobs.root / INSTALLATION_FILE).read_bytes())["audit"] == expected
