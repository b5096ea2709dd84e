"""The dispatcher against an engine that fails, dies, loses things or is silent. Time is virtual."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence

import pytest

from adapters.errors import AdapterUnavailable
from adapters.model import Tier
from server.engine.calls import PageOp, PageReport
from server.errors import Unavailable, headers_of
from tests.service.scheduling.test_dispatcher import settle
from tests.support.clock import VirtualLoop, run
from tests.support.fakes import FakeEngine, Times
from tests.support.world import World, version

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")


# --- what fails -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["stage", "activate"])
def test_a_load_that_fails_is_its_own_requests_affair(verb: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with World(gpu_slots=2) as world, world.busy("warm") as warm:
            world.engine.fail(verb, version("bad").key)
            asked = {who: asyncio.create_task(world.ask(who)) for who in ("bad", "good")}
            also_bad = asyncio.create_task(world.ask("bad"))
            assert '"good-a"' in await asked["good"]
            for task in (asked["bad"], also_bad):
                with pytest.raises(AdapterUnavailable) as refused:
                    await task
                assert headers_of(refused.value)["Retry-After"]
            assert not warm.done()
            assert '"bad-a"' in await world.ask("bad"), "the next attempt works"
            ids = [op.load_id for op in world.engine.ops if op.verb == "stage"]
            assert len(set(ids)) == len(ids), "a failed load burns its id"
            text = world.metrics.render().decode()
            assert f'loraplex_load_failures_total{{step="{verb}"}} 1.0' in text

    run(scenario())
    (told,) = (line for line in caplog.messages if " of load " in line)
    assert re.match(rf"{verb} of load \d+ \(bad/a@1\) failed: ", told), "whose it is"


def test_the_engines_death_ends_everything_once() -> None:
    async def scenario() -> None:
        async with World(max_running=1) as world:
            running = asyncio.create_task(world.ask("acme", stream=False, max_tokens=1000))
            await asyncio.sleep(1.0)
            waiting = [asyncio.create_task(world.ask(who)) for who in ("acme", "zeta", "acme")]
            await asyncio.sleep(0.5)
            world.engine.die()
            for task in (*waiting, running):
                with pytest.raises(Unavailable) as refused:
                    await task
                assert refused.value.code == "engine_stopped"
                assert "Retry-After" in headers_of(refused.value)
            with pytest.raises(Unavailable) as refused:
                await world.ask("acme")
            assert refused.value.code == "engine_stopped"
            await settle(world)
            assert len(world.deaths) == 1
            world.dispatcher.drain()
            assert await world.dispatcher.wait_until_idle(1)
            world.check_idle()

    run(scenario())


def test_a_pager_that_fails_in_an_unknown_way_does_not_hang_its_clients() -> None:
    async def scenario() -> None:
        async with World() as world:
            world.engine.raises = RuntimeError("nobody thought of this")
            with pytest.raises(Unavailable) as refused:
                await asyncio.wait_for(world.ask("acme"), 30)
            assert refused.value.code == "engine_stopped"
            assert len(world.deaths) == 1, "the process must be restarted"

    run(scenario())


# --- reconciliation ---------------------------------------------------------------------------------


def test_what_the_engine_lost_is_loaded_again() -> None:
    async def scenario() -> None:
        async with World() as world:
            await world.ask("acme")
            world.engine.lose(version("acme").key)
            await settle(world)
            assert world.dispatcher.tier_of(version("acme")) is Tier.DISK
            assert '"acme-a"' in await world.ask("acme")

    run(scenario())


def test_what_nobody_knows_is_evicted() -> None:
    async def scenario() -> None:
        async with World() as world:
            world.engine.plant(77)
            await settle(world)
            assert (await world.engine.report()).host == frozenset()

    run(scenario())


def test_a_slot_that_was_not_given_back_is_taken_back() -> None:
    async def scenario() -> None:
        async with World(host_slots=3) as world:
            await world.ask("acme")
            world.engine.fail("deactivate", version("acme").key)
            with pytest.raises(AdapterUnavailable):
                await world.ask("zeta")
            await settle(world)
            assert '"zeta-a"' in await world.ask("zeta")

    run(scenario())


def test_an_adapter_that_fell_out_of_its_slot_is_not_run_without_one() -> None:
    async def scenario() -> None:
        async with World() as world:
            await world.ask("acme")
            (load_id,) = (await world.engine.report()).host
            world.engine._leave_slot(load_id)
            await settle(world)
            assert '"acme-a"' in await world.ask("acme")

    run(scenario())


# --- workers that tell of their loads ------------------------------------------------------------------


class Counting(FakeEngine):
    """Counts how often it is asked whether a load has been read."""

    asked = 0

    async def page(self, ops: Sequence[PageOp]) -> PageReport:
        self.asked += not ops
        return await super().page(ops)


@pytest.mark.parametrize(
    ("tells", "least", "most"), [(True, 1, 2), (False, 10, 1000)], ids=["told", "asked for"]
)
def test_workers_that_tell_of_a_load_are_not_asked_all_the_time(tells: bool, least: int, most: int) -> None:
    async def scenario() -> tuple[int, float]:
        times = Times(stage=0.4, activate=0.01, step=0.02, page=0.001)
        async with World(make_engine=Counting, times=times) as world:
            engine: Counting = world.engine
            engine.tells = tells
            await asyncio.sleep(0)
            began = world.dispatcher.now()
            assert '"a-a"' in await world.ask("a", max_tokens=1)
            return engine.asked, world.dispatcher.now() - began

    asked, took = run(scenario())
    assert least <= asked <= most
    assert took < 0.6


class Lost(FakeEngine):
    """Says that it tells, and does not."""

    def listen(self, on_notice: Callable[[], None]) -> bool:
        return True


def test_a_notice_that_is_lost_is_made_up_for() -> None:
    async def scenario() -> float:
        async with World(make_engine=Lost) as world:
            began = world.dispatcher.now()
            assert '"a-a"' in await world.ask("a", max_tokens=1)
            return world.dispatcher.now() - began

    assert run(scenario()) < 1


def test_a_drain_does_not_count_the_time_in_which_the_process_stood_still() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        async with World(times=Times(step=0.1)) as world, world.busy("acme", 20):
            draining = asyncio.create_task(world.dispatcher.wait_until_idle(5.0))
            await asyncio.sleep(0.5)
            loop.stand_still(60.0)
            assert await draining, "two seconds were enough"
        async with World(times=Times(step=0.1)) as world, world.busy("acme", 200):
            assert not await world.dispatcher.wait_until_idle(5.0)

    run(scenario())
