"""The suite that the fake passes, on the real engine.

The dispatcher would take the suite's loads for strays, so it stands still meanwhile and holds nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path

import pytest
import pytest_asyncio

from server.engine.calls import PageOp
from server.engine.engine import Engine
from tests.engine.reference import ATTENTION, MLP, Reference, Spec
from tests.support.dialect_suite import DialectSuite
from tests.support.engine_calls import MakeAdapter
from tests.support.engine_suite import EngineSuite
from tests.support.relay_suite import RelaySuite

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


@pytest.fixture(scope="module")
def make_adapter(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> MakeAdapter:
    root = tmp_path_factory.mktemp("suite")

    @cache
    def make(n: int) -> Path:
        return reference.make(Spec(seed=800 + n, rank=8, targets=ATTENTION + MLP), root / str(n))

    return make


@pytest_asyncio.fixture(loop_scope="session")
async def engine(quiet: Engine) -> AsyncIterator[Engine]:
    """``quiet``, holding no adapter before or after."""
    yield quiet
    async with asyncio.timeout(240):
        while (report := await quiet.report()).host or report.staging:
            await quiet.page([PageOp("evict", load_id) for load_id in report.host])
    assert report.in_step_loads == 0


class TestEngine(EngineSuite):
    pass


class TestDialects(DialectSuite):
    pass


class TestRelays(RelaySuite):
    pass
