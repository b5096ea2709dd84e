"""What tests ask a fleet, and how they read what it answers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fleet import Fleet, fleet
from tests.support.site import bearer

CHAT = "/v1/chat/completions"


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with fleet(tmp_path) as made:
        yield made


def body(tokens: int = 20, **fields: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": tokens}
    return {**asked, "stream": True, "stream_options": {"include_usage": True}, **fields}


async def read(site: Any, key: str, sent: dict[str, Any]) -> str:
    response = await site.http.post(CHAT, json=sent, headers=bearer(key))
    assert response.status_code == 200, response.text
    return str(response.text)


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def told(text: str) -> tuple[str, dict[str, int]]:
    """(what was said, usage)."""
    said = "".join(
        choice["delta"].get("content") or "" for event in events(text) for choice in event["choices"]
    )
    return said, events(text)[-1]["usage"]


async def usage(made: Fleet) -> list[dict[str, Any]]:
    await made.gateway.services.usage_writer.flush()
    found = await made.gateway.admin.get("/admin/v1/usage?by=outcome")
    return list(found.json()["data"])


def paths(caplog: pytest.LogCaptureFixture, trace: str) -> set[str]:
    """What was asked in a trace, as access lines have it."""
    return {r.getMessage() for r in caplog.records if getattr(r, "trace_id", None) == trace}
