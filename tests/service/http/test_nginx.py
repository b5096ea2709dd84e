"""Behind a real nginx with its defaults: nothing is held back, and a stream that waits is not cut."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.service.http.test_browsers import TURNS, busy
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.nginx import CONFIG as ALONE
from tests.support.nginx import INSIDE, NGINX
from tests.support.ports import unused
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site

pytestmark = [
    pytest.mark.skipif(not Path(NGINX).exists(), reason="nginx is not installed"),
    pytest.mark.filterwarnings("ignore:max_tokens is deprecated", "ignore::DeprecationWarning"),
]
# All that somebody writes who puts a server behind nginx; ``extra`` is beside proxy_pass.
CONFIG = ALONE.replace(
    INSIDE,
    """server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass {upstream}; {extra} }}
  }}""",
)


@asynccontextmanager
async def behind_nginx(site: Site, folder: Path, extra: str = "") -> AsyncIterator[httpx.AsyncClient]:
    port = unused()
    config = folder / "nginx.conf"
    config.write_text(CONFIG.format(folder=folder, port=port, upstream=site.url, extra=extra))
    process = subprocess.Popen([NGINX, "-c", str(config), "-p", str(folder), "-e", str(folder / "error.log")])
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            for _ in range(1200):
                try:
                    await client.get("/health")
                    break
                except httpx.TransportError:
                    await asyncio.sleep(0.05)
            yield client
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait)


# How long a stream waits behind nginx as it is by default: too long for each run of the tests.
QUEUED_S = float(os.environ.get("QUEUED_SECONDS") or 0)


async def first_token(client: httpx.AsyncClient, key: str) -> float:
    """Seconds until it comes."""
    return (await pieces(client, key))[0]


async def pieces(client: httpx.AsyncClient, key: str) -> list[float]:
    """Seconds until each piece of a stream of twenty tokens comes."""
    body = {"messages": TURNS, "max_tokens": 20, "stream": True}
    began = time.monotonic()
    async with client.stream("POST", "/v1/chat/completions", json=body, headers=bearer(key)) as said:
        assert said.status_code == 200
        return [time.monotonic() - began async for line in said.aiter_lines() if line.startswith("data: ")]


async def test_the_first_token_is_not_held_back(tmp_path: Path) -> None:
    """It comes long before the last one; ``tests/engine/test_nginx`` measures how soon."""
    engine = FakeEngine(tiny.base(), times=Times(step=0.1))
    async with fake_site(tmp_path / "data", engine) as site, behind_nginx(site, tmp_path) as proxied:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        body = {"messages": TURNS, "max_tokens": 400, "stream": True}
        async with proxied.stream("POST", "/v1/chat/completions", json=body, headers=bearer(key)) as said:
            async for line in said.aiter_lines():
                if line.startswith("data: "):
                    break
            assert engine.running, "the last one is made 40 s later"


async def waiting(site: Site, client: httpx.AsyncClient, key: str, seconds: float) -> list[str]:
    """The lines of a stream that gets its turn after so many seconds at least."""
    body = {"messages": TURNS, "max_tokens": 3, "stream": True}
    began, lines = time.monotonic(), []
    async with (
        busy(site, key) as end,
        client.stream("POST", "/v1/chat/completions", json=body, headers=bearer(key), timeout=None) as said,
    ):
        assert said.status_code == 200
        async for line in said.aiter_lines():
            lines.append(line)
            if time.monotonic() - began > seconds:
                await end()
    return [line for line in lines if line]


async def test_a_stream_that_waits_outlives_the_proxys_patience(tmp_path: Path) -> None:
    """nginx gives up after 60 s of silence, and here after 10; the comments come well within either."""
    engine = FakeEngine(tiny.base(), times=Times(step=0.05), max_running=1, max_model_len=1 << 16)
    async with (
        fake_site(tmp_path / "data", engine, sse_keepalive=0.3) as site,
        behind_nginx(site, tmp_path, "proxy_read_timeout 10s;") as proxied,
    ):
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        lines = await waiting(site, proxied, key, 11)
    assert lines.count(": the request waits") >= 2
    assert lines[-1] == "data: [DONE]"


@pytest.mark.skipif(not QUEUED_S, reason="takes QUEUED_SECONDS=300")
@pytest.mark.timeout(QUEUED_S + 120)
async def test_a_stream_waits_for_minutes(tmp_path: Path) -> None:
    engine = FakeEngine(tiny.base(), times=Times(step=QUEUED_S / 60), max_running=1)
    async with (
        fake_site(tmp_path / "data", engine, queue_timeout=QUEUED_S + 60, sse_keepalive=15) as site,
        behind_nginx(site, tmp_path) as proxied,
    ):
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        lines = await waiting(site, proxied, key, QUEUED_S)
    comments = lines.count(": the request waits")
    print(f"{comments} comments in {QUEUED_S:.0f} s")
    assert comments >= QUEUED_S // site.services.settings.sse_keepalive - 2
    assert lines[-1] == "data: [DONE]"
