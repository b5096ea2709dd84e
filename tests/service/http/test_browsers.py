"""Browsers and proxies: other origins, the reference's pages, prefixes, slashes, and streams that wait."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import jsonschema
import openai
import pytest

from server.http.examples import EXAMPLES
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.site import Site, bearer, waits_at_most
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated", "ignore::DeprecationWarning")

ORIGIN = "https://app.example"
TURNS: list[Any] = [{"role": "user", "content": "hi"}]
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


@asynccontextmanager
async def site_with(tmp_path: Path, *, times: Times | None = None, **settings: Any) -> AsyncIterator[Site]:
    engine = FakeEngine(tiny.base(), times=times or Times(), max_running=1, max_model_len=1 << 16)
    async with fake_site(tmp_path, engine, **settings) as site:
        yield site


# --- other origins ----------------------------------------------------------------------------------


async def test_a_page_of_a_named_origin_may_call(tmp_path: Path) -> None:
    async with site_with(tmp_path, cors_origins=(ORIGIN,)) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        asked = await site.http.options("/v1/chat/completions", headers=PREFLIGHT)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == ORIGIN
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert "authorization" in asked.headers["access-control-allow-headers"].lower()
        body = {"messages": TURNS, "max_tokens": 2}
        for headers, status in ((bearer(key), 200), (bearer("wrong"), 401)):
            said = await site.http.post(
                "/v1/chat/completions", json=body, headers={**headers, "Origin": ORIGIN}
            )
            assert (said.status_code, said.headers["access-control-allow-origin"]) == (status, ORIGIN)
            assert "x-request-id" in said.headers["access-control-expose-headers"].lower()
            assert "access-control-allow-credentials" not in said.headers
        other = await site.http.options(
            "/v1/chat/completions", headers=PREFLIGHT | {"Origin": "https://evil.example"}
        )
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers


async def test_without_the_setting_no_page_may(tmp_path: Path) -> None:
    async with site_with(tmp_path) as site:
        refused = await site.http.options("/v1/chat/completions", headers=PREFLIGHT)
        assert "access-control-allow-origin" not in refused.headers


# --- the reference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/llm"])
async def test_the_reference_comes_from_here_alone(tmp_path: Path, prefix: str) -> None:
    async with site_with(tmp_path, root_path=prefix) as site:
        for page in ("/docs", "/redoc"):
            told = await site.http.get(page)
            assert told.status_code == 200
            assert "default-src 'none'" in told.headers["content-security-policy"]
            assert "unsafe-inline'; script" not in told.headers["content-security-policy"]
            assert "//" not in told.text.replace("<!DOCTYPE html>", "")
            parts = re.findall(r'(?:src|href|spec-url)="([^"]+)"', told.text)
            assert parts
            for part in parts:
                assert part.startswith(f"{prefix}/")
                # A proxy strips its prefix; what is asked with it is answered as well.
                for path in (part.removeprefix(prefix), part):
                    got = await site.http.get(path)
                    assert (got.status_code, len(got.content) > 100) == (200, True), path
        assert (await site.http.get("/docs/assets/nothing.js")).status_code == 404
        start = (await site.http.get("/docs/assets/start.js")).text
        assert '"/openapi.json"' in start
        document = (await site.http.get("/openapi.json")).json()
        assert document.get("servers", [{"url": ""}])[0]["url"] == prefix


async def test_each_call_says_what_it_does_and_shows_a_body(tmp_path: Path) -> None:
    async with site_with(tmp_path) as site:
        document = (await site.http.get("/openapi.json")).json()
    shown = 0
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], (method, path)
            (sample,) = operation["x-codeSamples"]
            assert sample["source"].startswith("curl ")
            assert "{" not in sample["source"].splitlines()[0]
            sends = " -d " in sample["source"] or " -F " in sample["source"]
            assert sends or not operation.get("requestBody", {}).get("required"), (method, path)
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if body and "example" in body:
                shown += 1
                schema = body["schema"] | {"components": document["components"]}
                jsonschema.validate(body["example"], schema)
    assert shown >= len(EXAMPLES)


# --- slashes ----------------------------------------------------------------------------------------


async def test_a_trailing_slash_changes_nothing(tmp_path: Path) -> None:
    async with site_with(tmp_path) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        body = {"messages": TURNS, "max_tokens": 2}
        said = await site.http.post("/v1/chat/completions/", json=body, headers=bearer(key))
        assert said.status_code == 200
        for path in ("/v1/models/", "/health/", "/ready/", "/metrics/", "/v1/models/a/"):
            assert (await site.http.get(path, headers=bearer(key))).status_code == 200, path
        assert (await site.admin.get("/admin/v1/tenants/")).status_code == 200
        assert (await site.http.get("/nowhere/")).status_code == 404


# --- streams that wait ------------------------------------------------------------------------------


@asynccontextmanager
async def busy(site: Site, key: str) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """One stream has the engine's only place until what is given is called, or the block ends."""
    body = {"model": "a", "messages": TURNS, "max_tokens": 60_000, "stream": True}
    async with AsyncExitStack() as stack:
        held = site.http.stream("POST", "/v1/chat/completions", json=body, headers=bearer(key))
        response = await stack.enter_async_context(held)
        lines = response.aiter_lines()
        while not (await anext(lines)).startswith("data: "):  # before that it may be waiting itself
            pass
        yield stack.aclose


