"""How many connections may have requests of one key, or of one customer, under way."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

import pytest

from server.http.connection import BoundedHeads
from server.http.shares import SHARE, shares_of
from tests.service.http.test_connections import chat_request, opened
from tests.support import tiny
from tests.support.bad_requests import CHAT
from tests.support.fakes import FakeEngine, Times
from tests.support.site import SERVICE_KEY, Site
from tests.support.tiny import fake_site


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(BoundedHeads, "limit", 20)
    return 20


def _asked(*headers: str, target: str = "GET /v1/models", then: str = "close") -> bytes:
    lines = (f"{target} HTTP/1.1", "Host: x", f"Connection: {then}", *headers)
    return "\r\n".join([*lines, "", ""]).encode()


async def _until_told(site: Site, asked: bytes, status: bytes) -> bytes:
    async with asyncio.timeout(60):
        while not (told := await _told(site, asked)).startswith(b"HTTP/1.1 " + status):
            await asyncio.sleep(0.02)
    return told


async def _until_shares(site: Site, *counts: int) -> None:
    async with asyncio.timeout(60):
        while str(shares_of(site.server.server_state)) != f"<Shares {list(counts)}>":
            await asyncio.sleep(0.02)


async def test_one_key_has_a_share_of_the_connections(tmp_path: Path, few: int) -> None:
    """Whatever its requests wait for, others find a place; and it may ask again when some have ended."""
    engine = FakeEngine(tiny.base())
    async with fake_site(tmp_path, engine) as site:
        greedy = await site.tenant("acme", {"a": tiny.adapter(1)})
        other = await site.tenant("globex", {"a": tiny.adapter(1)})
        engine.times = Times(step=30.0)
        held = [await opened(site, chat_request(greedy)) for _ in range(int(few * SHARE))]
        key = f"Authorization: Bearer {greedy}"
        refusal = await _until_told(site, _asked(f"Authorization:  bearer   {greedy}"), b"429 ")
        assert b"Retry-After: 1" in refusal
        assert b'"type": "rate_limit_error"' in refusal
        assert b'"code": "too_many_connections"' in refusal
        siblings = (f"x-api-key: {greedy}", f"X-Api-Key: {greedy}\r\nAuthorization: Basic eDp5")
        for header in (*siblings, f"{key}\r\nX-Customer-ID: nobody"):
            assert (await _told(site, _asked(header))).startswith(b"HTTP/1.1 429 "), header
        assert (await _told(site, _asked(f"Authorization: Bearer {other}"))).startswith(b"HTTP/1.1 200 ")
        _leave(held[:3])
        await _until_told(site, _asked(key), b"200 ")
        _leave(held)
        await _until_shares(site)


async def test_all_keys_of_a_customer_have_one_share(tmp_path: Path, few: int) -> None:
    """Also what comes through a gateway for it."""
    engine = FakeEngine(tiny.base())
    async with fake_site(tmp_path, engine) as site:
        other = await site.tenant("globex", {"a": tiny.adapter(1)})
        keys = [await site.tenant("acme", {"a": tiny.adapter(1)})]
        for _ in range(int(few * SHARE)):
            made = await site.admin.post("/admin/v1/tenants/acme/keys", json={})
            keys.append(made.json()["key"])
        engine.times = Times(step=30.0)
        held = [await opened(site, chat_request(key)) for key in keys[1:]]
        await _until_shares(site, len(held), *[1] * len(held))
        refusal = await _until_told(site, _asked(f"Authorization: Bearer {keys[0]}"), b"429 ")
        assert b'"code":"too_many_connections"' in refusal
        assert b"retry-after: 1" in refusal
        vouched = _asked(f"Authorization: Bearer {SERVICE_KEY}", "X-Customer-ID: acme")
        assert (await _told(site, vouched)).startswith(b"HTTP/1.1 429 ")
        assert (await _told(site, _asked(f"Authorization: Bearer {other}"))).startswith(b"HTTP/1.1 200 ")
        _leave(held[:3])
        await _until_told(site, _asked(f"Authorization: Bearer {keys[0]}"), b"200 ")
        _leave(held)
        await _until_shares(site)


async def test_probes_with_a_key_at_its_share_are_answered(tmp_path: Path, few: int) -> None:
    """A probe or a scrape may come through a client that sends its key with everything."""
    engine = FakeEngine(tiny.base())
    async with fake_site(tmp_path, engine) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        engine.times = Times(step=30.0)
        held = [await opened(site, chat_request(key)) for _ in range(int(few * SHARE))]
        own = f"Authorization: Bearer {key}"
        await _until_told(site, _asked(own), b"429 ")
        for target in ("GET /health", "HEAD /ready", "GET /metrics?x=/y", "GET /health/#/x"):
            told = await _told(site, _asked(own, target=target))
            assert told.startswith(b"HTTP/1.1 200 "), (target, told)
        for target in (f"POST {CHAT}#/health", "PATCH /v1/adapters/health", "GET /v1/models?x=/health"):
            told = await _told(site, _asked(own, target=target))
            assert told.startswith(b"HTTP/1.1 429 "), (target, told)
        _leave(held)


async def test_each_customer_behind_a_gateway_has_a_share(tmp_path: Path, few: int) -> None:
    """The service key is the key of all of them."""
    engine = FakeEngine(tiny.base())
    async with fake_site(tmp_path, engine) as site:
        keys = {name: await site.tenant(name, {"a": tiny.adapter(1)}) for name in ("acme", "globex")}
        engine.times = Times(step=30.0)
        held = [await opened(site, chat_request(SERVICE_KEY, "acme")) for _ in range(int(few * SHARE))]
        vouched = f"Authorization: Bearer {SERVICE_KEY}"
        await _until_told(site, _asked(vouched, "X-Customer-ID: acme"), b"429 ")
        for headers in ((vouched, "X-Customer-ID: globex"), (f"Authorization: Bearer {keys['globex']}",)):
            told = await _told(site, _asked(*headers))
            assert told.startswith(b"HTTP/1.1 200 "), (headers, told)
        _leave(held)
        await _until_shares(site)


async def test_requests_behind_another_keys_count_beside_it(tmp_path: Path, few: int) -> None:
    """A junk key, sent behind a request under way, took that one's key off the count."""
    engine = FakeEngine(tiny.base())
    async with fake_site(tmp_path, engine) as site:
        greedy, other = [await site.tenant(name, {"a": tiny.adapter(1)}) for name in ("acme", "globex")]
        engine.times = Times(step=30.0)
        share = int(few * SHARE)
        behind = [_asked(f"x-api-key: junk{number}") for number in range(share)]
        held = [await opened(site, chat_request(greedy) + one) for one in behind]
        await _until_shares(site, share, share, *[1] * share)  # the key, its tenant, and the junk
        await _until_told(site, _asked(f"Authorization: Bearer {greedy}"), b"429 ")
        _leave(held)
        await _until_shares(site)
        async with asyncio.timeout(60):
            while site.server.server_state.tasks:  # what ran ahead of another request ends with its client
                await asyncio.sleep(0.02)
        # Each counts until its own answer, not until that of the last one behind it.
        quick = _asked(f"Authorization: Bearer {greedy}", then="keep-alive")
        held = [await opened(site, quick + chat_request(other)) for _ in range(3)]
        for reader, _ in held:
            assert (await asyncio.wait_for(reader.readline(), 60)).startswith(b"HTTP/1.1 200 ")
        await _until_shares(site, 3, 3)  # the key and its tenant
        _leave(held)
        await _until_shares(site)


def _leave(held: Iterable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
    for _, writer in held:
        writer.transport.abort()


async def _told(site: Site, asked: bytes) -> bytes:
    reader, writer = await opened(site, asked)
    try:
        return await reader.read()
    finally:
        writer.close()
