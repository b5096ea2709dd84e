"""What every route shares: ids, the access log, error bodies, limits, clients that hang up."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from server.inference.completion import Completions
from tests.service.http.test_api import CHAT, CHAT_URL, error
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.site import ADMIN_KEY, Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    engine = FakeEngine(tiny.base(), times=Times(step=0.03))
    async with fake_site(tmp_path, engine, max_body_bytes=64 << 10) as site:
        yield site


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def unchanged(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """One server for what is refused and changes nothing."""
    async with fake_site(tmp_path_factory.mktemp("unchanged"), max_body_bytes=64 << 10) as site:
        yield site


def access_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(r) | {"message": r.getMessage()} for r in caplog.records if r.name == "loraplex.access"]


async def raw(site: Site, head: str, body: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which a request was begun, byte by byte as given."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(site.url.rsplit(":", 1)[1]))
    writer.write(f"{head}\r\nHost: test\r\n\r\n".encode() + body)
    await writer.drain()
    return reader, writer


async def idle(site: Site) -> None:
    assert await site.services.dispatcher.wait_until_idle(60)
    assert site.services.engine.running == []


# --- ids --------------------------------------------------------------------------------------------


async def test_a_request_id_is_echoed_or_made(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    for given, echoed in (("my-id_1", True), ("x" * 128, True), ("x" * 129, False), ("a b", False)):
        for headers in ({}, bearer(key), bearer("wrong")):
            response = await site.http.post(CHAT_URL, json=CHAT, headers={**headers, "X-Request-Id": given})
            assert (response.headers.get_list("x-request-id") == [given]) is echoed
    made = {(await site.http.get("/health")).headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    assert all(len(id_) == 32 for id_ in made)


async def test_two_requests_with_one_id_are_two_requests(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    headers = {**bearer(key), "X-Request-Id": "same"}
    answers = await asyncio.gather(*(site.http.post(CHAT_URL, json=CHAT, headers=headers) for _ in range(3)))
    assert [answer.status_code for answer in answers] == [200] * 3
    assert len({answer.json()["id"] for answer in answers}) == 3


# --- errors -----------------------------------------------------------------------------------------


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("POST", "/v1/moderations", 404, "not_found"),
        ("GET", "/v1/embeddings", 405, "method_not_allowed"),
        ("GET", "/v1/responses", 405, "method_not_allowed"),
        ("GET", "/v1/responses/resp_1", 404, "not_found"),
        ("GET", CHAT_URL, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("PUT", "/admin/v1/tenants", 405, "method_not_allowed"),
    ],
)
async def test_no_such_route(unchanged: Site, method: str, path: str, status: int, code: str) -> None:
    response = await unchanged.http.request(method, path, headers=bearer(ADMIN_KEY))
    error(response, status, code)
    assert ("allow" in response.headers) == (status == 405)


async def test_a_defect_is_a_500_like_every_other_error(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    services = site.services
    broken = Completions(None, services.completions.catalog, services.metrics)  # type: ignore[arg-type]
    monkeypatch.setattr(services, "completions", broken)
    with caplog.at_level(logging.INFO):
        response = await site.http.post(CHAT_URL, json=CHAT, headers={**bearer(key), "X-Request-Id": "mine"})
    said = error(response, 500, "internal_error")
    assert "NoneType" not in said["message"]
    assert response.headers["x-request-id"] == "mine"
    assert access_lines(caplog)[-1]["status"] == 500
    (logged,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert logged.exc_info is not None
    assert vars(logged)["request_id"] == access_lines(caplog)[-1]["request_id"]


async def test_an_error_shows_what_was_sent_in_part_and_in_utf8(site: Site) -> None:
    bodies = (
        (b'{"\\ud800": 1}', 400),
        (b'{"' + b"x" * 50_000 + b'": 1}', 422),
        (b'{"id": "\\ud800"}', 400),
        (b'{"id": "\\u00e9"}', 422),
    )
    for body, status in bodies:
        response = await site.admin.post(
            "/admin/v1/tenants", content=body, headers={"Content-Type": "application/json"}
        )
        assert response.status_code == status, response.text
        assert len(response.text) < 3000
        response.content.decode()


# --- the admin's JSON -------------------------------------------------------------------------------


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"\xff", 400, "invalid_json"),
        (b"[" * 50_000, 400, "invalid_json"),
        (b'{"id": "acme", "weight": NaN}', 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b" " * (70 << 10), 413, "body_too_large"),
        (b'{"id": 5}', 422, "invalid_request"),
        (b"", 400, "invalid_json"),
    ],
)
async def test_admin_bodies_that_are_none(unchanged: Site, content: bytes, status: int, code: str) -> None:
    for headers in ({"Content-Type": "application/json"}, {}):
        response = await unchanged.admin.post("/admin/v1/tenants", content=content, headers=headers)
        assert response.status_code == status, response.text
        assert response.json()["error"]["code"] == code


async def test_the_admin_api_reads_nothing_without_a_key(site: Site) -> None:
    for path in ("/admin/v1/tenants", "/admin/v1/tenants/acme/adapters/a/versions"):
        reader, writer = await raw(
            site, f"POST {path} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 5000", b"{"
        )
        async with asyncio.timeout(60):
            assert (await reader.readline()).startswith(b"HTTP/1.1 401")
        writer.close()
    for body in (b"{", b'{"id": 5}'):
        refused = await site.http.post(
            "/admin/v1/tenants", content=body, headers={"Content-Type": "application/json"}
        )
        error(refused, 401, "invalid_api_key")


# --- clients that hang up ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [CHAT_URL, "/admin/v1/tenants", "/admin/v1/tenants/acme/adapters/b/versions"]
)
async def test_a_client_that_leaves_amid_its_body(
    site: Site, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    key = ADMIN_KEY if "admin" in path else key
    kind = "multipart/form-data; boundary=b" if path.endswith("versions") else "application/json"
    head = (
        f"POST {path} HTTP/1.1\r\nAuthorization: Bearer {key}\r\nContent-Type: {kind}\r\nContent-Length: 5000"
    )
    with caplog.at_level(logging.INFO):
        _, writer = await raw(site, head, b"--b\r\n")
        await asyncio.sleep(0.05)
        writer.close()
        await writer.wait_closed()
        async with asyncio.timeout(60):
            while not (lines := access_lines(caplog)):
                await asyncio.sleep(0.01)
    assert lines[0]["status"] == 499
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_amid_its_answer(
    site: Site, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    body = json.dumps({**CHAT, "max_tokens": 400, "stream": stream}).encode()
    head = f"POST {CHAT_URL} HTTP/1.1\r\nAuthorization: Bearer {key}\r\nContent-Length: {len(body)}"
    with caplog.at_level(logging.INFO):
        reader, writer = await raw(site, head, body)
        if stream:
            await reader.readuntil(b'" 5"')
        else:
            async with asyncio.timeout(60):
                while not (running := site.services.engine.running) or min(running[0].produced.values()) < 5:
                    await asyncio.sleep(0.01)
        writer.close()
        await idle(site)
        async with asyncio.timeout(60):
            while "chat" not in (line := access_lines(caplog)[-1])["message"]:
                await asyncio.sleep(0.01)
    metrics = (await site.http.get("/metrics")).text
    assert 'loraplex_requests_total{outcome="disconnected",tenant="acme"} 1.0' in metrics
    assert line["status"] == (200 if stream else 499)
    if stream:
        assert line["outcome"] == "disconnected"
        assert 5 < line["output_tokens"] < 400
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


# --- the access log ---------------------------------------------------------------------------------


async def test_one_line_for_every_request(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    with caplog.at_level(logging.INFO):
        for stream in (False, True):
            await site.http.post(CHAT_URL, json={**CHAT, "stream": stream}, headers=bearer(key))
        await site.chat(key, "hi", model="nobody")
        await site.http.get("/v1/models/made-up-by-a-client", headers=bearer(key))
        await site.http.get("/nowhere/made-up-by-a-client", headers=bearer(key))
        await site.http.post(CHAT_URL, json=CHAT)
    lines = access_lines(caplog)
    assert [(line["message"], line["status"]) for line in lines] == [
        ("POST /v1/chat/completions", 200),
        ("POST /v1/chat/completions", 200),
        ("POST /v1/chat/completions", 404),
        ("GET /v1/models/{name:path}", 404),
        ("GET (no route)", 404),
        ("POST /v1/chat/completions", 401),
    ]
    for line in lines[:2]:
        assert (line["tenant"], line["model"], line["version"]) == ("acme", "a", 1)
        assert (line["outcome"], line["prompt_tokens"], line["output_tokens"]) == ("completed", 3, 4)
        assert 0 < line["seconds"] < 300
        assert len(line["request_id"]) == 32
    assert (lines[2]["tenant"], lines[2]["code"]) == ("acme", "model_not_found")
    assert lines[5]["code"] == "invalid_api_key"
    assert not hasattr(lines[5], "tenant")
