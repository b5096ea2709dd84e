"""A backup taken under load is restored elsewhere, starts, and has all that was acknowledged before it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine

from adapters.database import database as tables
from adapters.database.database import MIGRATIONS
from adapters.model import WEIGHTS_FILE
from adapters.store import backup
from adapters.store.ownership import INSTALLATION_FILE
from server.cli import data
from tests.service.batches.test_batches import documents, ended, jsonl, line, started
from tests.service.http.test_api import error
from tests.support import tiny
from tests.support.databases import KINDS, empty
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site, settings

ACME = "/admin/v1/tenants/acme/adapters"

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")


def blobs_in(folder: Path) -> set[str]:
    return {path.name for path in (folder / "blobs").iterdir()}


async def test_a_backup_under_load_is_whole(tmp_path: Path) -> None:
    live, copy = tmp_path / "live", tmp_path / "copy"
    async with fake_site(live) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        before = (await site.chat(key, "hi", model="a")).json()["choices"]
        busy = True

        async def change() -> None:
            number = 0
            while busy:
                number += 1
                await site.upload("acme", "b", tiny.adapter(2 + number % 3))
                await site.admin.delete("/admin/v1/tenants/acme/adapters/b")

        changing = asyncio.create_task(change())
        for _ in range(4):
            assert await asyncio.to_thread(data.back_up, settings(live), copy) == 0
        busy = False
        await changing
    restored = tmp_path / "restored"
    assert await asyncio.to_thread(data.restore, settings(restored), copy) == 0
    async with fake_site(restored) as site:
        assert (await site.chat(key, "hi", model="a")).json()["choices"] == before
        for adapter in (await site.admin.get("/admin/v1/tenants/acme/adapters")).json()["data"]:
            assert {version["digest"] for version in adapter["versions"]} <= blobs_in(restored)


# ``BACKUP_MINUTES=5``: one every ten seconds, for so long; ``DB=postgres``: of PostgreSQL, and into it.
DB = os.environ.get("DB", "sqlite")
MINUTES = float(os.environ.get("BACKUP_MINUTES", "0"))
BACKUPS, PAUSE = (round(MINUTES * 6), 10.0) if MINUTES else (3, 0.3)


@dataclass(frozen=True)
class Taken:
    """A backup, and what had been acknowledged when it was begun: uploads, batches, steps of a rollout."""

    folder: Path
    uploads: int
    batches: int
    steps: int


async def test_each_of_many_backups_under_load_is_restored_checked_and_asked(tmp_path: Path) -> None:
    """What was acknowledged before a backup began is in it, and answers as it did."""
    acknowledged: list[tuple[str, str]] = []
    batches: list[tuple[str, bytes]] = []
    steps: list[str] = []
    taken: list[Taken] = []
    async with empty(DB, tmp_path) as url, fake_site(tmp_path / "live", database_url=url) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        await site.upload("acme", "r", tiny.adapter(60))
        await site.upload("acme", "r", tiny.adapter(61))
        await site.admin.patch(f"{ACME}/r", json={"live": 1})
        going = True

        async def upload() -> None:
            number = 0
            while going:
                number += 1
                made = await site.upload("acme", f"n{number}", tiny.adapter(1 + number % 40))
                assert made.status_code == 201, made.text
                acknowledged.append((f"n{number}", made.json()["digest"]))
                if number % 5 == 0:
                    await site.upload("acme", "gone", tiny.adapter(50 + number % 3))
                    await site.admin.delete("/admin/v1/tenants/acme/adapters/gone")

        async def ask() -> None:
            while going:
                assert (await site.chat(key, "hi", model="a")).status_code == 200

        async def send_batches() -> None:
            async with site.openai(key) as client:
                while going:
                    lines = jsonl(line(f"{len(batches)}-{number}") for number in range(5))
                    batches.append(((await started(client, lines)).id, lines))
                    await asyncio.sleep(0.2)

        async def roll_out() -> None:
            while going:
                made = await site.admin.post(f"{ACME}/r/rollouts", json={"version": 2})
                assert made.status_code == 201, made.text
                steps.append(made.json()["id"])
                await asyncio.sleep(0.2)
                ended = await site.admin.patch(f"{ACME}/r/rollouts/{steps[-1]}", json={"action": "roll_back"})
                assert ended.status_code == 200, ended.text

        work = [asyncio.create_task(one) for one in (upload(), ask(), ask(), send_batches(), roll_out())]
        while not (acknowledged and batches and steps):
            await asyncio.sleep(0.05)
        for number in range(BACKUPS):
            await asyncio.sleep(PAUSE)
            counts = len(acknowledged), len(batches), len(steps)
            made = await site.admin.post("/admin/v1/backup", timeout=600)
            assert made.status_code == 201, made.text
            kept = tmp_path / f"backup-{number}"
            await asyncio.to_thread(shutil.copytree, made.json()["folder"], kept, copy_function=os.link)
            taken.append(Taken(kept, *counts))
        going = False
        await asyncio.gather(*work)
    assert min(taken[-1].uploads, taken[-1].batches, taken[-1].steps) > 0
    for one in taken:
        restored = tmp_path / f"restored-{one.folder.name}"
        async with empty(DB, restored) as url:
            there = settings(restored, database_url=url)
            assert await asyncio.to_thread(data.restore, there, one.folder) == 0
            async with fake_site(restored, database_url=url) as site:
                await _as_acknowledged(
                    site, key, acknowledged[: one.uploads], batches[: one.batches], steps[: one.steps]
                )
        shutil.rmtree(restored, ignore_errors=True)
    last = taken[-1]
    print(
        f"\n{len(taken)} backups, {DB}: {last.uploads} uploads, {last.batches} batches, {last.steps} rollouts"
    )


async def _as_acknowledged(
    site: Site,
    key: str,
    uploads: list[tuple[str, str]],
    batches: list[tuple[str, bytes]],
    rollouts: list[str],
) -> None:
    """A restored server has all of these, and goes on with what had not ended."""
    checked = (await site.admin.get("/admin/v1/check")).json()
    assert checked["ok"], checked
    for name, digest in uploads[-3:]:
        said = await site.chat(key, "hi", model=name)
        assert said.status_code == 200, said.text
        assert said.json()["choices"][0]["message"]["content"].startswith(digest)
    listed = (await site.admin.get(f"{ACME}?limit=1000")).json()["data"]
    assert {name for name, _ in uploads} <= {adapter["name"] for adapter in listed}
    async with site.openai(key) as client:
        for id_, lines in batches[-2:]:
            batch = await ended(client, id_)
            assert batch.status == "completed"
            assert (await client.files.content(batch.input_file_id)).content == lines
            asked = [json.loads(one)["custom_id"] for one in lines.splitlines()]
            assert [one["custom_id"] for one in await documents(client, batch.output_file_id)] == asked
    for id_ in rollouts[-2:]:
        found = (await site.admin.get(f"{ACME}/r/rollouts/{id_}")).json()
        assert found["state"] in ("running", "rolled_back"), found


async def test_the_next_backup_copies_what_is_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live, copy = tmp_path / "live", tmp_path / "copy"
    async with fake_site(live) as site:
        await site.tenant("acme", {"a": tiny.adapter(1)})
        assert data.back_up(settings(live), copy) == 0
        assert "1 adapters' files copied, 0 were" in capsys.readouterr().out
        await site.upload("acme", "b", tiny.adapter(2))
        assert data.back_up(settings(live), copy) == 0
        assert "1 adapters' files copied, 1 were" in capsys.readouterr().out
    assert {path.name for path in copy.iterdir()} == {"loraplex.db", "blobs"}
    assert blobs_in(copy) == blobs_in(live)


def change_a_byte(folder: Path) -> None:
    file = folder / WEIGHTS_FILE
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-1] + b"!")


def remove(folder: Path) -> None:
    folder.chmod(0o700)
    shutil.rmtree(folder)


@pytest.mark.parametrize("damage", [change_a_byte, remove])
@pytest.mark.parametrize("side", ["live", "copy"])
async def test_what_is_damaged_is_left_out_and_named_and_all_else_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], side: str
) -> None:
    live, copy, back = tmp_path / "live", tmp_path / "copy", tmp_path / "back"
    async with fake_site(live) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2)})
        digest = (await site.admin.get("/admin/v1/tenants/acme/adapters/a")).json()["versions"][0]["digest"]
    if side == "live":
        damage(live / "blobs" / digest)
        assert data.back_up(settings(live), copy) == 1
        assert digest in capsys.readouterr().out
        assert len(blobs_in(copy)) == 1
    else:
        assert data.back_up(settings(live), copy) == 0
        damage(copy / "blobs" / digest)
    assert await asyncio.to_thread(data.restore, settings(back), copy) == 1
    assert digest in capsys.readouterr().out
    async with fake_site(back) as site:
        error(await site.chat(key, "hi", model="a"), 503, "adapter_damaged")
        assert (await site.chat(key, "hi", model="b")).status_code == 200
        await site.upload("acme", "a", tiny.adapter(1))  # the cure
        assert (await site.chat(key, "hi", model="a")).status_code == 200


async def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live, copy = tmp_path / "live", tmp_path / "copy"
    async with fake_site(live) as site:
        await site.tenant("acme", {"a": tiny.adapter(1)})
        assert data.back_up(settings(live), copy) == 0
        assert data.restore(settings(live), copy) == 2
        assert "is running" in capsys.readouterr().err.replace("\n", " ")
    assert data.restore(settings(live), copy) == 2
    assert "already" in capsys.readouterr().err
    assert data.restore(settings(tmp_path / "new"), tmp_path / "nothing") == 2
    assert not (tmp_path / "new" / "loraplex.db").exists()


async def test_a_backup_is_not_made_on_top_of_what_it_copies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would take the database from under the server that writes to it."""
    live = tmp_path / "live"
    async with fake_site(live) as site:
        await site.tenant("acme", {"a": tiny.adapter(1)})
        inode = (live / "loraplex.db").stat().st_ino
        (tmp_path / "link").symlink_to(live)
        for folder in (live, live / "blobs", live / "quarantine" / "x", tmp_path / "link"):
            assert data.back_up(settings(live), folder) == 2
            assert "the server's own" in capsys.readouterr().err
        assert (live / "loraplex.db").stat().st_ino == inode
        assert data.back_up(settings(live), live / "backups") == 0
    elsewhere = tmp_path / "elsewhere"
    async with fake_site(elsewhere, database_url=f"sqlite:///{tmp_path}/db/loraplex.db"):
        assert (
            data.back_up(
                settings(elsewhere, database_url=f"sqlite:///{tmp_path}/db/loraplex.db"), tmp_path / "db"
            )
            == 2
        )
        assert "the database itself" in capsys.readouterr().err


