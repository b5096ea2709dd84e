"""The engine dies or hangs, and is started again. Time is virtual; the fake engine takes 20 s to start."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence

import pytest

from adapters.model import Tier
from server.engine.calls import PageOp, PageReport
from server.errors import Unavailable, headers_of
from server.scheduling.checkpoints import restored
from server.scheduling.engine_loop import RECONCILE_EVERY
from server.scheduling.event_log import from_log, replay
from server.scheduling.nouns import Run
from tests.support.clock import VirtualLoop, run
from tests.support.world import Pager, World, version

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")


def tokens(text: str) -> list[str]:
    return re.findall(r'"content": " (\d+)"', text)


@pytest.mark.parametrize("how", ["death", "hang"])
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_can_go_on_goes_on_with_the_same_tokens(how: str, stream: bool) -> None:
    async def scenario() -> None:
        async with World(restarts=3, stall=5.0) as world:
            asking = [asyncio.create_task(world.ask("acme", max_tokens=300, stream=stream)) for _ in range(2)]
            asking.append(
                asyncio.create_task(world.ask("acme", model="base-model", max_tokens=300, stream=stream))
            )
            await asyncio.sleep(2)
            world.lose(how)
            for text in await asyncio.gather(*asking):
                if stream:
                    assert tokens(text) == [str(i) for i in range(1, 300)]
                else:
                    assert "'completion_tokens': 300" in text
            assert world.engine.lives == 2
            assert world.outcomes() == {"completed": 3}
            assert f'engine_restarts_total{{reason="{how}"}} 1.0' in world.metrics.render().decode()
            world.check_idle()

    run(scenario())


@pytest.mark.parametrize("how", ["death", "hang"])
def test_what_waits_keeps_its_place(how: str) -> None:
    async def scenario() -> None:
        async with World(max_running=1, restarts=3, stall=5.0) as world:
            first = asyncio.create_task(world.ask("acme", max_tokens=100))
            await asyncio.sleep(1)
            done: list[str] = []

            async def client(who: str) -> None:
                await world.ask(who)
                done.append(who)

            waiting = []
            for who in ("b", "c", "d"):
                waiting.append(asyncio.create_task(client(who)))
                await asyncio.sleep(0.05)
            world.lose(how)
            await asyncio.gather(first, *waiting)
            assert done == ["b", "c", "d"]
            world.check_idle()

    run(scenario())


@pytest.mark.parametrize("how", ["death", "hang"])
@pytest.mark.parametrize("stream", [True, False])
def test_all_others_end_at_once_with_a_code(how: str, stream: bool) -> None:
    async def scenario() -> None:
        async with World(restarts=3, stall=5.0) as world:
            asking = asyncio.create_task(world.ask("acme", n=2, max_tokens=2000, stream=stream))
            await asyncio.sleep(1)
            world.lose(how)
            began = world.dispatcher.now()
            if stream:
                assert "engine_restarting" in await asking
            else:
                with pytest.raises(Unavailable) as refused:
                    await asking
                assert refused.value.code == "engine_restarting"
                assert int(headers_of(refused.value)["Retry-After"]) >= 1
            assert world.dispatcher.now() - began < (1 if how == "death" else 12)
            assert world.dispatcher.is_restarting
            assert '"acme-a"' in await world.ask("acme")
            assert world.outcomes() == {"failed": 1, "completed": 1}
            world.check_idle()

    run(scenario())


@pytest.mark.parametrize("how", ["death", "hang"])
def test_time_limits_and_cancellation_hold_meanwhile(how: str) -> None:
    async def scenario() -> None:
        limits = {"queue_timeout": 3.0}
        async with World(max_running=1, restarts=3, stall=60.0, limits=limits) as world:
            running = asyncio.create_task(world.ask("acme", max_tokens=2000))
            await asyncio.sleep(1)
            world.lose(how)
            leaves = asyncio.create_task(world.ask("acme"))
            began = world.dispatcher.now()
            with pytest.raises(Unavailable) as refused:
                await world.ask("zeta")
            assert refused.value.code == "queue_timeout"
            assert world.dispatcher.now() - began == pytest.approx(3.0, abs=0.1)
            with pytest.raises(Unavailable):
                await leaves
            running.cancel()
            await asyncio.wait([running], timeout=6)
            assert running.cancelled()
            world.dispatcher.drain()
            assert await world.dispatcher.wait_until_idle(1)

    run(scenario())


def test_a_hung_engine_is_noticed_when_nothing_runs() -> None:
    async def scenario() -> None:
        async with World(restarts=3, stall=5.0) as world:
            await world.ask("acme")
            assert not world.dispatcher.is_silent
            world.engine.hang()
            await asyncio.sleep(RECONCILE_EVERY + 1.5)
            assert world.dispatcher.is_silent, "a quarter of the time has passed"
            assert world.engine.lives == 1
            await asyncio.sleep(40)
            assert world.engine.lives == 2
            assert not world.dispatcher.is_restarting
            assert not world.dispatcher.is_silent

    run(scenario())


class _InManyTurns(Pager):
    """Its answers take a second and then, as those that come through sockets do, many turns of the loop."""

    async def page(self, ops: Sequence[PageOp]) -> PageReport:
        await asyncio.sleep(1)
        for _ in range(50):
            await asyncio.sleep(0)
        return await super().page(ops)


def test_an_engine_is_not_hung_because_this_process_stood_still() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        async with World(restarts=3, stall=5.0, make_engine=_InManyTurns) as world:
            asking = asyncio.create_task(world.ask("acme"))
            while not asking.done():
                await asyncio.sleep(0.3)
                loop.stand_still(7)
            assert '"acme-a"' in await asking
            assert world.engine.lives == 1

    run(scenario())


def test_pinned_versions_are_loaded_again() -> None:
    async def scenario() -> None:
        async with World(restarts=3) as world:
            world.dispatcher.pin(version("pinned"), True)
            await asyncio.sleep(1)
            assert world.dispatcher.tier_of(version("pinned")) is Tier.GPU
            world.engine.die()
            await asyncio.sleep(1)
            assert world.dispatcher.tier_of(version("pinned")) is Tier.DISK
            await asyncio.sleep(25)
            assert world.dispatcher.tier_of(version("pinned")) is Tier.GPU

    run(scenario())


def test_too_many_losses_end_the_server() -> None:
    async def scenario() -> None:
        async with World(restarts=3) as world:
            for _ in range(3):
                world.engine.die()
                await asyncio.sleep(1)
                assert '"acme-a"' in await world.ask("acme")
            assert world.deaths == []
            waiting = asyncio.create_task(world.ask("acme", max_tokens=300))
            await asyncio.sleep(1)
            world.engine.die()
            assert "error" in await waiting
            assert len(world.deaths) == 1
            with pytest.raises(Unavailable) as refused:
                await world.ask("acme")
            assert refused.value.code == "engine_stopped"

    run(scenario())


def test_a_start_that_fails_counts_as_a_loss() -> None:
    async def scenario() -> None:
        async with World(restarts=3, limits={"queue_timeout": 500.0}) as world:
            world.engine.starts_fail = 2
            world.engine.die()
            await asyncio.sleep(1)
            assert '"acme-a"' in await world.ask("acme")
            assert world.deaths == []
            world.engine.die()
            await asyncio.sleep(1)
            assert len(world.deaths) == 1

    run(scenario())


def test_a_version_that_ran_in_two_losses_in_a_row_is_named() -> None:
    async def scenario() -> None:
        async with World(gpu_slots=2, host_slots=4, restarts=9) as world:
            for names in (("bad", "good"), ("bad", "other"), ("other",), ("third",)):
                asking = [asyncio.create_task(world.ask(name, max_tokens=100)) for name in names]
                while len(world.engine.running) < len(names):
                    await asyncio.sleep(0.05)
                world.engine.die()
                await asyncio.gather(*asking)
            assert world.faults == [version("bad").key, version("other").key]

    run(scenario())


@pytest.mark.parametrize(
    ("customers", "told"),
    [
        (["zeta", "acme"], "acme/a@1, zeta/a@1"),
        ([], "no version of an adapter"),
        ([f"t{n:02}" for n in range(23)], ", ".join(f"t{n:02}/a@1" for n in range(20)) + " and 3 more"),
    ],
)
def test_the_log_has_the_versions_that_ran_when_the_engine_was_lost(
    customers: list[str], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        most = max(1, len(customers))
        async with World(gpu_slots=most, host_slots=most + 1, max_running=most, restarts=3) as world:
            asking = [asyncio.create_task(world.ask(name, max_tokens=200)) for name in customers]
            while len(world.engine.running) < len(customers):
                await asyncio.sleep(0.05)
            world.engine.die()
            await asyncio.gather(*asking)
            await asyncio.sleep(1)

    run(scenario())
    found = [line for line in caplog.messages if line.startswith("when the engine was lost")]
    assert found == [f"when the engine was lost there ran: {told}"]


def test_an_engine_that_ends_with_the_server_is_no_loss(caplog: pytest.LogCaptureFixture) -> None:
    """Nor evidence for the next start, which knows the losses of the last ten minutes."""

    async def scenario() -> None:
        async with World() as world:
            asking = asyncio.create_task(world.ask("acme", max_tokens=200))
            while not world.engine.running:
                await asyncio.sleep(0.05)
            await world.dispatcher.stop()
            world.engine.die()
            await asyncio.sleep(1)
            assert world.plan.losses == ()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    run(scenario())
    assert not [line for line in caplog.messages if "the engine died" in line]


def test_a_check_that_fails_ends_nothing_and_logs_what_replays_to_that_state(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        async with World() as world:
            await world.ask("acme")
            world.plan._sequences += 1
            await asyncio.sleep(12)
            world.plan._sequences -= 1
            assert world.deaths == []
            assert '"acme-a"' in await world.ask("acme")
            failures = re.search(r"plan_check_failures_total (\d)", world.metrics.render().decode())
            assert failures is not None
            assert int(failures[1]) >= 1

    run(scenario())
    recording = from_log(caplog.text)
    plan = restored(recording["checkpoint"])
    assert any(Run in map(type, effects) for effects in replay(plan, recording["events"]))
    plan.check()
    assert caplog.text.count("recording 1/") == 1, "however often the check fails"
