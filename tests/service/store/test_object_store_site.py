"""A server whose adapters live in an object store: uploads, fetches, outages, and whose store it is."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest

from adapters.store.objects import ObjectStore, WrongStore
from adapters.store.ownership import WrongDatabase
from server.app import create_app
from server.cli import data
from tests.support import tiny
from tests.support.fakes import FakeEngine
from tests.support.object_stores import KINDS, S3, url_of
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site, settings


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, s3: S3, tmp_path: Path) -> str:
    return url_of(request.param, s3, tmp_path)


def lose(folder: Path) -> None:
    """All copies of adapters' files that this server has."""
    for blob in (folder / "blobs").iterdir():
        blob.chmod(0o755)
        shutil.rmtree(blob)


def copies(folder: Path) -> int:
    return len(list((folder / "blobs").iterdir()))


async def ask(site: Site, key: str, model: str) -> Any:
    return await site.chat(key, "hello", model=model, max_tokens=2)


def code(answer: Any) -> tuple[int, str | None]:
    error = answer.json().get("error")
    return answer.status_code, error and error["code"]


async def start(folder: Path, url: str) -> None:
    """A start that must be refused before there is an engine."""

    async def never(_: Any) -> NoReturn:
        raise AssertionError("an engine was started")

    app = create_app(settings(folder, blobs_url=url), start_engine=never)
    async with app.router.lifespan_context(app):
        raise AssertionError("it started")


async def test_an_adapter_that_is_not_here_is_fetched(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    async with fake_site(folder, blobs_url=url) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2)})
        assert code(await ask(site, key, "a")) == (200, None)
    lose(folder)
    async with fake_site(folder, blobs_url=url) as site:
        answers = await asyncio.gather(*(ask(site, key, name) for name in "aabb"))
        assert [code(answer) for answer in answers] == [(200, None)] * 4
        assert copies(folder) == 2
        metrics = (await site.http.get("/metrics")).text
        assert 'loraplex_fetch_seconds_count{outcome="fetched"} 2.0' in metrics


async def test_while_the_store_is_down_what_is_here_is_served(s3: S3, tmp_path: Path) -> None:
    """Whatever else is asked for gets a 503 that says when to come back; then all is as before."""
    folder, url = tmp_path / "data", s3.bucket()
    async with fake_site(folder, blobs_url=url) as site:
        key = await site.tenant("acme", {name: tiny.adapter(n) for n, name in enumerate("abc")})
    lose(folder)
    async with fake_site(folder, blobs_url=url, gpu_slots=1, host_slots=1) as site:
        for name in "ab":
            assert code(await ask(site, key, name)) == (200, None)
        s3.stop()
        try:
            for name in "abab":
                assert code(await ask(site, key, name)) == (200, None)
            refused = await ask(site, key, "c")
            assert code(refused) == (503, "store_unavailable")
            assert int(refused.headers["retry-after"]) >= 1
            assert code(await site.upload("acme", "d", tiny.adapter(4))) == (503, "store_unavailable")
            assert code(await ask(site, key, "d")) == (404, "model_not_found")
            ready = await site.http.get("/ready")
            assert (ready.status_code, ready.json()["checks"]["store"]) == (200, "StoreUnavailable")
        finally:
            s3.start()
        assert code(await ask(site, key, "c")) == (200, None)
        assert (await site.upload("acme", "d", tiny.adapter(4))).status_code == 201
        assert code(await ask(site, key, "d")) == (200, None)
        assert (await site.http.get("/ready")).status_code == 200


async def test_a_start_while_the_store_is_down(s3: S3, tmp_path: Path) -> None:
    folder, url = tmp_path / "data", s3.bucket()
    async with fake_site(folder, blobs_url=url) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
    s3.stop()
    try:
        async with fake_site(folder, blobs_url=url) as site:
            assert code(await ask(site, key, "a")) == (200, None)
    finally:
        s3.start()


