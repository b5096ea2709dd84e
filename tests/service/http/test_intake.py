"""What uploads take while their bytes come: a customer's quota, places, room on the disk."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from server.publishing import intake as intakes
from server.publishing.intake import FORM_BYTES
from tests.support import tiny
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site

MIB = 1 << 20


async def writer_key(site: Site, id_: str, **limits: int) -> str:
    await site.tenant(id_, limits=limits)
    made = await site.admin.post(f"/admin/v1/tenants/{id_}/keys", json={"scopes": ["adapters:write"]})
    return str(made.json()["key"])


async def upload(site: Site, key: str, name: str = "a", seed: int = 1) -> httpx.Response:
    files = {n: (tiny.adapter(seed) / n).read_bytes() for n in (CONFIG_FILE, WEIGHTS_FILE)}
    return await site.http.post(f"/v1/adapters/{name}/versions", files=files, headers=bearer(key))


class Sender:
    """A raw upload: its bytes come when a test says so."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    @asynccontextmanager
    async def begun(cls, site: Site, key: str, name: str = "slow") -> AsyncIterator[Sender]:
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(site.url).port)
        writer.write(
            f"POST /v1/adapters/{name}/versions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {64 * MIB}\r\n\r\n"
            f'--b\r\nContent-Disposition: form-data; name="{WEIGHTS_FILE}"; filename="w"\r\n\r\n'.encode()
        )
        await writer.drain()
        try:
            yield cls(reader, writer)
        finally:
            writer.transport.abort()

    async def send(self, size: int) -> None:
        self._writer.write(bytes(size))
        await self._writer.drain()

    async def status(self) -> int:
        async with asyncio.timeout(60):
            return int((await self._reader.readline()).split()[1])


async def coming(site: Site, count: int) -> None:
    """Until so many uploads have a place."""
    places = site.services.intake._places
    async with asyncio.timeout(60):
        while sum(map(len, places.values())) != count:
            await asyncio.sleep(0.01)


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "quarantine").rglob("*") if path.is_file())


async def test_uploads_that_never_end_take_no_more_than_the_quota_together(tmp_path: Path) -> None:
    async with fake_site(tmp_path) as site:
        key = await writer_key(site, "acme", max_storage_bytes=2 * MIB)
        async with (
            Sender.begun(site, key) as one,
            Sender.begun(site, key) as two,
            Sender.begun(site, key) as three,
        ):
            await asyncio.gather(*(sender.send(MIB - 1000) for sender in (one, two)))
            async with asyncio.timeout(60):
                while site.services.intake.coming("acme") < 2 * (MIB - 1000 - FORM_BYTES):
                    await asyncio.sleep(0.01)
            await three.send(MIB)
            assert await three.status() == 403
            await coming(site, 2)
            assert on_disk(tmp_path) <= 4 * MIB
            assert (await upload(site, key)).json()["error"]["code"] == "quota_exceeded"
        await coming(site, 0)
        assert (await upload(site, key)).status_code == 201


async def test_the_bytes_of_an_archive_count_too(tmp_path: Path) -> None:
    async with fake_site(tmp_path) as site:
        key = await writer_key(site, "acme", max_storage_bytes=MIB)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            for name, content in ((CONFIG_FILE, b"{}"), (WEIGHTS_FILE, bytes(8 * MIB))):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        headers = bearer(key) | {"Content-Type": "application/gzip"}
        answer = await site.http.post("/v1/adapters/a/versions", content=packed.getvalue(), headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "quota_exceeded")
        assert on_disk(tmp_path) == 0


async def test_an_upload_that_was_linked_counts_for_those_beside_it(tmp_path: Path) -> None:
    size = sum((tiny.adapter(1) / n).stat().st_size for n in (CONFIG_FILE, WEIGHTS_FILE))
    async with fake_site(tmp_path) as site:
        key = await writer_key(site, "acme", max_storage_bytes=size + 100)
        async with Sender.begun(site, key) as beside:
            await coming(site, 1)
            assert (await upload(site, key)).status_code == 201
            await beside.send(FORM_BYTES + 1000)
            assert await beside.status() == 403


