"""A backup taken under load is restored elsewhere, starts, and has all that was acknowledged before it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from adapters.model import WEIGHTS_FILE
from server.cli import data
from tests.support import tiny
from tests.support.databases import empty
from tests.support.tiny import fake_site, settings

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


async def test_broken_bytes_are_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live, copy = tmp_path / "live", tmp_path / "copy"
    async with fake_site(live) as site:
        await site.tenant("acme", {"a": tiny.adapter(1)})
    (digest,) = blobs_in(live)
    file = live / "blobs" / digest / WEIGHTS_FILE
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert data.back_up(settings(live), copy) == 1
    assert digest in capsys.readouterr().out
    assert blobs_in(copy) == set()


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
    (digest,) = blobs_in(copy)
    (copy / "blobs" / digest).chmod(0o700)
    shutil.rmtree(copy / "blobs" / digest)
    assert data.restore(settings(tmp_path / "other"), copy) == 2
    assert not (tmp_path / "other" / "loraplex.db").exists()


async def test_postgresql_is_told_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with empty("postgres", tmp_path) as url:
        assert data.back_up(settings(tmp_path / "live", database_url=url), tmp_path / "copy") == 2
    assert "pg_dump" in capsys.readouterr().err
