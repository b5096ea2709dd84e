"""A disk that is full or fails, at every step of an upload: a clear answer, and inference goes on."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save
from sqlalchemy import event, select

from adapters.database.database import Database
from adapters.database.rows import MetaRow
from adapters.errors import StorageFailed
from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from server.accounts.usage_journal import Journal
from tests.service.http.test_api import error
from tests.support import databases, tiny
from tests.support.site import Site
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

URL = "/admin/v1/tenants/acme/adapters/new/versions"
STEPS = ("write", "fsync", "rename", "mkdir")


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path) as site:
        yield site


def to_convert() -> dict[str, bytes]:
    """Written twice: as it comes, and as it is served."""
    folder = tiny.adapter(1)
    tensors = load_file(folder / WEIGHTS_FILE)
    named = {name.replace(".weight", ".default.weight"): x for name, x in tensors.items()}
    return {CONFIG_FILE: (folder / CONFIG_FILE).read_bytes(), WEIGHTS_FILE: save(named)}


def for_reading(file: Any, connect: Callable[..., Any] = sqlite3.connect, **options: Any) -> Any:
    """As ``sqlite3.connect`` on a disk that is read-only: without an error."""
    return connect(f"file:{file}?mode=ro", **options, uri=True)


def fail_the(at: int, code: int, patch: pytest.MonkeyPatch) -> list[str]:
    """Lets the ``at``-th of the STEPS fail; returns those that were reached, in order."""
    reached: list[str] = []

    def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            reached.append(name)
            if len(reached) == at:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return call

    for name in STEPS:
        patch.setattr(os, name, failing(name, getattr(os, name)))
    return reached


@pytest.mark.parametrize(
    ("code", "status", "says"),
    [
        (errno.ENOSPC, 507, "storage_full"),
        (errno.EDQUOT, 507, "storage_full"),
        (errno.EIO, 503, "storage_failed"),
        (errno.EROFS, 503, "storage_failed"),
    ],
)
async def test_every_step_of_an_upload(
    code: int, status: int, says: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What answers used is written beside the upload, and is none of its steps.
    for call in ("append", "rewrite"):
        monkeypatch.setattr(Journal, call, lambda *_: None)
    key = await site.tenant("acme", {"a": tiny.adapter(2)})
    blobs = sorted((tmp_path / "blobs").iterdir())
    failed: set[str] = set()
    files = to_convert()
    for at in range(1, 50):
        with monkeypatch.context() as patch:
            reached = fail_the(at, code, patch)
            answered = await site.admin.post(URL, files=files)
        if len(reached) < at:
            assert answered.status_code == 201, answered.text
            break
        error(answered, status, says)
        failed.add(reached[at - 1])
        assert list((tmp_path / "quarantine").iterdir()) == []
        assert (await site.chat(key, "hi", model="a")).status_code == 200
        assert (await site.chat(key, "hi", model="new")).status_code == 404
    assert failed == set(STEPS)
    assert len(sorted((tmp_path / "blobs").iterdir())) == len(blobs) + 1
    assert (await site.chat(key, "hi", model="new")).status_code == 200


async def test_a_database_without_room(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """SQLite's own: it may use the pages that it has, and no more. The log has a line with the cause."""
    key = await site.tenant("acme", {"a": tiny.adapter(2)})

    def bound(connection: Any, *_: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA max_page_count = 1")  # as many as there are
        cursor.close()

    engine = site.services.database._engine.sync_engine
    event.listen(engine, "checkout", bound)
    for i in range(200):
        made = await site.admin.post("/admin/v1/tenants", json={"id": f"t-{i}", "name": "x" * 200})
        if made.status_code != 201:
            break
    error(made, 507, "storage_full")
    (logged,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert logged.getMessage() == "storage_full, OperationalError: database or disk is full"
    assert not logged.exc_info
    assert (await site.chat(key, "hi", model="a")).status_code == 200
    assert len((await site.admin.get("/admin/v1/tenants")).json()["data"]) == i + 1
    event.remove(engine, "checkout", bound)
    await site.services.database._engine.dispose()  # the connections keep the limit
    made = await site.admin.post("/admin/v1/tenants", json={"id": f"t-{i}", "name": "x" * 200})
    assert made.status_code == 201, made.text


async def test_a_database_whose_disk_fails(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(2)})
    ioerr = sqlite3.OperationalError("disk I/O error")
    ioerr.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE

    def fail(*args: Any) -> None:
        raise ioerr

    engine = site.services.database._engine.sync_engine
    event.listen(engine, "before_cursor_execute", fail)
    answered = await site.admin.post(URL, files=to_convert())
    event.remove(engine, "before_cursor_execute", fail)
    error(answered, 503, "storage_failed")
    assert (await site.chat(key, "hi", model="a")).status_code == 200


@pytest.mark.parametrize("how", ["removed", "replaced"])
async def test_a_database_whose_file_is_another_one_acknowledges_nothing(
    site: Site, tmp_path: Path, how: str
) -> None:
    """What is written to the open one would be gone at the next start."""
    key = await site.tenant("acme", {"a": tiny.adapter(2)})
    file = tmp_path / "loraplex.db"
    file.rename(tmp_path / "away")
    if how == "replaced":
        shutil.copy(tmp_path / "away", file)
    made = await site.admin.post("/admin/v1/tenants", json={"id": "late"})
    error(made, 503, "storage_failed")
    error(await site.upload("acme", "b", tiny.adapter(3)), 503, "storage_failed")
    assert (await site.chat(key, "hi", model="a")).status_code == 200
    ready = await site.http.get("/ready")
    assert (ready.status_code, ready.json()["writes"]) == (200, "writes")
    (tmp_path / "away").rename(file)
    assert (await site.admin.post("/admin/v1/tenants", json={"id": "late"})).status_code == 201


async def test_a_database_that_became_read_only(site: Site) -> None:
    """Inference goes on, every write is refused by name, and all is well once it can be written again."""
    key = await site.tenant("acme", {"a": tiny.adapter(2)})

    def locked(connection: Any, *_: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA query_only = ON")
        cursor.close()

    engine = site.services.database._engine.sync_engine
    event.listen(engine, "checkout", locked)
    for answered in (
        await site.admin.post(URL, files=to_convert()),
        await site.admin.post("/admin/v1/tenants", json={"id": "more"}),
        await site.admin.patch("/admin/v1/tenants/acme", json={"weight": 2.0}),
        await site.admin.delete("/admin/v1/tenants/acme/adapters/a"),
    ):
        error(answered, 503, "storage_failed")
        assert int(answered.headers["Retry-After"]) > 0
    assert (await site.chat(key, "hi", model="a")).status_code == 200
    event.remove(engine, "checkout", locked)
    await site.services.database._engine.dispose()  # the connections stay as they are
    assert (await site.admin.post(URL, files=to_convert())).status_code == 201
    assert (await site.admin.get("/admin/v1/check")).json()["ok"]


async def test_writes_go_on_when_the_databases_disk_was_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What SQLite opened meanwhile can only read for good, and must not be given to who writes later."""
    async with databases.opened("sqlite", tmp_path) as database:
        with monkeypatch.context() as patch:
            patch.setattr(sqlite3, "connect", for_reading)
            async with AsyncExitStack() as stack:
                for _ in range(5):
                    session = await stack.enter_async_context(database.read())
                    await session.execute(select(MetaRow.key).limit(1))
        for number in range(8):
            async with database.write() as session:
                session.add(MetaRow(key=f"after {number}", value="1"))
        async with database.read() as session:
            assert len((await session.scalars(select(MetaRow).where(MetaRow.key.like("after%")))).all()) == 8


async def test_nothing_is_written_while_the_databases_disk_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with databases.with_tables("sqlite", tmp_path) as url:
        database = Database(url)
        monkeypatch.setattr(sqlite3, "connect", for_reading)
        for _ in range(3):
            with pytest.raises(StorageFailed):
                async with database.write():
                    pass
            await database.ping()
        await database.close()
