"""A server process with 256 file descriptors, and more connections than that: those who ask are answered."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from tests.support import crashes, tiny
from tests.support.forks import PROCESSES
from tests.support.ports import unused
from tests.support.site import ADMIN_KEY, bearer

DESCRIPTORS = 256


class Small:
    """The process, and clients that take its descriptors."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.opened: list[asyncio.StreamWriter] = []

    async def connect(self, sent: bytes) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.opened.append(writer)
        writer.write(sent)

    async def get(self, path: str, **headers: str) -> httpx.Response:
        """On a connection of its own, as somebody who has just come."""
        async with httpx.AsyncClient(base_url=self.url, timeout=60, trust_env=False) as http:
            return await http.get(path, headers=headers)

    async def post(self, path: str, key: str, **content: Any) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.url, timeout=60, trust_env=False) as http:
            return await http.post(path, headers=bearer(key), **content)


@pytest.fixture
async def small(tmp_path: Path) -> AsyncIterator[Small]:
    port = unused()
    settings = tiny.settings(tmp_path / "data", port=port, drain_timeout=0.3, log_level="error")
    arguments = (DESCRIPTORS, settings, tiny.base(), tmp_path)
    process = PROCESSES.Process(target=crashes.serve_with, args=arguments)
    process.start()
    server = Small(port)
    try:
        async with asyncio.timeout(120):
            while True:
                assert process.is_alive(), process.exitcode
                if await is_ready(server):
                    break
                await asyncio.sleep(0.05)
        yield server
    finally:
        for writer in server.opened:
            writer.transport.abort()
        os.kill(process.pid or 0, signal.SIGKILL)
        await asyncio.to_thread(process.join, 30)


async def is_ready(server: Small) -> bool:
    with suppress(httpx.TransportError):
        return (await server.get("/ready")).status_code == 200
    return False


async def customer(server: Small, id_: str) -> str:
    tenant = {"id": id_, "base_allowed": True}
    assert (await server.post("/admin/v1/tenants", ADMIN_KEY, json=tenant)).status_code == 201
    scopes = {"scopes": ["inference", "adapters:write"]}
    made = await server.post(f"/admin/v1/tenants/{id_}/keys", ADMIN_KEY, json=scopes)
    return str(made.json()["key"])


async def answered(server: Small, key: str) -> None:
    """Readiness, an answer and an upload."""
    assert (await server.get("/ready")).status_code == 200
    files = {n: (tiny.adapter(1) / n).read_bytes() for n in (CONFIG_FILE, WEIGHTS_FILE)}
    uploaded = await server.post("/v1/adapters/a/versions", key, files=files)
    assert uploaded.status_code == 201, uploaded.text
    asked = await server.post("/v1/completions", key, json={"model": "a", "prompt": "hi", "max_tokens": 2})
    assert asked.status_code == 200, asked.text


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"])
async def test_four_hundred_idle_connections(small: Small, sent: bytes) -> None:
    key = await customer(small, "acme")
    for _ in range(400):
        await small.connect(sent)
    await answered(small, key)


async def test_a_hundred_and_fifty_slow_uploads(small: Small) -> None:
    key, other = await customer(small, "attacker"), await customer(small, "acme")
    begun = (
        f"POST /v1/adapters/slow/versions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {64 << 20}\r\n\r\n"
        f'--b\r\nContent-Disposition: form-data; name="{WEIGHTS_FILE}"; filename="w"\r\n\r\n'
    )
    for _ in range(150):
        await small.connect(begun.encode())
    async with asyncio.timeout(120):  # all but a few of them are refused, which makes room
        while not await is_ready(small):
            await asyncio.sleep(0.05)
    await answered(small, other)
