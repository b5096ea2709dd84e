"""A log whose disk is full."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import logs
from tests.support import tiny
from tests.support.tiny import fake_site


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """What ``configure`` changes is global, and the other tests capture logs."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


async def test_a_log_without_room_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is the kernel's own full device. Once there is room again, lines are whole again."""
    with Path("/dev/full").open("w", buffering=1) as full, (tmp_path / "log").open("w", buffering=1) as roomy:
        monkeypatch.setattr("sys.stderr", full)
        logs.configure("json", "info")
        async with fake_site(tmp_path / "data") as site:
            key = await site.tenant("acme", {"a": tiny.adapter(1)})
            for _ in range(3):
                assert (await site.chat(key, "hi", model="a")).status_code == 200
            assert (await site.http.get("/ready")).status_code == 200
            (handler,) = logging.getLogger().handlers
            assert isinstance(handler, logging.StreamHandler)
            handler.stream = roomy
            assert (await site.chat(key, "hi", model="a")).status_code == 200
        with contextlib.suppress(OSError):
            full.close()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert any(line["message"] == "POST /v1/chat/completions" for line in lines)