async def _all(stream: Any) -> list[Any]:
    return [chunk async for chunk in stream]


async def test_a_stream_that_waits_is_told_so(tmp_path: Path) -> None:
    async with site_with(tmp_path, times=Times(step=0.02), sse_keepalive=0.2) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        async with busy(site, key) as end:
            body = {"messages": TURNS, "max_tokens": 3, "stream": True}
            async with site.http.stream(
                "POST", "/v1/chat/completions", json=body, headers=bearer(key)
            ) as said:
                assert said.status_code == 200
                assert said.headers["x-accel-buffering"] == "no"
                assert said.headers["x-loraplex-version"] == "a@1", "it is known before its turn comes"
                lines, comments = [], 0
                async for line in said.aiter_lines():
                    lines.append(line)
                    comments += line.startswith(":")
                    if comments == 3:
                        await end()
        assert comments >= 3
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert data[-1] == "[DONE]"
        assert json.loads(data[-2])["choices"][0]["finish_reason"] == "length"
        assert await site.services.dispatcher.wait_until_idle(60)


async def test_the_vendors_clients_read_over_the_comments(tmp_path: Path) -> None:
    async with site_with(tmp_path, times=Times(step=0.02), sse_keepalive=0.1) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        async with busy(site, key) as end:
            stream = await site.openai(key).chat.completions.create(
                model="a", messages=TURNS, max_tokens=3, stream=True
            )
            await end()
            assert (await _all(stream))[-1].choices[0].finish_reason == "length"
        async with busy(site, key) as end:
            completion = await site.openai(key).completions.create(
                model="a", prompt="hi", max_tokens=3, stream=True
            )
            await end()
            texts = await _all(completion)
            assert texts[-1].choices[0].finish_reason == "length"
        async with busy(site, key) as end:
            asked: Any = {"model": "a", "messages": TURNS, "max_tokens": 3}
            async with site.anthropic(key).messages.stream(**asked) as told:
                await end()
                assert (await told.get_final_message()).stop_reason == "max_tokens"
        async with busy(site, key) as end:
            response = await site.openai(key).responses.create(
                model="a", input="hi", max_output_tokens=3, stream=True
            )
            await end()
            events = await _all(response)
            assert events[-1].type == "response.completed"


async def test_a_refusal_after_a_comment_is_an_event(tmp_path: Path) -> None:
    async with site_with(tmp_path, times=Times(step=0.02), sse_keepalive=0.1, queue_timeout=600) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        async with busy(site, key):
            stream = await site.openai(key).chat.completions.create(
                model="a", messages=TURNS, max_tokens=3, stream=True
            )
            waits_at_most(site, 0.1)
            with pytest.raises(openai.APIError) as refused:
                await _all(stream)
            assert refused.value.code == "queue_timeout"
            waits_at_most(site, 600)
            events = await site.anthropic(key).messages.create(
                model="a", messages=TURNS, max_tokens=3, stream=True
            )
            waits_at_most(site, 0.1)
            with pytest.raises(anthropic.APIStatusError) as anthropics:
                await _all(events)
            assert anthropics.value.body["error"]["type"] == "overloaded_error"  # type: ignore[index]


@pytest.mark.parametrize("keepalive", [0, 60])
async def test_before_that_a_refusal_has_its_status(tmp_path: Path, keepalive: float) -> None:
    async with site_with(tmp_path, times=Times(step=0.02), sse_keepalive=keepalive) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        async with busy(site, key):
            waits_at_most(site, 0.3)
            with pytest.raises(openai.APIStatusError) as refused:
                await site.openai(key).chat.completions.create(
                    model="a", messages=TURNS, max_tokens=3, stream=True
                )
            assert refused.value.status_code == 503
            assert "retry-after" in refused.value.response.headers


async def test_a_client_that_leaves_while_it_waits_leaves_nothing(tmp_path: Path) -> None:
    async with site_with(tmp_path, times=Times(step=0.02), sse_keepalive=0.1) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        async with busy(site, key):
            body = {"messages": TURNS, "max_tokens": 3, "stream": True}
            async with site.http.stream(
                "POST", "/v1/chat/completions", json=body, headers=bearer(key)
            ) as said:
                async for _ in said.aiter_lines():
                    break
            async with asyncio.timeout(60):
                while site.services.dispatcher.snapshot().queued:
                    await asyncio.sleep(0.01)
        assert await site.services.dispatcher.wait_until_idle(60)


async def test_a_stream_that_pauses_gets_comments_too(tmp_path: Path) -> None:
    async with site_with(tmp_path, times=Times(step=0.35), sse_keepalive=0.1) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        body = {"messages": TURNS, "max_tokens": 3, "stream": True}
        said = await site.http.post("/v1/chat/completions", json=body, headers=bearer(key))
        first = said.text.index("data: ")
        assert ": the request waits" in said.text[first:]
        assert said.text.endswith("data: [DONE]\n\n")
        for event in said.text.split("\n\n"):
            assert event.startswith((":", "data: ")) or not event
