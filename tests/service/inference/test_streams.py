"""How a stream that its client leaves is recorded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import pytest

from server.inference.completion import DONE, LeasedStream
from server.inference.dialects.registry import DIALECTS
from server.scheduling.lease import Lease


class _Lease:
    outcome: str | None = None

    async def close(self, outcome: str) -> None:
        self.outcome = outcome


async def _chunks() -> AsyncIterator[str]:
    """An answer whose replica does not say that it has ended."""
    yield "data: {}\n\n"
    yield "data: {}\n\n"
    yield DONE
    await asyncio.Event().wait()


@pytest.mark.parametrize(("read", "outcome"), [(1, "disconnected"), (2, "disconnected"), (3, "completed")])
async def test_who_leaves_at_the_last_event_has_been_answered(read: int, outcome: str) -> None:
    lease = _Lease()
    stream = await LeasedStream.opened(_chunks(), cast("Lease", lease), DIALECTS["chat"])
    chunks = stream.__aiter__()
    for _ in range(read):
        await anext(chunks)
    await stream.aclose()
    assert lease.outcome == outcome
