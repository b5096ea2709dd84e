"""An S3 store that the tests of this folder share, one for each file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.object_stores import S3, s3_server


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server() as running:
        yield running


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server
