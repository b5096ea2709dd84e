"""The fake against the suite that the real engine passes; ``tests/engine`` runs the other half."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import tiny
from tests.support.dialect_suite import DialectSuite
from tests.support.engine_calls import MakeAdapter, call, stage, then
from tests.support.engine_suite import EngineSuite
from tests.support.fakes import FakeEngine, Times
from tests.support.relay_suite import RelaySuite

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    times = Times(stage=0.005, step=0.002)
    fake = FakeEngine(tiny.base(), gpu_slots=6, host_slots=8, max_running=16, times=times)
    yield fake
    assert fake.violations == []


@pytest.fixture
def make_adapter() -> MakeAdapter:
    return tiny.adapter


class TestFakeEngine(EngineSuite):
    pass


class TestFakeDialects(DialectSuite):
    pass


class TestFakeRelays(RelaySuite):
    pass


class TestWhatTheFakeWatches:
    async def test_running_without_a_slot(self) -> None:
        fake = FakeEngine(tiny.base())
        made, request = call(fake, "chat", {"messages": [{"role": "user", "content": "hi"}]}, stage("/a"))
        with pytest.raises(AssertionError, match="has no slot"):
            await fake.answer(made, request)
        assert fake.violations

    async def test_taking_a_slot_from_under_a_request(self) -> None:
        fake = FakeEngine(tiny.base())
        load = stage(tiny.adapter(0))
        await fake.page([load])
        await fake.page([then("activate", load)])
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
        made, request = call(fake, "chat", body, load)
        answer = await fake.answer(made, request)
        assert answer.stream is not None
        await anext(answer.stream)
        await fake.page([then("deactivate", load)])
        assert "under a running request" in fake.violations[0]

    async def test_an_id_used_twice(self) -> None:
        fake = FakeEngine(tiny.base())
        load = stage("/nowhere")
        await fake.page([load, load])
        assert "used twice" in fake.violations[0]
