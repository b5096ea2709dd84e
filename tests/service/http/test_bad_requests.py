"""The bad requests that need no real engine, and the clients that misbehave on the wire."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server.http import connection
from server.http.connection import BoundedHeads
from tests.support import tiny
from tests.support.bad_requests import BAD, CHAT, GOOD, ask_all, bystander
from tests.support.fakes import FakeEngine, Times
from tests.support.site import ADMIN_KEY, Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")
PATIENCE = 0.6  # of a server that was told to be impatient


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    engine = FakeEngine(tiny.base(), times=Times(step=0.005), max_model_len=4096)
    async with fake_site(tmp_path, engine, client_timeout=600) as site:
        yield site


def impatient(site: Site, *, heads: bool = True) -> None:
    """From now on: whoever has asked before has all the time that he needs."""
    site.services.settings = site.services.settings.model_copy(update={"client_timeout": PATIENCE})
    if heads:
        BoundedHeads.seconds = PATIENCE


@pytest.fixture
async def key(site: Site) -> str:
    return await site.tenant("acme", {"a": tiny.adapter(1)})


def test_there_are_enough_of_them() -> None:
    assert len(BAD) >= 40
    assert len({bad.name for bad in BAD}) == len(BAD)


async def test_each_has_its_status_and_code_and_breaks_nothing(site: Site, key: str) -> None:
    await ask_all(site, key, tokens=60, bads=[bad for bad in BAD if not bad.real])


SETTING = [
    ("POST", "/admin/v1/tenants"),
    ("PATCH", "/admin/v1/tenants/acme"),
    ("POST", "/admin/v1/tenants/acme/keys"),
    ("PATCH", "/admin/v1/tenants/acme/adapters/a"),
    ("POST", "/admin/v1/tenants/acme/adapters/a/rollouts"),
    ("POST", "/admin/v1/people"),
    ("POST", "/v1/batches"),
]


async def test_what_sets_something_holds_no_thousands_of_values(site: Site, key: str) -> None:
    """Each unknown field was an error of its own, of which one was told."""
    many = json.dumps({f"k{n}": n for n in range(5000)}).encode()
    for method, url in SETTING:
        headers = bearer(key if url.startswith("/v1") else ADMIN_KEY)
        answer = await site.http.request(method, url, content=many, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json"), url
        assert "more than 4096" in answer.text


async def raw(site: Site, sent: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(site.url.rsplit(":", 1)[1]))
    writer.write(sent)
    return reader, writer


def head(key: str, *more: str, length: int = 0) -> bytes:
    lines = (f"POST {CHAT} HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", *more)
    lines += (f"Content-Length: {length}",)
    return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n"


async def answered(reader: asyncio.StreamReader, status: int, code: str) -> None:
    """That, and then the connection is closed."""
    async with asyncio.timeout(60):
        told = await reader.read()
    first, _, body = told.partition(b"\r\n\r\n")
    assert first.startswith(f"HTTP/1.1 {status} ".encode()), told
    assert json.loads(body)["error"]["code"] == code


@pytest.mark.parametrize("shape", ["one header", "many headers", "a path"])
async def test_a_flood_of_headers(site: Site, key: str, shape: str) -> None:
    """Also one that never ends: no more than a little of it is kept."""
    begin = b"GET / HTTP/1.1\r\nHost: x\r\n"
    flood = {
        "one header": begin + b"X-A: " + b"x" * (128 << 10),
        "many headers": begin + b"X-A: b\r\n" * (16 << 10),
        "a path": b"GET /" + b"x" * (128 << 10),
    }[shape]
    beside = asyncio.create_task(bystander(site, key, 60))
    reader, _ = await raw(site, flood)
    await answered(reader, 431, "head_too_large")
    assert await beside
    assert (await site.http.get("/health")).status_code == 200


async def test_large_heads_are_served_up_to_the_bound(site: Site, key: str) -> None:
    body = json.dumps(GOOD[CHAT]).encode()
    sent = head(key, "X-A: " + "x" * 50_000, "Connection: close", length=len(body)) + body
    reader, _ = await raw(site, sent)
    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")


async def test_a_head_that_does_not_end(site: Site) -> None:
    impatient(site)
    for sent in (b"", b"POST /v1/chat", b"GET / HTTP/1.1\r\nHost: x\r\nX-A: "):
        reader, _ = await raw(site, sent)
        await answered(reader, 408, "request_timeout")


async def test_a_second_head_on_a_connection_that_does_not_end(site: Site, key: str) -> None:
    body = json.dumps(GOOD[CHAT]).encode()
    reader, writer = await raw(site, head(key, length=len(body)) + body)
    length = 0
    while (line := await reader.readline()) != b"\r\n":
        if line.lower().startswith(b"content-length"):
            length = int(line.split(b":")[1])
    assert json.loads(await reader.readexactly(length))["object"] == "chat.completion"
    impatient(site)
    writer.write(b"POST /v1")
    await answered(reader, 408, "request_timeout")


@pytest.mark.parametrize("path", [CHAT, "/admin/v1/tenants", "/admin/v1/tenants/acme/adapters/b/versions"])
async def test_a_body_that_does_not_come(site: Site, key: str, path: str) -> None:
    kind = "multipart/form-data; boundary=x" if "versions" in path else "application/json"
    asker = key if path == CHAT else ADMIN_KEY
    asked = head(asker, f"Content-Type: {kind}", length=1000).replace(CHAT.encode(), path.encode())
    beside = asyncio.create_task(bystander(site, key, 60))
    async with asyncio.timeout(60):
        while not site.services.engine.calls:
            await asyncio.sleep(0.01)
    impatient(site)
    reader, _ = await raw(site, asked + (b"--x" if "versions" in path else b'{"a'))
    await answered(reader, 408, "request_timeout")
    assert await beside


async def test_a_body_that_trickles(site: Site, key: str) -> None:
    impatient(site)
    reader, writer = await raw(site, head(key, length=1000))
    trickling = asyncio.create_task(_trickle(writer))
    await answered(reader, 408, "request_timeout")
    trickling.cancel()


async def test_an_answer_is_not_lost_to_what_is_still_being_sent(
    site: Site, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that is closed with bytes unread is reset, and takes an answer that is not read along."""
    monkeypatch.setattr(connection, "_LINGER", 60.0)
    impatient(site)
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", int(site.url.rsplit(":", 1)[1])))
        await loop.sock_sendall(client, head(key, length=1000))
        async with asyncio.timeout(60):
            while not _has_come(client):
                await asyncio.sleep(0.01)
        for _ in range(2):
            await loop.sock_sendall(client, b" ")
            await asyncio.sleep(0.05)
        assert (await loop.sock_recv(client, 1 << 16)).startswith(b"HTTP/1.1 408 ")


def _has_come(client: socket.socket) -> bool:
    try:
        return bool(client.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


async def _trickle(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b" ")
        await asyncio.sleep(PATIENCE / 5)


async def test_a_reader_that_stops_reading_loses_its_place(site: Site, key: str) -> None:
    """Eight choices of 4,000 tokens are more than the sockets hold."""
    body = json.dumps(GOOD[CHAT] | {"max_tokens": 4000, "n": 8, "stream": True}).encode()
    impatient(site, heads=False)
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(deaf, ("127.0.0.1", int(site.url.rsplit(":", 1)[1])))
    await loop.sock_sendall(deaf, head(key, length=len(body)) + body)
    engine = site.services.engine
    engine.times.step = 0
    async with asyncio.timeout(60):
        while not engine.running:
            await asyncio.sleep(0.01)
    async with asyncio.timeout(60):
        while site.services.dispatcher.open_leases():
            await asyncio.sleep(0.05)
    site.services.settings = site.services.settings.model_copy(update={"client_timeout": 600})
    page = (await site.http.get("/metrics")).text
    assert 'loraplex_requests_total{outcome="disconnected",tenant="acme"} 1.0' in page
    assert await bystander(site, key, 20)
    deaf.close()
