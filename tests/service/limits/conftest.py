"""Redis is patiently waited for, unless a test is about one that does not answer."""

from __future__ import annotations

import pytest

from server.limits import redis


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy may let a Redis that is well wait for longer than customers should."""
    monkeypatch.setattr(redis, "TIMEOUT_S", 60.0)
    monkeypatch.setattr(redis, "_SOCKET_TIMEOUT_S", 60.0)
