"""A backup ends before it takes what is to stay free, also where it does not know what it will copy."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from adapters.store import backup, transfer
from adapters.store.objects import ObjectStore
from server.cli import data
from tests.support import tiny
from tests.support.databases import empty
from tests.support.tiny import fake_site, settings


async def test_of_postgresql_it_ends_while_rows_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    live, copy, usage, looks = tmp_path / "live", tmp_path / "copy", shutil.disk_usage, 0

    def shrinking(folder: Path) -> Any:
        nonlocal looks
        if Path(folder) != copy:
            return usage(folder)
        looks += 1
        return usage(folder)._replace(free=1 << 40 if looks < 4 else 0)

    def never(_: Path) -> set[str]:
        raise AssertionError("all rows were written")

    async with empty("postgres", tmp_path) as url, fake_site(live, database_url=url) as site:
        await site.tenant("acme", {"a": tiny.adapter(1)})
        here = settings(live, database_url=url)
        assert await asyncio.to_thread(data.back_up, here, copy) == data.OK
        before = (copy / "loraplex.db").read_bytes()
        monkeypatch.setattr(shutil, "disk_usage", shrinking)
        monkeypatch.setattr(transfer, "_BATCH", 1)
        monkeypatch.setattr(backup, "_linked", never)
        assert await asyncio.to_thread(data.back_up, here, copy) == data.FAILED
    assert "DISK_RESERVE" in capsys.readouterr().err
    assert (copy / "loraplex.db").read_bytes() == before
    assert {path.name for path in copy.iterdir()} == {"loraplex.db", "blobs"}, "nothing half"


async def test_what_has_no_room_is_not_fetched_from_an_object_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    live, copy, store = tmp_path / "live", tmp_path / "copy", f"file://{tmp_path}/store"
    usage, fetched = shutil.disk_usage, 0
    async with fake_site(live, blobs_url=store) as site:
        await site.tenant("acme", {"a": tiny.adapter(1)})
    (blob,) = (live / "blobs").iterdir()
    size = sum(file.stat().st_size for file in blob.iterdir())
    blob.chmod(0o755)
    shutil.rmtree(blob)
    here, real = settings(live, blobs_url=store), ObjectStore.get
    room = size - 1

    async def get(self: ObjectStore, digest: str, into: Path) -> Any:
        nonlocal fetched
        fetched += 1
        return await real(self, digest, into)

    def limited(folder: Path) -> Any:
        has_rows = any(path.name.startswith(".loraplex") for path in copy.iterdir())
        return usage(folder)._replace(free=here.disk_reserve + (room if has_rows else 1 << 40))

    monkeypatch.setattr(ObjectStore, "get", get)
    monkeypatch.setattr(shutil, "disk_usage", limited)
    assert await asyncio.to_thread(data.back_up, here, copy) == data.FAILED
    assert "DISK_RESERVE" in capsys.readouterr().err
    assert fetched == 0
    room = size
    assert await asyncio.to_thread(data.back_up, here, copy) == data.OK
    assert fetched == 1