async def test_what_a_killed_backup_left_is_gone_after_the_next(tmp_path: Path) -> None:
    live, copy, restored = tmp_path / "live", tmp_path / "copy", tmp_path / "restored"
    async with fake_site(live) as site:
        await site.tenant("acme", {"a": tiny.adapter(1)})
    (digest,) = blobs_in(live)
    for folder in (copy, restored):
        for left in (
            f"blobs/.{digest}-{'0' * 32}/x",
            f".loraplex.db-{'1' * 32}",
            f".loraplex.db-{'1' * 32}-wal",
        ):
            (folder / left).parent.mkdir(parents=True, exist_ok=True)
            (folder / left).write_bytes(b"half")
    (copy / "mine").touch()
    assert data.back_up(settings(live), copy) == 0
    assert {path.name for path in copy.iterdir()} == {"loraplex.db", "blobs", "mine"}
    assert blobs_in(copy) == {digest}
    assert await asyncio.to_thread(data.restore, settings(restored), copy) == 0
    assert blobs_in(restored) == {digest}
    assert not list(restored.glob(".loraplex*"))


async def test_a_restore_keeps_no_other_bytes_under_a_digest(tmp_path: Path) -> None:
    """A folder from an earlier try, whose file was cut."""
    live, copy, restored = tmp_path / "live", tmp_path / "copy", tmp_path / "restored"
    async with fake_site(live) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        before = (await site.chat(key, "hi", model="a")).json()["choices"]
    assert data.back_up(settings(live), copy) == 0
    (digest,) = blobs_in(copy)
    shutil.copytree(copy / "blobs", restored / "blobs")
    file = restored / "blobs" / digest / WEIGHTS_FILE
    file.chmod(0o600)
    os.truncate(file, 5)
    assert await asyncio.to_thread(data.restore, settings(restored), copy) == 0
    assert [path.name.partition("-")[0] for path in (restored / "aside").iterdir()] == [digest]
    async with fake_site(restored) as site:
        assert (await site.chat(key, "hi", model="a")).json()["choices"] == before


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
async def test_a_backup_of_either_database_is_restored_into_either(
    tmp_path: Path, source: str, target: str
) -> None:
    live, copy, restored = tmp_path / "live", tmp_path / "copy", tmp_path / "restored"
    async with empty(source, tmp_path / "s") as url, empty(target, tmp_path / "t") as other:
        async with fake_site(live, database_url=url) as site:
            key = await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2)}, weight=2.5)
            before = await everything(site, key)
            assert await asyncio.to_thread(data.back_up, settings(live, database_url=url), copy) == 0
        assert {path.name for path in copy.iterdir()} == {"loraplex.db", "blobs"}
        there = settings(restored, database_url=other)
        assert await asyncio.to_thread(data.restore, there, copy) == 0
        assert await asyncio.to_thread(data.restore, there, copy) == 2, "nothing is mixed with what is there"
        async with fake_site(restored, database_url=other) as site:
            assert await everything(site, key) == before
            assert (await site.admin.get("/admin/v1/check")).json()["ok"]
            # What is new gets ids after those that were restored.
            await site.tenant("new", {"a": tiny.adapter(3)})
            entries = (await site.admin.get("/admin/v1/audit?limit=100")).json()["data"]
            assert len({entry["id"] for entry in entries}) == len(entries)
        assert mark_of(restored) != mark_of(live)


