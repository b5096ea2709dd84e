"""One request, read in one way: nothing behind it, and no other protocol, is taken for a part of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from server.http.turns import Turns
from tests.support import tiny
from tests.support.bad_requests import CHAT, GOOD
from tests.support.site import SERVICE_KEY, Site, bearer
from tests.support.tiny import fake_site

BODY = json.dumps(GOOD[CHAT]).encode()
# What Java's own client sends with a first request, whatever its method.
H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAA")


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path) as site:
        yield site


@pytest.fixture
async def key(site: Site) -> str:
    return await site.tenant("acme", {"a": tiny.adapter(1)})


async def told(site: Site, *pieces: bytes) -> bytes:
    """All that comes back for ``pieces``, sent one after the other; the last answer closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(site.url.rsplit(":", 1)[1]))
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0.02)
    try:
        async with asyncio.timeout(60):
            return await reader.read()
    finally:
        writer.close()


def head(*lines: str, first: str = f"POST {CHAT} HTTP/1.1") -> bytes:
    return "".join(f"{line}\r\n" for line in (first, "Host: x", *lines, "")).encode()


def chunked(key: str, trailer: str, *lines: str) -> bytes:
    auth = (f"Authorization: Bearer {key}",) if key else ()
    sent = head("Transfer-Encoding: chunked", "Connection: close", *auth, *lines)
    return sent + b"%x\r\n%s\r\n0\r\n%s\r\n\r\n" % (len(BODY), BODY, trailer.encode())


async def test_trailers_are_no_headers(site: Site, key: str) -> None:
    """They come behind what a proxy checked, so they name neither a key nor a customer."""
    assert (await told(site, chunked("", f"Authorization: Bearer {key}"))).startswith(b"HTTP/1.1 401 ")
    assert (await told(site, chunked(SERVICE_KEY, "X-Customer-ID: acme"))).startswith(b"HTTP/1.1 400 ")
    assert (await told(site, chunked("", f"x-api-key: {key}"))).startswith(b"HTTP/1.1 401 ")
    for trailer in (f"Authorization: Bearer {key}", "X-Customer-ID: globex", "X-Vllm-Priority: 1"):
        assert (await told(site, chunked(key, trailer))).startswith(b"HTTP/1.1 200 "), trailer


@pytest.mark.parametrize("length", ["Content-Length", "chunked"])
async def test_a_wish_for_another_protocol_is_not_granted_and_its_body_is_read(
    site: Site, key: str, length: str
) -> None:
    framed = {
        "Content-Length": (f"Content-Length: {len(BODY)}", BODY),
        "chunked": ("Transfer-Encoding: chunked", b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)),
    }
    line, body = framed[length]
    asked = head(f"Authorization: Bearer {key}", line, *H2C)
    closing = head(f"Authorization: Bearer {key}", "Connection: close", first="GET /v1/models HTTP/1.1")
    for pieces in ([asked + body + closing], [asked, body, closing], [asked + body[:5], body[5:] + closing]):
        answers = await told(site, *pieces)
        assert answers.count(b"HTTP/1.1 200 ") == 2, answers
        assert answers.count(b'"chat.completion"') == 1


async def test_a_body_behind_an_upgrade_is_no_request(site: Site, key: str) -> None:
    """A proxy that hands ``Upgrade`` on would take its answer for the next customer's."""
    hidden = head(f"Authorization: Bearer {key}", first="GET /v1/models HTTP/1.1")
    asked = head(
        f"Authorization: Bearer {key}",
        f"Content-Length: {len(hidden)}",
        "Connection: Upgrade, close",
        "Upgrade: h2c",
    )
    for pieces in ([asked + hidden], [asked, hidden]):
        answers = await told(site, *pieces)
        assert (answers.count(b"HTTP/1.1 "), answers[:12]) == (1, b"HTTP/1.1 400"), answers


@pytest.mark.parametrize("wish", ["websocket", "h2c", "TLS/1.0, HTTP/1.1"])
async def test_a_wish_without_a_body_is_answered_as_if_it_were_none(site: Site, key: str, wish: str) -> None:
    asked = head(
        f"Authorization: Bearer {key}",
        "Connection: upgrade, close",
        f"Upgrade: {wish}",
        first="GET /v1/models HTTP/1.1",
    )
    answers = await told(site, asked)
    assert answers.startswith(b"HTTP/1.1 200 ")
    assert answers.count(b"HTTP/1.1 ") == 1


async def test_connect_is_refused(site: Site) -> None:
    answers = await told(site, head(first="CONNECT example.org:443 HTTP/1.1"))
    assert answers.startswith(b"HTTP/1.1 400 ")


