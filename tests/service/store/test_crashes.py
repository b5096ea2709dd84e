"""SIGKILL at every step of what changes an adapter: what was acknowledged is there, nothing is in part.

Real processes on the real store and SQLite. Each of them is killed one step later than the one before it.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from safetensors.numpy import load_file, save

from adapters.database.database import Database
from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from adapters.store.blobs import BlobStore
from adapters.store.catalog import Catalog
from adapters.store.digests import digest_of
from tests.support import crashes, tiny
from tests.support.crashes import Operation
from tests.support.forks import PROCESSES
from tests.support.tiny import fake_site

# tenant, adapter -> (live, default, pinned, ((number, digest), …))
State = dict[tuple[str, str], tuple[int | None, bool, bool, tuple[tuple[int, str], ...]]]


def files(seed: int) -> dict[str, bytes]:
    return {name: (tiny.adapter(seed) / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}


def to_convert(seed: int) -> dict[str, bytes]:
    named = {
        name.replace(".weight", ".default.weight"): x
        for name, x in load_file(tiny.adapter(seed) / WEIGHTS_FILE).items()
    }
    return files(seed) | {WEIGHTS_FILE: save(named)}


OPERATIONS: dict[str, Callable[[], Operation]] = {
    "upload a new adapter": lambda: ("POST", "/tenants/acme/adapters/new/versions", {"files": files(3)}),
    "upload a next version": lambda: ("POST", "/tenants/acme/adapters/a/versions", {"files": files(3)}),
    "upload what is converted": lambda: (
        "POST",
        "/tenants/acme/adapters/new/versions",
        {"files": to_convert(3)},
    ),
    "upload what is there": lambda: ("POST", "/tenants/acme/adapters/new/versions", {"files": files(1)}),
    "go live": lambda: ("PATCH", "/tenants/acme/adapters/a", {"json": {"live": 1, "pinned": True}}),
    "become the default": lambda: ("PATCH", "/tenants/acme/adapters/b", {"json": {"default": True}}),
    "delete a version": lambda: ("DELETE", "/tenants/acme/adapters/a/versions/1", {}),
    "delete an adapter": lambda: ("DELETE", "/tenants/acme/adapters/b", {}),
    "delete a tenant": lambda: ("DELETE", "/tenants/acme", {}),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder: ``a`` with two versions, ``b`` with one."""
    folder = tmp_path_factory.mktemp("prepared")
    async with fake_site(folder) as site:
        await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(4)})
        await site.upload("acme", "a", tiny.adapter(2))
    return folder


def in_a_process(target: Callable[..., None], *args: Any) -> tuple[list[Any], bool]:
    """What it said, and whether it was killed."""
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=target, args=(*args, theirs))
    process.start()
    theirs.close()
    process.join(240)
    assert process.exitcode in (0, -9), process.exitcode
    return list(_received(ours)), process.exitcode == -9


def _received(pipe: Connection) -> Any:
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return


async def restarted(folder: Path) -> State:
    """What a start finds, after its sweep; fails if bytes and rows do not fit each other to the last one."""
    database = Database(f"sqlite+aiosqlite:///{folder / 'loraplex.db'}")
    await database.open()
    try:
        blobs = BlobStore(folder, max_bytes=1)
        await blobs.open()
        catalog = Catalog(database, blobs.path)
        linked = await catalog.linked_digests()
        await blobs.sweep(linked, older_than=0)
        assert {path.name for path in blobs.blobs.iterdir()} == linked
        assert all(digest_of(path) == path.name for path in blobs.blobs.iterdir())
        assert list(blobs.quarantine.iterdir()) == []
        return {
            ("acme", adapter.name): (
                adapter.live,
                adapter.default,
                adapter.pinned,
                tuple((info.version.number, info.version.digest) for info in adapter.versions),
            )
            for adapter in await catalog.adapters("acme")
        }
    finally:
        await database.close()


@pytest.mark.parametrize("name", OPERATIONS)
async def test_killed_at_any_step(name: str, prepared: Path, tmp_path: Path) -> None:
    operation = OPERATIONS[name]()

    def attempt(at: int | None) -> tuple[Path, list[Any], bool]:
        folder = tmp_path / str(at)
        shutil.copytree(prepared, folder)
        return folder, *in_a_process(crashes.run, folder, tiny.base(), operation, at)

    before = await restarted(shutil.copytree(prepared, tmp_path / "before"))
    folder, (status, steps), killed = attempt(None)
    assert (status // 100, killed) == (2, False)
    after = await restarted(folder)
    assert after != before
    seen = []
    for at in range(1, len(steps) + 1):
        folder, said, killed = attempt(at)
        assert killed, at
        found = await restarted(folder)
        assert found == after if said else found in (before, after), (at, steps[at - 1])
        seen.append(found == after)
    assert seen == sorted(seen), "once it is there, it stays"
    assert set(seen) == {False, True}, "the steps reach from before the change to after it"


async def test_a_kill_while_the_answer_is_on_its_way_is_survived_as_a_whole(
    prepared: Path, tmp_path: Path
) -> None:
    """The whole server comes up again on what was left, and answers with what was acknowledged."""
    folder = shutil.copytree(prepared, tmp_path / "data")
    upload = OPERATIONS["upload what is converted"]()
    (_, steps), _ = in_a_process(crashes.run, folder, tiny.base(), upload, None)
    folder = shutil.copytree(prepared, tmp_path / "again")
    in_a_process(crashes.run, folder, tiny.base(), upload, len(steps))
    async with fake_site(folder) as site:
        key = (await site.admin.post("/admin/v1/tenants/acme/keys", json={})).json()["key"]
        for model in ("a", "a@1", "b", "new"):
            answered = await site.chat(key, "hi", model=model)
            assert answered.status_code == 200, answered.text
        repeated = await site.admin.request(upload[0], f"/admin/v1{upload[1]}", **upload[2])
        assert repeated.json()["version"] == 2


def tables(path: Path) -> list[str]:
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT name FROM sqlite_master ORDER BY name").fetchall()
    return [name for (name,) in rows]


async def test_killed_at_any_step_of_a_migration(tmp_path: Path) -> None:
    """The schema is upgraded as a whole or not at all, and the next start finishes it."""
    url = f"sqlite+aiosqlite:///{tmp_path}/whole.db"
    (_, steps), _ = in_a_process(crashes.migrate, url, None)
    whole = tables(tmp_path / "whole.db")
    assert len(steps) > 12
    seen = set()
    for at in range(1, len(steps) + 1):
        path = tmp_path / f"{at}.db"
        _, killed = in_a_process(crashes.migrate, f"sqlite+aiosqlite:///{path}", at)
        assert killed
        found = tables(path)
        assert found in ([], whole), (at, steps[at - 1])
        seen.add(len(found))
        database = Database(f"sqlite+aiosqlite:///{path}")
        await database.open()
        await database.close()
        assert tables(path) == whole
    assert 0 in seen