async def test_what_the_store_has_lost_is_one_versions_failure(s3: S3, tmp_path: Path) -> None:
    folder, url = tmp_path / "data", s3.bucket()
    async with fake_site(folder, blobs_url=url) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2)})
        shown = await site.admin.get("/admin/v1/tenants/acme/adapters/a")
    await ObjectStore(url).remove(shown.json()["versions"][0]["digest"])
    lose(folder)
    async with fake_site(folder, blobs_url=url) as site:
        lost, other = await asyncio.gather(ask(site, key, "a"), ask(site, key, "b"))
        assert code(lost) == (503, "adapter_files_missing")
        assert code(other) == (200, None)
        again = await site.upload("acme", "a", tiny.adapter(1))
        assert again.status_code == 201
        assert code(await ask(site, key, "a")) == (200, None)


async def test_no_start_on_the_store_of_another_installation(url: str, tmp_path: Path) -> None:
    async with fake_site(tmp_path / "one", blobs_url=url) as site:
        await site.tenant("acme", {"a": tiny.adapter(1)})
    async with fake_site(tmp_path / "two") as site:
        await site.tenant("acme", {"b": tiny.adapter(2)})
    before = (await ObjectStore(url).ages()).keys()
    with pytest.raises(WrongDatabase, match="none on record"):
        await start(tmp_path / "new", url)
    with pytest.raises(WrongStore, match="belongs to another installation"):
        await start(tmp_path / "two", url)
    assert (await ObjectStore(url).ages()).keys() == before
    adopted = await asyncio.to_thread(data.adopt, settings(tmp_path / "two", blobs_url=url))
    assert adopted == data.OK
    async with fake_site(tmp_path / "two", blobs_url=url):
        assert (await ObjectStore(url).ages()).keys() > before, "joined, and nothing removed"


async def test_a_new_data_folder_joins_a_store_with_the_same_database(url: str, tmp_path: Path) -> None:
    """As a second replica does, or a new machine."""
    database = _sqlite(tmp_path / "shared.db")
    async with fake_site(tmp_path / "one", blobs_url=url, database_url=database) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
    async with fake_site(tmp_path / "two", blobs_url=url, database_url=database) as site:
        assert code(await ask(site, key, "a")) == (200, None)


async def test_from_a_data_folder_to_an_object_store(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    async with fake_site(folder) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
    async with fake_site(folder, blobs_url=url) as site:
        assert len(await ObjectStore(url).ages()) == 1
    lose(folder)
    async with fake_site(folder, blobs_url=url) as site:
        assert code(await ask(site, key, "a")) == (200, None)


async def test_what_does_not_fit_goes_but_never_what_is_in_memory(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    fields = {"blobs_url": url, "gpu_slots": 2, "host_slots": 3, "blobs_cache": 1}
    async with fake_site(folder, FakeEngine(tiny.base(), gpu_slots=2, host_slots=3), **fields) as site:
        names = "abcdef"
        key = await site.tenant("acme", {name: tiny.adapter(n) for n, name in enumerate(names)})
        for _ in range(2):
            for name in names:
                assert code(await ask(site, key, name)) == (200, None)
        held = site.services.dispatcher.known_digests()
        here = {blob.name for blob in (folder / "blobs").iterdir()}
        assert held <= here
        assert len(here) <= 4


async def test_deleted_is_deleted_in_the_store(url: str, tmp_path: Path) -> None:
    async with fake_site(tmp_path / "data", blobs_url=url) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        gone = await site.http.delete("/v1/adapters/a", headers=bearer(key))
        gone = (
            gone if gone.status_code < 400 else await site.admin.delete("/admin/v1/tenants/acme/adapters/a")
        )
        assert gone.status_code < 300
        deadline = time.monotonic() + 60
        while await ObjectStore(url).ages():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)


def _sqlite(path: Path) -> str:
    return f"sqlite+aiosqlite:///{os.fspath(path)}"
