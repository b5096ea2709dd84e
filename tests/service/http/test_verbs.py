"""HEAD and OPTIONS of every call, and what a 405 says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.fakes import FakeEngine
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path, FakeEngine(tiny.base())) as site:
        yield site


async def test_head_is_get_without_its_body_on_every_path(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    document = (await site.http.get("/openapi.json")).json()
    paths = [path for path, methods in document["paths"].items() if "get" in methods]
    assert len(paths) > 30
    for path in [*paths, "/docs", "/redoc"]:
        url = path.replace("{", "").replace("}", "")
        headers = dict(site.admin.headers) if url.startswith("/admin") else bearer(key)
        get, head, slash = await asyncio.gather(
            site.http.get(url, headers=headers),
            site.http.head(url, headers=headers),
            site.http.head(f"{url}/", headers=headers),
        )
        assert head.status_code == slash.status_code == get.status_code, url
        assert head.content == b""
        assert head.headers["content-type"] == get.headers["content-type"]
        assert "x-request-id" in head.headers


async def test_head_of_a_stream_ends(site: Site) -> None:
    headers = {"Accept": "text/event-stream"}
    async with asyncio.timeout(60):
        head = await site.admin.head("/admin/v1/residency", headers=headers)
    assert head.status_code == 200
    assert head.headers["content-type"].startswith("text/event-stream")
    assert (await site.admin.get("/admin/v1/residency")).status_code == 200


async def test_head_needs_the_same_key(site: Site) -> None:
    assert (await site.http.head("/v1/models")).status_code == 401
    assert (await site.http.head("/admin/v1/tenants", headers=bearer("x"))).status_code == 401


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/v1/chat/completions", "OPTIONS, POST"),
        ("/v1/files", "GET, HEAD, OPTIONS, POST"),
        ("/v1/files/x", "DELETE, GET, HEAD, OPTIONS"),
        ("/admin/v1/tenants/x", "DELETE, GET, HEAD, OPTIONS, PATCH"),
        ("/health", "GET, HEAD, OPTIONS"),
    ],
)
async def test_options_and_a_405_name_all_methods(site: Site, path: str, methods: str) -> None:
    options = await site.http.options(path)
    assert (options.status_code, options.headers["allow"], options.content) == (204, methods, b"")
    refused = await site.http.put(path, headers=site.admin.headers)
    assert (refused.status_code, refused.headers["allow"]) == (405, methods)
    assert (await site.http.options("/nowhere")).status_code == 404
    assert (await site.http.head("/v1/chat/completions")).status_code == 405
