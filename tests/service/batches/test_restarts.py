"""A batch whose server is killed in the middle: every line has one result, whoever answered it.

``LINES=5000`` is a long run, beside a customer who must not notice; it prints what was measured.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.accounts.test_usage_process import Server
from tests.service.batches.test_batches import jsonl
from tests.support import tiny
from tests.support.ports import unused
from tests.support.site import ADMIN_KEY, bearer

LINES = int(os.environ.get("LINES", "120"))
pytestmark = pytest.mark.timeout(1200 + LINES)


def lines() -> bytes:
    body = {"model": tiny.NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
    return jsonl(
        {
            "custom_id": f"r{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {**body, "user": f"r{number}"},
        }
        for number in range(LINES)
    )


async def first_tokens(http: httpx.AsyncClient, key: str, over: asyncio.Event) -> list[float]:
    """Seconds to the first token of another customer's streams, one after another."""
    found: list[float] = []
    body = {
        "model": tiny.NAME,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 20,
        "stream": True,
    }
    while not over.is_set():
        began = time.monotonic()
        try:
            async with http.stream(
                "POST", "/v1/chat/completions", json=body, headers=bearer(key)
            ) as response:
                first = True
                async for chunk in response.aiter_lines():
                    if first and chunk.startswith("data: {") and said(chunk):
                        found.append(time.monotonic() - began)
                        first = False
        except httpx.TransportError:  # it was killed
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.02)
    return found


def said(chunk: str) -> bool:
    """Whether there is text in it."""
    choices = json.loads(chunk.removeprefix("data: "))["choices"]
    return any(choice["delta"].get("content") for choice in choices)


def p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[98] if len(times) > 1 else float("nan")


async def test_nothing_is_lost_and_nothing_is_there_twice(tmp_path: Path) -> None:
    port = unused()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        server = Server(tmp_path, http, port)
        await server.start()
        keys = []
        for tenant in ("acme", "globex"):
            await http.post("/admin/v1/tenants", json={"id": tenant}, headers=bearer(ADMIN_KEY))
            made = await http.post(f"/admin/v1/tenants/{tenant}/keys", json={}, headers=bearer(ADMIN_KEY))
            keys.append(made.json()["key"])
        headers = bearer(keys[0])
        quiet, over = [], asyncio.Event()
        if LINES > 1000:
            looking = asyncio.create_task(first_tokens(http, keys[1], over))
            await asyncio.sleep(20)
            over.set()
            quiet = await looking
        over.clear()
        file = await http.post(
            "/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", lines())}, headers=headers
        )
        body = {
            "input_file_id": file.json()["id"],
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        }
        id_ = (await http.post("/v1/batches", json=body, headers=headers)).json()["id"]
        beside = asyncio.create_task(first_tokens(http, keys[1], over)) if LINES > 1000 else None

        async def batch() -> dict[str, Any]:
            found = await http.get(f"/v1/batches/{id_}", headers=headers)
            return dict(found.json())

        began = time.monotonic()
        while (found := await batch())["request_counts"]["completed"] < LINES // 3:
            assert found["status"] in ("validating", "in_progress"), found
            await asyncio.sleep(0.05)
        before = found["request_counts"]["completed"]
        await server.end(signal.SIGKILL)
        await server.start()
        assert (await batch())["request_counts"]["completed"] >= before
        while (found := await batch())["status"] != "completed":
            assert found["status"] == "in_progress", found
            await asyncio.sleep(0.05)
        seconds = time.monotonic() - began
        over.set()
        content = await http.get(f"/v1/files/{found['output_file_id']}/content", headers=headers)
        answers = [json.loads(line) for line in content.text.splitlines()]
        assert [answer["custom_id"] for answer in answers] == [f"r{number}" for number in range(LINES)]
        assert found["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}
        assert found["error_file_id"] is None
        taken = Counter(
            line.split()[1] for line in (tmp_path / "taken").read_text().splitlines() if " r" in line
        )
        again = sum(taken.values()) - LINES
        assert taken.keys() == {f"r{number}" for number in range(LINES)}
        assert 0 <= again <= 16, "only what ran, or was not written yet, is asked again"
        if beside is not None:
            times = await beside
            print(
                f"\n{LINES} lines in {seconds:.0f} s, {again} asked again; first token of another customer:"
                f" p50 {statistics.median(quiet) * 1000:.1f} -> {statistics.median(times) * 1000:.1f} ms,"
                f" p99 {p99(quiet) * 1000:.1f} -> {p99(times) * 1000:.1f} ms"
                f" ({len(quiet)} and {len(times)} streams)"
            )
        await server.end(signal.SIGTERM)