async def everything(site: Site, key: str) -> dict[str, Any]:
    """What a customer and an operator see, and is to survive."""
    found: dict[str, Any] = {}
    for model in ("a", "b", "a@1"):
        answer = await site.chat(key, "hi", model=model)
        assert answer.status_code == 200, answer.text
        found[model] = answer.json()["choices"]
    await site.services.usage_writer.flush()
    listed = (await site.admin.get("/admin/v1/tenants/acme/adapters")).json()["data"]
    for adapter in listed:
        del adapter["tier"]
        for version in adapter["versions"]:
            del version["tier"]
    found["adapters"] = listed
    found["tenant"] = (await site.admin.get("/admin/v1/tenants/acme")).json()
    found["keys"] = [k["id"] for k in (await site.admin.get("/admin/v1/tenants/acme/keys")).json()["data"]]
    return found


def mark_of(folder: Path) -> str:
    return str(json.loads((folder / INSTALLATION_FILE).read_bytes())["id"])


async def test_the_admin_api_makes_a_backup(tmp_path: Path) -> None:
    async with fake_site(tmp_path / "live") as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        made = await site.admin.post("/admin/v1/backup")
        assert made.status_code == 201, made.text
        first = made.json()
        assert first["folder"] == str((tmp_path / "live" / "backups").absolute())
        assert (first["copied"], first["present"], first["broken"], first["missing"]) == (1, 0, [], [])
        again = (await site.admin.post("/admin/v1/backup", json={})).json()
        assert (again["copied"], again["present"]) == (0, 1)
        named = (await site.admin.post("/admin/v1/backup", json={"name": "friday"})).json()
        assert named["folder"] == f"{first['folder']}/friday"
        for name in ("../x", "a/b", ".hidden", ""):
            refused = await site.admin.post("/admin/v1/backup", json={"name": name})
            assert refused.status_code in (400, 422), refused.text
        assert (await site.http.post("/admin/v1/backup", headers=bearer(key))).status_code == 403
    restored = tmp_path / "restored"
    assert await asyncio.to_thread(data.restore, settings(restored), Path(named["folder"])) == 0
    async with fake_site(restored) as site:
        assert (await site.chat(key, "hi", model="a")).status_code == 200