async def test_blanks_behind_a_header_are_none_of_it(site: Site, key: str) -> None:
    sent = (f"Content-Length: {len(BODY)} ", "Content-Encoding: identity\t", "Connection: close ")
    for blanks in (" ", " \t ", "\t"):
        asked = head(f"Authorization: Bearer {key}{blanks}", *sent) + BODY
        assert (await told(site, asked)).startswith(b"HTTP/1.1 200 ")
        vouched = head(f"Authorization: Bearer {SERVICE_KEY}", f"X-Customer-ID: acme{blanks}", *sent) + BODY
        assert (await told(site, vouched)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("coding", ["gzip, chunked", "gzip,chunked", "identity, chunked"])
async def test_a_body_that_is_packed_on_its_way_is_refused(site: Site, key: str, coding: str) -> None:
    sent = head(f"Authorization: Bearer {key}", f"Transfer-Encoding: {coding}", "Connection: close")
    answer = await told(site, sent + b"5\r\n\x1f\x8b\x08{}\r\n0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 415 "), answer
    assert b"Transfer-Encoding" in answer


@pytest.mark.parametrize(("path", "stream"), [(CHAT, True), (CHAT, False), ("/metrics", False)])
async def test_a_client_of_http_1_0_gets_no_chunks(site: Site, key: str, path: str, stream: bool) -> None:
    """It would take their sizes for a part of the answer; nor does it know what 100 means."""
    body = json.dumps(GOOD[CHAT] | {"stream": stream}).encode() if path == CHAT else b""
    method = "POST" if path == CHAT else "GET"
    sent = [f"Authorization: Bearer {key}", "Expect: 100-continue", f"Content-Length: {len(body)}"]
    old = await told(site, head(*sent, first=f"{method} {path} HTTP/1.0") + body)
    assert old.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding" not in old.lower()
    if stream and path == CHAT:
        events = old.partition(b"\r\n\r\n")[2]
        assert events.startswith(b"data: {")
        assert events.endswith(b"data: [DONE]\n\n")
    new = await told(site, head(*sent, "Connection: close", first=f"{method} {path} HTTP/1.1") + body)
    assert b"HTTP/1.1 200 " in new


async def test_two_headers_with_two_keys_are_refused_where_both_are_read(site: Site, key: str) -> None:
    """A proxy may check one of them, and this server another."""
    other = await site.tenant("globex", {"a": tiny.adapter(2)})
    both = {**bearer(key), "x-api-key": other}
    answer = await site.http.post("/v1/messages", json=GOOD[CHAT], headers=both)
    assert answer.status_code == 400
    assert "different keys" in answer.text
    assert (await site.http.post(CHAT, json=GOOD[CHAT], headers=both)).status_code == 200, "a proxy's own key"
    same = {**bearer(key), "x-api-key": key}
    assert (await site.http.post("/v1/messages", json=GOOD[CHAT], headers=same)).status_code == 200


async def test_two_hosts_are_refused(site: Site, key: str) -> None:
    asked = head(
        "Host: y", f"Authorization: Bearer {key}", "Connection: close", first="GET /v1/models HTTP/1.1"
    )
    answers = await told(site, asked)
    assert answers.startswith(b"HTTP/1.1 400 ")
    assert b"duplicate_header" in answers


def asking(key: str = "", path: str = "/v1/models") -> dict[str, Any]:
    return {"path": path, "headers": [(b"host", b"x"), (b"authorization", key.encode())] if key else []}


async def test_many_requests_at_once_begin_a_few_in_a_turn() -> None:
    """Each had its first step in the same turn of the event loop, for which every stream waited."""
    turns, begun = Turns(asyncio.get_running_loop(), at_once=4), list[int]()
    for number in range(10):
        turns.begin(partial(begun.append, number), asking())
    seen = [len(begun)]
    for _ in range(3):
        await asyncio.sleep(0)
        seen.append(len(begun))
    assert (seen, begun) == ([4, 8, 10, 10], list(range(10)))
    turns.begin(partial(begun.append, 10), asking())
    assert len(begun) == 11


async def test_who_was_let_in_before_does_not_wait_for_a_crowd_of_strangers() -> None:
    turns, begun = Turns(asyncio.get_running_loop(), at_once=4), list[str]()
    for known in ("a", "b"):
        turns.let_in(asking(known))
    for _ in range(100):
        turns.begin(partial(begun.append, "stranger"), asking())
    for number in range(100):
        turns.begin(partial(begun.append, "wrong"), asking(f"wrong {number}"))
    for _ in range(8):
        turns.begin(partial(begun.append, "a"), asking("a"))
    turns.begin(partial(begun.append, "b"), asking("b"))
    turns.begin(partial(begun.append, "health"), asking(path="/health"))
    assert begun == ["stranger"] * 4
    begun.clear()
    await asyncio.sleep(0)
    assert begun == ["a", "b", "health", "stranger"], "one of each key, and strangers are not forgotten"
    for _ in range(2):
        await asyncio.sleep(0)
    assert begun[4:12] == ["a", "a", "a", "stranger"] * 2
    while len(begun) < 206:
        await asyncio.sleep(0)
    assert begun.count("a") == 8
    assert begun[-100:] == ["wrong"] * 100


async def test_two_hundred_requests_at_once_are_all_answered(site: Site, key: str) -> None:
    asked = head(f"Authorization: Bearer {key}", "Connection: close", first="GET /v1/models HTTP/1.1")
    answers = await asyncio.gather(*(told(site, asked) for _ in range(200)))
    assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in answers)