async def test_one_customer_has_so_many_uploads_at_once(tmp_path: Path) -> None:
    async with fake_site(tmp_path, max_uploads_each=2) as site:
        key, other = await writer_key(site, "acme"), await writer_key(site, "other")
        async with Sender.begun(site, key), Sender.begun(site, key):
            await coming(site, 2)
            refused = await upload(site, key)
            assert (refused.status_code, bool(refused.headers["Retry-After"])) == (429, True)
            assert (await upload(site, other)).status_code == 201
        await coming(site, 0)
        assert (await upload(site, key)).status_code == 201


async def test_an_upload_that_is_answered_before_it_is_linked_keeps_its_place(tmp_path: Path) -> None:
    async with fake_site(tmp_path, max_uploads_each=1) as site:
        key = await writer_key(site, "acme")
        reached, go_on = asyncio.Event(), asyncio.Event()
        probe = site.services.publishing.prober.probe

        async def held(*args: object) -> object:
            reached.set()
            await go_on.wait()
            return await probe(*args)

        site.services.publishing.prober.probe = held
        files = {n: (tiny.adapter(1) / n).read_bytes() for n in (CONFIG_FILE, WEIGHTS_FILE)}
        url = "/v1/adapters/a/versions?wait=false"
        assert (await site.http.post(url, files=files, headers=bearer(key))).status_code == 202
        await reached.wait()
        assert (await upload(site, key, seed=2)).status_code == 429
        go_on.set()
        await coming(site, 0)
        assert (await upload(site, key, seed=2)).status_code == 201


async def test_a_slow_upload_gives_way_and_a_quick_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intakes, "SLOW_AFTER_S", 600.0)
    async with fake_site(tmp_path, max_uploads=2) as site:
        quick_key, slow_key, other = [await writer_key(site, id_) for id_ in ("quick", "slow", "other")]
        async with Sender.begun(site, quick_key) as quick, Sender.begun(site, slow_key) as slow:
            await coming(site, 2)
            refused = await upload(site, other)
            assert (refused.status_code, bool(refused.headers["Retry-After"])) == (503, True)
            monkeypatch.setattr(intakes, "SLOW_AFTER_S", 0.5)
            for _ in range(12):
                await quick.send(64 << 10)
                await slow.send(10)
                await asyncio.sleep(0.05)
            assert (await upload(site, other)).status_code == 201
            assert await slow.status() == 408
            await coming(site, 1)
            assert not quick._reader.at_eof()


async def test_the_reserve_of_the_disk_stays_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with fake_site(tmp_path) as site:
        key = await writer_key(site, "acme")
        intake = site.services.intake
        async with Sender.begun(site, key) as sender:
            await coming(site, 1)
            monkeypatch.setattr(intake, "reserve", 1 << 60)
            await sender.send(6 * MIB)
            assert await sender.status() == 507
        refused = await upload(site, key)
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage_full")
        assert on_disk(tmp_path) == 0
        assert (await site.http.get("/ready")).json()["uploads"] == "room"


async def test_a_hundred_and_fifty_uploads_that_hardly_come_leave_everybody_else_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intakes, "SLOW_AFTER_S", 0.3)
    async with fake_site(tmp_path, max_uploads=8, max_uploads_each=8) as site:
        key, other = await writer_key(site, "acme"), await writer_key(site, "other")
        opened = [Sender.begun(site, key) for _ in range(150)]
        for one in opened:
            await one.__aenter__()
        await coming(site, 8)
        assert (await site.http.get("/ready")).status_code == 200
        await asyncio.sleep(0.5)
        assert (await upload(site, other)).status_code == 201
        for one in opened:
            await one.__aexit__(None, None, None)
        await coming(site, 0)