async def test_a_backup_that_cannot_be_made_is_said_so_and_the_one_before_stays(tmp_path: Path) -> None:
    async with fake_site(tmp_path / "live") as site:
        await site.tenant("acme", {"a": tiny.adapter(1)})
        folder = Path((await site.admin.post("/admin/v1/backup")).json()["folder"])
        before = (folder / "loraplex.db").read_bytes()
        with backup._alone(folder):
            error(await site.admin.post("/admin/v1/backup"), 409, "conflict")
        await site.upload("acme", "b", tiny.adapter(2))
        digest = (await site.admin.get("/admin/v1/tenants/acme/adapters/b")).json()["versions"][0]["digest"]
        blob = site.services.blobs.path(digest)
        blob.chmod(0o700)
        os.mkfifo(blob / "cannot-be-copied")
        error(await site.admin.post("/admin/v1/backup"), 500, "backup_failed")
        assert (folder / "loraplex.db").read_bytes() == before
        (blob / "cannot-be-copied").unlink()
        assert (await site.admin.post("/admin/v1/backup")).status_code == 201


async def test_a_backup_leaves_the_reserve_free_and_nothing_half(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From no room at all to just enough; by the command line and by the admin API."""
    live, copy, usage = tmp_path / "live", tmp_path / "copy", shutil.disk_usage
    reserve, most = settings(live).disk_reserve, 0  # adapters, of which there is room for so many

    def limited(folder: Path) -> Any:
        if not Path(folder).is_relative_to(copy):
            return usage(folder)
        whole = [path for path in copy.glob("blobs/*") if not path.name.startswith(".")]
        return usage(folder)._replace(free=reserve + (1 << 30 if len(whole) < most else 0))

    monkeypatch.setattr(shutil, "disk_usage", limited)
    async with fake_site(live, backup_dir=copy) as site:
        await site.tenant("acme", {"a": tiny.adapter(1)})
        assert data.back_up(settings(live), copy) == data.FAILED
        assert "DISK_RESERVE" in capsys.readouterr().err
        assert [path for path in copy.rglob("*") if path.is_file()] == []
        most = 1
        assert data.back_up(settings(live), copy) == data.OK
        before = (copy / "loraplex.db").read_bytes()
        await site.upload("acme", "b", tiny.adapter(2))
        await site.upload("acme", "c", tiny.adapter(3))
        most = 2
        said = error(await site.admin.post("/admin/v1/backup"), 507, "storage_full")
        assert "DISK_RESERVE" in said["message"]
        assert "Traceback" not in caplog.text, "a full disk is no defect"
        assert (copy / "loraplex.db").read_bytes() == before
        assert all(not path.name.startswith(".") for path in copy.rglob("*")), "nothing half"
        assert len(blobs_in(copy)) == 2, "the one that found room is kept for the next"
        most = 9
        assert (await site.admin.post("/admin/v1/backup")).json()["copied"] == 1


async def test_files_that_are_gone_do_not_stop_later_backups(tmp_path: Path) -> None:
    async with fake_site(tmp_path / "live") as site:
        await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2)})
        digest = (await site.admin.get("/admin/v1/tenants/acme/adapters/a")).json()["versions"][0]["digest"]
        change_a_byte(site.services.blobs.path(digest))
        repaired = (await site.admin.post("/admin/v1/check", json={"repair": True})).json()
        assert repaired["moved"]
        made = await site.admin.post("/admin/v1/backup")
        assert made.status_code == 201, made.text
        first = made.json()
        assert (first["copied"], first["broken"], first["missing"]) == (1, [], [digest])
        await site.upload("acme", "a", tiny.adapter(1))
        again = (await site.admin.post("/admin/v1/backup")).json()
        assert (again["copied"], again["present"], again["missing"]) == (1, 1, [])


async def test_what_lies_in_an_object_store_is_backed_up_and_put_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live, copy, restored = tmp_path / "live", tmp_path / "copy", tmp_path / "restored"
    store, other = f"file://{tmp_path}/store", f"file://{tmp_path}/other"
    async with fake_site(live, blobs_url=store) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2)})
    for blob in (live / "blobs").iterdir():
        blob.chmod(0o755)
        shutil.rmtree(blob)
    assert await asyncio.to_thread(data.back_up, settings(live, blobs_url=store), copy) == 0
    assert len(blobs_in(copy)) == 2
    there = settings(restored, blobs_url=other)
    assert await asyncio.to_thread(data.restore, there, copy) == 0
    async with fake_site(restored, blobs_url=other) as site:
        assert (await site.admin.get("/admin/v1/check")).json()["ok"]
        for model in ("a", "b"):
            assert (await site.chat(key, "hi", model=model)).status_code == 200
    (digest, _) = sorted(blobs_in(tmp_path / "other"))
    shutil.rmtree(tmp_path / "other" / "blobs" / digest)
    capsys.readouterr()
    assert await asyncio.to_thread(data.check, there, repair=False, as_json=True) == 1
    (damaged,) = json.loads(capsys.readouterr().out)["damaged"]
    assert (damaged["digest"], damaged["reason"]) == (digest, "missing")


# --- upgrade and rollback ---------------------------------------------------------------------------

REVISIONS = sorted(
    path.name[:4] for path in (Path(tables.__file__).parent / "migrations" / "versions").glob("0*.py")
)


# Each on SQLite; on PostgreSQL the first one, which takes every step, and some between.
RELEASES = [("sqlite", revision) for revision in REVISIONS] + [("postgres", one) for one in REVISIONS[::3]]


@pytest.mark.parametrize(("kind", "revision"), RELEASES)
async def test_every_release_is_upgraded_and_rolled_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, revision: str
) -> None:
    """As docs/operations.md says: a backup, the new release; back is the old one on the backup."""
    live, copy, old = tmp_path / "live", tmp_path / "copy", tmp_path / "old"
    async with empty(kind, live) as url:
        here = settings(live, database_url=url)
        async with fake_site(live, database_url=url) as site:
            key = await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2)})
        if kind == "postgres":  # what an earlier release writes of it is SQLite with its own schema
            assert await asyncio.to_thread(data.back_up, here, copy) == 0
            await turn_back(f"sqlite+aiosqlite:///{copy / 'loraplex.db'}", revision)
        await turn_back(url, revision, live)
        if kind == "sqlite":
            assert await asyncio.to_thread(data.back_up, here, copy) == 0
        elif revision != REVISIONS[-1]:
            assert await asyncio.to_thread(data.back_up, here, tmp_path / "late") == 2
            assert f"is {revision}, this program's is {REVISIONS[-1]}" in capsys.readouterr().err
        async with fake_site(live, database_url=url) as site:
            for model in ("a", "b@1"):
                assert (await site.chat(key, "hi", model=model)).status_code == 200
            assert (await site.upload("acme", "a", tiny.adapter(3))).status_code == 201
    shutil.copytree(copy, old)
    with closing(sqlite3.connect(old / "loraplex.db")) as database:
        assert database.execute("SELECT version_num FROM alembic_version").fetchone() == (revision,)
        assert database.execute("SELECT count(*) FROM versions").fetchone() == (2,)
    assert len(blobs_in(old)) == 2
    # The new release reads the old backup too.
    restored = tmp_path / "restored"
    async with empty(kind, restored) as url:
        assert await asyncio.to_thread(data.restore, settings(restored, database_url=url), copy) == 0
        async with fake_site(restored, database_url=url) as site:
            assert (await site.chat(key, "hi", model="a")).status_code == 200
            assert (await site.chat(key, "hi", model="a@2")).status_code == 404


async def turn_back(url: str, revision: str, folder: Path | None = None) -> None:
    """Lets an earlier release have written the database, and its data folder: by what every migration does
    backwards."""
    config = Config()
    config.set_main_option("script_location", MIGRATIONS)

    def downgrade(connection: Connection) -> None:
        config.attributes["connection"] = connection
        command.downgrade(config, revision)

    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(downgrade)
    await engine.dispose()
    if folder is not None and revision < "0003":  # which knew neither an audit nor a mark
        (folder / INSTALLATION_FILE).unlink()
