"""Rows against bytes: what a check finds, and what a repair may do about it."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete

from adapters.database.rows import BatchResultRow, FilePieceRow
from adapters.model import WEIGHTS_FILE
from server.cli import data
from tests.service.batches.test_batches import ended, jsonl, line, started
from tests.service.http.test_api import error
from tests.service.store.test_fitness import BASE, engine_of, narrowed, overwrite
from tests.support import tiny
from tests.support.databases import KINDS, with_tables
from tests.support.site import Site
from tests.support.tiny import fake_site, settings

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

CHECK = "/admin/v1/check"


async def filled(site: Site) -> tuple[str, dict[str, str]]:
    """A key, and the digests of the adapters ``a``, ``b`` and ``c`` by name."""
    key = await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2), "c": tiny.adapter(3)})
    shown = (await site.admin.get("/admin/v1/tenants/acme/adapters")).json()["data"]
    return key, {adapter["name"]: adapter["versions"][0]["digest"] for adapter in shown}


def spoil(folder: Path, digests: Mapping[str, str]) -> None:
    """``a`` changes, ``b`` is gone; there is a folder of nobody's, a broken one and a stray file."""
    blobs = folder / "blobs"
    overwrite(blobs / digests["a"] / WEIGHTS_FILE)
    (blobs / digests["b"]).chmod(0o755)
    shutil.rmtree(blobs / digests["b"])
    (blobs / ("0" * 64)).mkdir()
    (blobs / "notes.txt").write_text("mine")


def found_by(digests: Mapping[str, str]) -> dict[str, Any]:
    damaged = [
        {"digest": digests["a"], "reason": "changed", "versions": ["acme/a@1"]},
        {"digest": digests["b"], "reason": "missing", "versions": ["acme/b@1"]},
    ]
    return {
        "ok": False,
        "versions": 3,
        "files": 3,
        "damaged": sorted(damaged, key=lambda one: one["digest"]),
        "strays": ["notes.txt"],
        "moved": [],
    }


async def test_a_running_server_finds_and_moves_what_is_broken(tmp_path: Path) -> None:
    async with fake_site(tmp_path, engine_of(BASE)) as site:
        key, digests = await filled(site)
        assert (await site.admin.get(CHECK)).json()["ok"]
        spoil(tmp_path, digests)
    async with fake_site(tmp_path, engine_of(narrowed(BASE))) as site:
        found = (await site.admin.get(CHECK)).json()
        assert found.items() >= found_by(digests).items()
        assert [(one["digest"], one["whole"]) for one in found["unlinked"]] == [("0" * 64, False)]
        assert {one["adapter"] for one in found["unfit"]} == {"c"}
        assert len(list((tmp_path / "blobs").iterdir())) == 4, "a look changes nothing"
    async with fake_site(tmp_path, engine_of(BASE)) as site:
        moved = (await site.admin.post(CHECK, json={"repair": True})).json()["moved"]
        assert {name.partition("/")[2].rpartition("-")[0] for name in moved} == {
            digests["a"],
            "0" * 64,
            "notes.txt",
        }
        assert all((tmp_path / name).exists() for name in moved)
        assert [path.name for path in (tmp_path / "blobs").iterdir()] == [digests["c"]]
        error(await site.chat(key, "hi", model="a"), 503, "adapter_damaged")
        error(await site.chat(key, "hi", model="b"), 503, "adapter_damaged")
        assert (await site.chat(key, "hi", model="c")).status_code == 200
        for name, number in (("a", 1), ("b", 2)):
            assert (await site.upload("acme", name, tiny.adapter(number))).status_code == 201
            assert (await site.chat(key, "hi", model=f"{name}@1")).status_code == 200
        assert (await site.admin.get(CHECK)).json()["ok"]


@pytest.mark.parametrize("kind", KINDS)
async def test_the_command_line_finds_the_same_without_a_server(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    async with with_tables(kind, tmp_path) as url:
        here = settings(folder, database_url=url)
        async with fake_site(folder, engine_of(BASE), database_url=url) as site:
            _, digests = await filled(site)
            assert await offline(here) == 0
            assert await offline(here, repair=True) == 2
            assert "--url" in capsys.readouterr().err
        spoil(folder, digests)
        assert await offline(here, as_json=True) == 1
        found = json.loads(capsys.readouterr().out)
        assert found.items() >= found_by(digests).items()
        assert await offline(here) == 1
        shown = capsys.readouterr().out
        assert f"changed: {digests['a']}, of acme/a@1" in shown
        assert "not all is well" in shown
        assert await offline(here, repair=True) == 1
        assert len(list((folder / "aside").iterdir())) == 3


async def test_an_upload_beside_a_check_is_nothing_broken(tmp_path: Path) -> None:
    async with fake_site(tmp_path, engine_of(BASE)) as site:
        await filled(site)

        async def change() -> None:
            for number in range(6):
                await site.upload("acme", "d", tiny.adapter(4 + number % 2))
                await site.admin.delete("/admin/v1/tenants/acme/adapters/d")

        changing = asyncio.create_task(change())
        while not changing.done():
            found = (await site.admin.post(CHECK, json={"repair": True})).json()
            assert found["ok"], found
            assert found["moved"] == []


@pytest.mark.parametrize("kind", KINDS)
async def test_files_of_batches_are_held_against_their_rows(tmp_path: Path, kind: str) -> None:
    async with with_tables(kind, tmp_path) as url, fake_site(tmp_path, database_url=url) as site:
        async with site.openai(await site.tenant("acme")) as client:
            batch = await ended(client, (await started(client, jsonl(line(f"r{n}") for n in range(3)))).id)
        assert (await site.admin.get(CHECK)).json()["ok"]
        async with site.services.database.append() as session:
            await session.execute(delete(FilePieceRow).where(FilePieceRow.file == batch.input_file_id))
            await session.execute(delete(BatchResultRow).where(BatchResultRow.number == 2))
        found = (await site.admin.get(CHECK)).json()
    assert not found["ok"]
    stored = {one["file"]: (one["tenant"], one["stored_bytes"]) for one in found["incomplete"]}
    assert stored.keys() == {batch.input_file_id, batch.output_file_id}
    assert stored[batch.input_file_id] == ("acme", 0)


@pytest.mark.parametrize("what", ["folder", "database"])
async def test_what_is_not_there_is_not_made(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    if what == "database":
        folder.mkdir()
    assert await offline(settings(folder)) == 2
    assert "there is no" in capsys.readouterr().err
    assert not (folder / "loraplex.db").exists()
    assert folder.exists() == (what == "database")


async def offline(here: Any, *, repair: bool = False, as_json: bool = False) -> int:
    return await asyncio.to_thread(data.check, here, repair=repair, as_json=as_json)
