"""An S3 store that the tests of this folder share, one for each file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from adapters.store import objects
from tests.support.object_stores import S3, s3_server


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy, or stands still, has no fault in its store."""
    for name in ("_CONNECT", "_READ", "_CALL", "_CHECK"):
        monkeypatch.setattr(objects, name, 60.0)


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server() as running:
        yield running


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server
