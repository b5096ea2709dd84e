"""What a client without a key may take: heads, trailers, chunks, pipelines and connections are bounded."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import tracemalloc
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server.http import connection
from server.http.connection import BoundedHeads, connections_for
from tests.support import tiny
from tests.support.bad_requests import CHAT, GOOD
from tests.support.fakes import FakeEngine, Times
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site

PATIENCE = 0.6
CHUNKED = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n".encode()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    engine = FakeEngine(tiny.base(), times=Times(step=0.005))
    async with fake_site(tmp_path, engine, client_timeout=600) as site:
        yield site


async def opened(site: Site, sent: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(site.url.rsplit(":", 1)[1]))
    writer.write(sent)
    return reader, writer


async def flooded(site: Site, begin: bytes, flood: bytes) -> bytes:
    """What the server answers when ``flood`` is sent until it closes; it must."""
    reader, writer = await opened(site, begin)
    answer = asyncio.create_task(reader.read())
    block = flood * (65536 // len(flood) + 1)
    told = b""
    async with asyncio.timeout(60):
        with contextlib.suppress(ConnectionError):
            while not answer.done():
                writer.write(block)
                await writer.drain()
                await asyncio.sleep(0)
        with contextlib.suppress(ConnectionError):  # reset while much was on its way
            told = await answer
    writer.close()
    return told


FLOODS = {
    "trailers": (CHUNKED + b"\r\n0\r\n", b"a: b\r\n"),
    "one trailer without end": (CHUNKED + b"\r\n0\r\na: ", b"b" * 100),
    "a trailer's name without end": (CHUNKED + b"\r\n0\r\n", b"a" * 100),
    "trailers that go on in the next line": (CHUNKED + b"\r\n0\r\na: b\r\n", b" b\r\n"),
    "trailers behind a body": (CHUNKED + b"\r\n2\r\n{}\r\n0\r\n", b"a: b\r\n"),
    "a chunk's extension without end": (CHUNKED + b"\r\n2;", b"a" * 100),
    "extensions without end": (CHUNKED + b"\r\n2", b";a=b"),
    "a chunk's size without end": (CHUNKED + b"\r\n", b"0" * 100),
    "a head that goes on in the next line": (b"GET / HTTP/1.1\r\nA: b\r\n", b" c\r\n"),
    "trailers in HTTP/1.0": (CHUNKED.replace(b"1.1", b"1.0") + b"\r\n0\r\n", b"a: b\r\n"),
    "empty lines before a request": (b"", b"\r\n"),
}


@pytest.mark.parametrize("what", FLOODS)
async def test_what_is_no_body_is_bounded(site: Site, what: str) -> None:
    """Nothing of it needs a key. At most what the sockets hold is taken, and little of it is kept."""
    gc.collect()
    tracemalloc.start()
    told = await flooded(site, *FLOODS[what])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert told[:12] in (b"HTTP/1.1 431", b"HTTP/1.1 400", b"HTTP/1.1 401", b""), told[:200]
    assert peak < 8 << 20
    assert (await site.http.get("/health")).status_code == 200


@pytest.mark.parametrize(
    ("first", "line", "status"),
    [
        ("/health", f"X: {'a' * 70_000}", 431),
        ("/health", "\r\n".join(f"X{n}: a" for n in range(10_000)), 431),
        (f"/{'a' * 70_000}", "X: a", 431),
        ("/health", f"X: {'a' * 60_000}", 200),
    ],
)
async def test_a_head_is_bounded_also_where_it_comes_in_one_piece(
    site: Site, first: str, line: str, status: int
) -> None:
    """Of what was read at once, which may be 256 KiB, all was taken."""
    sent = f"GET {first} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{line}\r\n\r\n"
    reader, writer = await opened(site, sent.encode())
    async with asyncio.timeout(60):
        told = await reader.read()
    writer.close()
    assert told.startswith(b"HTTP/1.1 %d " % status), told[:100]


async def test_a_connection_that_ended_leaves_nothing_to_the_collector_of_circles(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands that ended at once were collected at once, for which every stream waited."""
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    close, auth = "Connection: close\r\n", f"Authorization: Bearer {key}\r\n"
    stream = json.dumps(GOOD[CHAT] | {"stream": True})
    asked = [
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{auth}Content-Length: {len(stream)}\r\n{close}\r\n{stream}",
        f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{close}\r\n",
        "GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
        f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{auth}{close}\r\n",
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{auth}Content-Length: 2\r\n\r\n{{]",
        "GET / HTTP",
        "",
    ]
    made = list[weakref.ref[BoundedHeads]]()
    plain = BoundedHeads.connection_made

    def seen(one: BoundedHeads, transport: asyncio.Transport) -> None:
        made.append(weakref.ref(one))
        plain(one, transport)

    monkeypatch.setattr(BoundedHeads, "connection_made", seen)
    gc.collect()
    gc.disable()
    try:
        async with asyncio.timeout(60):
            for number, request in enumerate(asked, 1):
                reader, writer = await opened(site, request.encode())
                if close in request:
                    await reader.read()
                elif "Host" in request:
                    await reader.readuntil(b"\r\n\r\n")
                while len(made) < number:
                    await asyncio.sleep(0.01)
                writer.transport.abort()
                del reader, writer
            while any(one() is not None for one in made):
                await asyncio.sleep(0.05)
    finally:
        gc.enable()


async def test_trailers_without_end_are_answered_with_431(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    begin = CHUNKED + f"Authorization: Bearer {key}\r\n\r\n1\r\n{{\r\n0\r\n".encode()
    told = await flooded(site, begin, b"a: b\r\n")
    first, _, body = told.partition(b"\r\n\r\n")
    if told:
        assert first.startswith(b"HTTP/1.1 431 ")
        assert json.loads(body)["error"]["code"] == "head_too_large"


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_bodies_in_small_chunks_are_served(site: Site, size: int) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    sent = json.dumps(GOOD[CHAT] | {"messages": [{"role": "user", "content": "hi " * 200}]}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(sent), size):
            yield sent[start : start + size]

    answer = await site.http.post(CHAT, content=pieces(), headers=bearer(key))
    assert answer.status_code in (200, 400), answer.text
    assert "head_too_large" not in answer.text


async def test_trailers_within_the_bound_are_served(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    body = json.dumps(GOOD[CHAT]).encode()
    sent = CHUNKED + f"Authorization: Bearer {key}\r\nConnection: close\r\n\r\n".encode()
    sent += b"%x;sig=abc\r\n%s\r\n0\r\n" % (len(body), body) + b"X-Sum: 1\r\n" * 100 + b"\r\n"
    reader, _ = await opened(site, sent)
    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")


async def test_trailers_that_trickle(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is given, and then the rest has some time to come."""
    monkeypatch.setattr(BoundedHeads, "rest_seconds", PATIENCE)
    reader, writer = await opened(site, CHUNKED + b"\r\n0\r\n")

    async def trickle() -> None:
        while True:
            writer.write(b"a: b\r\n")
            await asyncio.sleep(PATIENCE / 6)

    trickling = asyncio.create_task(trickle())
    async with asyncio.timeout(60):
        told = await reader.read()
    assert told.startswith(b"HTTP/1.1 401 ")
    trickling.cancel()


async def test_requests_ahead_of_their_answers_are_bounded(site: Site) -> None:
    told = await flooded(site, b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert told.count(b"HTTP/1.1 200") <= connection.PIPELINED + 1


async def test_a_few_requests_ahead_are_answered_in_order(site: Site) -> None:
    paths = ["/health", "/nothing", "/health", "/metrics"]
    requests = [f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for path in paths[:-1]]
    last = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    reader, _ = await opened(site, b"".join(requests) + last)
    async with asyncio.timeout(60):
        told = await reader.read()
    assert [told[i + 9 : i + 12] for i in range(len(told)) if told.startswith(b"HTTP/1.1 ", i)] == [
        b"200",
        b"404",
        b"200",
        b"200",
    ]


# --- connections ------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(BoundedHeads, "limit", 20)
    monkeypatch.setattr(connection, "STALLED_SECONDS", 0.1)
    return 20


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HT",
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
        CHUNKED + b"\r\n5\r\n{",
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{{".encode(),
    ],
)
async def test_idle_connections_make_room(site: Site, few: int, sent: bytes) -> None:
    held = [await opened(site, sent) for _ in range(few * 3)]  # none of them goes by itself
    for _ in range(3):
        async with asyncio.timeout(60):
            while not await _is_answered(
                site, "/ready", b"200"
            ):  # those of which a piece came just now are not idle yet
                await asyncio.sleep(0.05)
    for _, writer in held:
        writer.close()


async def test_bodies_that_come_too_slowly_make_room(site: Site, few: int) -> None:
    """A byte each so often is never a pause, and holds a place for as long as a body may take."""
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    lines = (f"POST {CHAT} HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", "Content-Length: 100000")
    begun = "\r\n".join([*lines, "", ""]).encode()
    held = [await opened(site, begun) for _ in range(few)]

    async def drip() -> None:
        while True:
            for _, writer in held:
                writer.write(b" ")
            await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    try:
        for _ in range(3):
            async with asyncio.timeout(60):
                while not await _is_answered(site, "/v1/models", b"401"):
                    await asyncio.sleep(0.05)
    finally:
        dripping.cancel()
        for _, writer in held:
            writer.close()


async def test_probes_are_answered_while_requests_take_all_places(tmp_path: Path, few: int) -> None:
    engine = FakeEngine(tiny.base())
    async with fake_site(tmp_path, engine) as site:
        keys = [await site.tenant(name, {"a": tiny.adapter(1)}) for name in ("acme", "globex")]
        engine.times = Times(step=30.0)
        held = [await opened(site, chat_request(keys[number % 2])) for number in range(few + 1)]
        async with asyncio.timeout(60):
            while not await _is_answered(site, "/v1/models", b"503"):  # until each place has its request
                await asyncio.sleep(0.05)
        for path in ("/ready", "/health", "/metrics") * 4:
            assert await _is_answered(site, path, b"200"), path
        reader, writer = await opened(site, b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        told = await reader.read()
        assert b"Retry-After: 1" in told
        assert b'"code": "too_many_connections"' in told
        writer.close()
        for _, holding in held:
            holding.transport.abort()


def chat_request(key: str, customer: str = "") -> bytes:
    body = json.dumps({"model": "a", "messages": [{"role": "user", "content": "hi"}]})
    named = f"X-Customer-ID: {customer}\r\n" if customer else ""
    return (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n{named}"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


async def _is_answered(site: Site, path: str, status: bytes) -> bool:
    """Whether a connection of its own gets this status for ``path``; False where that finds no room."""
    asked = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    reader, writer = await opened(site, asked)
    try:
        return (await reader.readline()).startswith(b"HTTP/1.1 " + status)
    except ConnectionError:
        return False
    finally:
        writer.close()


async def test_answers_under_way_are_not_cut_for_new_connections(site: Site, few: int) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    async with asyncio.timeout(60):
        asked = asyncio.create_task(site.chat(key, "hi", max_tokens=100))
        await asyncio.sleep(0.1)
        held = [await opened(site) for _ in range(few * 4)]
        assert (await asked).status_code == 200
    for _, writer in held:
        writer.close()


@pytest.mark.parametrize(("descriptors", "limit"), [(64, 16), (256, 64), (1024, 320), (1 << 20, 8192)])
def test_connections_leave_descriptors_to_uploads_and_files(descriptors: int, limit: int) -> None:
    assert connections_for(descriptors) == limit
    if descriptors > 200:
        assert 2 * limit + 64 < descriptors or limit == 8192


async def test_bodies_that_wait_are_bounded_for_each_customer_and_in_all(tmp_path: Path) -> None:
    """A key has as many connections as it likes; each held four megabytes for a minute."""
    async with fake_site(tmp_path, max_body_bytes=1 << 16, client_timeout=600) as site:
        keys = [await site.tenant(name, {"a": tiny.adapter(1)}) for name in ("acme", "globex", "initech")]
        bodies = site.services.bodies
        bodies._each, bodies._most = 3 << 16, 5 << 16
        part = b'{"a": "' + b"x" * 60_000
        writers = []

        async def waiting(key: str) -> asyncio.StreamReader:
            lines = (
                f"POST {CHAT} HTTP/1.1",
                "Host: x",
                f"Authorization: Bearer {key}",
                "Content-Length: 65000",
            )
            reader, writer = await opened(site, "\r\n".join([*lines, "", ""]).encode() + part)
            writers.append(writer)
            return reader

        for held, key in enumerate([keys[0]] * 3 + [keys[1]] * 2, 1):
            await waiting(key)
            async with asyncio.timeout(60):
                while bodies.bytes < held * len(part):
                    await asyncio.sleep(0.01)
        for key, status, code in ((keys[0], 429, "too_much_at_once"), (keys[2], 503, "server_overloaded")):
            told = await asyncio.wait_for((await waiting(key)).readuntil(b"}}"), 60)
            assert told.startswith(f"HTTP/1.1 {status} ".encode()), told
            assert code.encode() in told
            assert b"retry-after" in told.lower()
        for writer in writers:
            writer.close()
        async with asyncio.timeout(60):
            while bodies.bytes:
                await asyncio.sleep(0.01)
        answer = await site.http.post(CHAT, json=GOOD[CHAT], headers=bearer(keys[0]))
        assert (answer.status_code, bodies.bytes, len(bodies._held)) == (200, 0, 0)
