"""What rots in a backup is found while there is a whole copy, and said before a restore needs it."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from adapters.store import backup
from server.__main__ import cli
from server.cli import data
from tests.service.store.test_backup import blobs_in, change_a_byte, remove, turn_back
from tests.support import tiny
from tests.support.commands import Commands
from tests.support.tiny import fake_site, settings


async def backed_up(live: Path, copy: Path, count: int = 2) -> list[str]:
    """A backup of adapters ``a``, ``b`` …; their digests in that order."""
    names = "abcdef"[:count]
    async with fake_site(live) as site:
        await site.tenant("acme", {name: tiny.adapter(1 + at) for at, name in enumerate(names)})
        listed = (await site.admin.get("/admin/v1/tenants/acme/adapters")).json()["data"]
    assert data.back_up(settings(live), copy) == 0
    return [adapter["versions"][0]["digest"] for adapter in listed]


def look(folder: Path, *options: str) -> tuple[int, str]:
    done = Commands().invoke(cli, ["check", "--backup", str(folder), *options])
    return done.exit_code, done.output


async def test_a_check_of_a_backup_names_what_is_damaged_and_changes_nothing(tmp_path: Path) -> None:
    live, copy = tmp_path / "live", tmp_path / "copy"
    first, second, third = await backed_up(live, copy, 3)
    assert look(copy)[0] == 0
    change_a_byte(copy / "blobs" / first)
    remove(copy / "blobs" / second)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    status, said = look(copy)
    assert status == 1
    assert f"changed: {first}, of acme/a@1" in said
    assert f"missing: {second}, of acme/b@1" in said
    assert third not in said
    status, said = look(copy, "--json")
    assert (status, len(json.loads(said)["damaged"])) == (1, 2)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


async def test_a_backup_of_any_release_can_be_checked(tmp_path: Path) -> None:
    live, copy = tmp_path / "live", tmp_path / "copy"
    await backed_up(live, copy)
    await turn_back(f"sqlite+aiosqlite:///{copy / 'loraplex.db'}", "0001")
    assert look(copy)[0] == 0
    change_a_byte(copy / "blobs" / min(blobs_in(copy)))
    assert look(copy)[0] == 1


async def test_a_customers_file_that_is_not_whole_is_named(tmp_path: Path) -> None:
    """Its bytes are rows, which the database may have lost before the backup was made."""
    live, copy = tmp_path / "live", tmp_path / "copy"
    async with fake_site(live) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        async with site.openai(key) as client:
            made = [
                await client.files.create(file=(f"{n}.jsonl", b"x" * 100), purpose="batch") for n in range(2)
            ]
    assert data.back_up(settings(live), copy) == 0
    assert look(copy)[0] == 0
    with closing(sqlite3.connect(copy / "loraplex.db")) as rows, rows:
        rows.execute("DELETE FROM file_pieces WHERE file = ?", (made[0].id,))
    status, said = look(copy)
    assert status == 1
    assert f"a file of acme that is not whole, 0 of 100 bytes: {made[0].id}" in said
    assert made[1].id not in said
    status, said = look(copy, "--json")
    assert [one["file"] for one in json.loads(said)["incomplete"]] == [made[0].id]


async def test_rows_that_cannot_be_read_are_said_so(tmp_path: Path) -> None:
    live, copy = tmp_path / "live", tmp_path / "copy"
    await backed_up(live, copy)
    assert look(tmp_path / "nothing")[0] == 2
    rows = copy / "loraplex.db"
    whole = rows.read_bytes()
    rows.write_bytes(b"x" * 4096)
    assert look(copy)[0] == 2
    with closing(sqlite3.connect(":memory:")) as empty:
        page = empty.execute("PRAGMA page_size").fetchone()[0]
    rows.write_bytes(whole[: 2 * page] + b"\xff" * page + whole[3 * page :])
    status, said = look(copy)
    assert status == 2, said
    assert look(copy, "--repair")[0] == 2
    assert look(copy, "--url", "http://127.0.0.1:1")[0] == 2


@pytest.mark.parametrize("rots", ["changed", "cut"])
async def test_backups_find_what_has_rotted_and_copy_it_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rots: str
) -> None:
    live, copy = tmp_path / "live", tmp_path / "copy"
    digests = await backed_up(live, copy, 4)
    rotten = copy / "blobs" / digests[2]
    change_a_byte(rotten)
    if rots == "cut":
        os.truncate(rotten / "adapter_config.json", 3)
    for digest in digests:  # read long ago, this one last
        os.utime(copy / "blobs" / digest, (1000 + (digest == digests[2]),) * 2)
    found = []
    for _ in digests:
        capsys.readouterr()
        assert data.back_up(settings(live), copy) == 0
        found.append(digests[2] in capsys.readouterr().out)
    assert found == [False, False, False, True], "each reads one of four, in turn"
    assert look(copy)[0] == 0
    assert {path.name for path in copy.iterdir()} == {"loraplex.db", "blobs"}
    assert blobs_in(copy) == set(digests)


async def test_what_has_rotted_on_both_sides_is_named_by_each_backup(tmp_path: Path) -> None:
    live, copy = tmp_path / "live", tmp_path / "copy"
    first, second = await backed_up(live, copy)
    for folder in (live, copy):
        change_a_byte(folder / "blobs" / first)
    os.utime(copy / "blobs" / first, (1000, 1000))
    seen = []
    for _ in range(2):
        done = backup.back_up(settings(live).database_url, live / "blobs", copy)
        assert (done.broken, done.present, done.verified, done.repaired) == ((first,), 1, 1, ())
        seen.append((copy / "blobs" / second).stat().st_mtime_ns)
    assert seen[0] < seen[1], "it takes nobody's turn"
    assert blobs_in(copy) == {first, second}
    async with fake_site(live) as site:
        assert (await site.upload("acme", "a", tiny.adapter(1))).status_code == 201  # the cure
    done = backup.back_up(settings(live).database_url, live / "blobs", copy)
    assert (done.broken, done.repaired, done.copied) == ((), (first,), 1)
