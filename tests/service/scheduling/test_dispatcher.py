"""The dispatcher on an engine that is slow: long answers, turns, leases, pins and warmth. Time is virtual."""

from __future__ import annotations

import asyncio
import re

import pytest

from adapters.errors import AdapterUnavailable
from adapters.model import Tier
from server.errors import TooManyRequests, Unavailable, headers_of
from server.scheduling.engine_loop import RECONCILE_EVERY
from tests.support.clock import run
from tests.support.fakes import Times
from tests.support.world import World, read, tenant, version

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")


class Idle:
    """Work that does nothing."""

    paused = False
    failed = False

    async def abort(self) -> None: ...

    async def pause(self) -> bool:
        return True

    async def resume(self) -> None: ...

    async def give_up(self, reason: str) -> None: ...

    def poll(self) -> None: ...


async def settle(world: World) -> None:
    """Long enough for every poll and one reconciliation."""
    await asyncio.sleep(RECONCILE_EVERY * 2.5)


# --- long generations ---------------------------------------------------------------------------------

HASTE = {"slot_patience": 0.2, "preempt_after": 0.3}


def _tokens(text: str) -> list[str]:
    return re.findall(r'"content": " (\d+)"', text)


@pytest.mark.parametrize("stream", [True, False])
def test_a_long_answer_is_put_aside_and_goes_on(stream: bool) -> None:
    async def scenario() -> None:
        async with World(limits=HASTE) as world:
            hog = asyncio.create_task(world.ask("hog", max_tokens=300, stream=stream))
            await asyncio.sleep(1)
            began = world.dispatcher.now()
            assert '"cold-a"' in await world.ask("cold", max_tokens=3)
            assert world.dispatcher.now() - began < 1
            assert not hog.done()
            text = await hog
            if stream:
                assert _tokens(text) == [str(i) for i in range(1, 300)]
            else:
                assert "'completion_tokens': 300" in text
            assert world.dispatcher.snapshot().preemptions == 1
            assert world.outcomes() == {"completed": 2}
            world.check_idle()
            assert world.engine.paused == []

    run(scenario())


def test_many_long_answers_share_few_slots() -> None:
    async def scenario() -> None:
        async with World(gpu_slots=2, host_slots=4, limits=HASTE) as world:
            asks = [world.ask(f"hog{n}", max_tokens=200) for n in range(6)]
            texts = await asyncio.gather(*asks)
            assert all(_tokens(text) == [str(i) for i in range(1, 200)] for text in texts)
            assert world.dispatcher.snapshot().preemptions > 6
            world.check_idle()

    run(scenario())


def test_an_answer_that_cannot_go_on_later_keeps_its_slot() -> None:
    async def scenario() -> None:
        async with World(limits=HASTE) as world:
            hog = asyncio.create_task(world.ask("hog", max_tokens=100, n=2))
            await asyncio.sleep(0.3)
            await world.ask("cold", max_tokens=3)
            assert hog.done()
            assert world.dispatcher.snapshot().preemptions == 0

    run(scenario())


@pytest.mark.parametrize("stream", [True, False])
def test_what_was_put_aside_fails_alone_when_its_adapter_is_gone(stream: bool) -> None:
    async def scenario() -> None:
        async with World(limits=HASTE) as world:
            hog = asyncio.create_task(world.ask("hog", max_tokens=300, stream=stream))
            await asyncio.sleep(0.5)
            cold = asyncio.create_task(world.ask("cold", max_tokens=50))
            while not world.engine.paused:
                await asyncio.sleep(0.05)
            world.engine.lose("hog/a@hog-a")
            world.engine.fail("stage", "hog/a@hog-a", 100)
            if stream:
                assert "service_unavailable_error" in await hog
            else:
                with pytest.raises(AdapterUnavailable):
                    await hog
            assert '"cold-a"' in await cold
            await settle(world)
            world.check_idle()

    run(scenario())


def test_what_was_put_aside_may_end_during_a_drain() -> None:
    async def scenario() -> None:
        async with World(limits=HASTE) as world:
            hog = asyncio.create_task(world.ask("hog", max_tokens=300))
            await asyncio.sleep(0.5)
            cold = asyncio.create_task(world.ask("cold", max_tokens=50))
            while not world.engine.paused:
                await asyncio.sleep(0.05)
            while not any(run.call.model.startswith("cold") for run in world.engine.running):
                await asyncio.sleep(0.05)
            world.dispatcher.drain()
            assert await world.dispatcher.wait_until_idle(60)
            assert len(_tokens(await hog)) == 299
            assert len(_tokens(await cold)) == 49

    run(scenario())


# --- what works -------------------------------------------------------------------------------------


def test_a_request_joins_the_load_that_is_under_way() -> None:
    async def scenario() -> None:
        async with World() as world:
            texts = await asyncio.gather(*(world.ask("acme") for _ in range(4)))
            assert all('"acme-a"' in text for text in texts)
            assert [op.verb for op in world.engine.ops] == ["stage", "activate"]
            assert world.dispatcher.tier_of(version("acme")) is Tier.GPU
            assert world.dispatcher.tier_of(version("zeta")) is Tier.DISK
            world.check_idle()

    run(scenario())


def test_the_base_model_needs_no_slot() -> None:
    async def scenario() -> None:
        async with World() as world, world.busy("acme"):
            assert '"base"' in await world.ask("zeta", model="base-model")
            assert [op.verb for op in world.engine.ops] == ["stage", "activate"]

    run(scenario())


def test_many_versions_take_turns_in_one_slot() -> None:
    async def scenario() -> None:
        async with World(limits={"slot_patience": 0.1}) as world:
            names = [f"t{i}" for i in range(6)] * 3
            texts = await asyncio.gather(*(world.ask(name, max_tokens=5) for name in names))
            for name, text in zip(names, texts, strict=True):
                assert f'"{name}-a"' in text
            world.check_idle()
            assert world.outcomes() == {"completed": 18}

    run(scenario())


def test_a_warm_stream_is_not_delayed_by_a_load() -> None:
    async def scenario() -> None:
        times = Times(stage=5.0, activate=0.01, step=0.02, page=0.001)
        async with World(gpu_slots=2, host_slots=4, times=times) as world:
            opened = await world.open("warm", max_tokens=400)
            assert opened.stream is not None
            cold = [asyncio.create_task(world.ask(f"cold{i}")) for i in range(3)]
            gaps, before = [], None
            async for _ in opened.stream:
                now = world.dispatcher.now()
                if before is not None:
                    gaps.append(now - before)
                before = now
            await opened.stream.aclose()
            assert max(gaps) <= times.step + times.activate + 3 * times.page
            await asyncio.gather(*cold)

    run(scenario())


def test_weights_decide_who_gets_more() -> None:
    async def scenario() -> list[str]:
        async with World(max_running=1, gpu_slots=2) as world:
            done: list[str] = []

            async def client(who: str, weight: float) -> None:
                while len(done) < 60:
                    await world.ask(tenant(who, weight=weight), max_tokens=8)
                    done.append(who)

            await asyncio.gather(
                *(client(w, x) for w, x in (("heavy", 3.0), ("light", 1.0)) for _ in range(4))
            )
            return done[10:60]

    done = run(scenario())
    assert 32 <= done.count("heavy") <= 43, done


def test_a_tenants_own_limits_hold() -> None:
    async def scenario() -> None:
        async with World(max_running=8) as world:
            small = tenant("small", max_running=1, max_queued=2)
            most = 0

            async def watch() -> None:
                nonlocal most
                while True:
                    most = max(most, len(world.engine.running))
                    await asyncio.sleep(0.005)

            watching = asyncio.create_task(watch())
            asked = [asyncio.create_task(world.ask(small)) for _ in range(5)]
            results = await asyncio.gather(*asked, return_exceptions=True)
            watching.cancel()
            assert most == 1
            refused = [r for r in results if isinstance(r, TooManyRequests)]
            assert len(refused) == 3
            assert all(int(headers_of(error)["Retry-After"]) >= 1 for error in refused)
            assert world.outcomes() == {"completed": 2, "refused": 3}
            world.check_idle()

    run(scenario())


def test_waiting_has_an_end() -> None:
    async def scenario() -> None:
        async with (
            World(limits={"queue_timeout": 3.0, "slot_patience": 100.0}) as world,
            world.busy("acme", 400),
        ):
            started = world.dispatcher.now()
            with pytest.raises(Unavailable) as refused:
                await world.ask("zeta")
            assert refused.value.code == "queue_timeout"
            assert world.dispatcher.now() - started == pytest.approx(3.0, abs=0.1)
            assert "Retry-After" in headers_of(refused.value)

    run(scenario())


def test_an_unstreamed_answer_is_counted_while_it_is_produced() -> None:
    async def scenario() -> None:
        async with World() as world, world.busy("zeta"):
            await asyncio.sleep(5.0)  # nothing had to be counted meanwhile
            answering = asyncio.create_task(world.ask("acme", stream=False, max_tokens=100))
            await asyncio.sleep(1.0)
            (lease,) = (lease for lease in world.dispatcher.open_leases() if lease.tenant == "acme")
            assert 20 < lease.output_tokens < 60
            assert world.dispatcher.snapshot().counters["acme"] > 2 * 20
            assert repr(lease).startswith("<Lease acme-2 acme acme/a@acme-a 2+")
            await answering
            assert lease.output_tokens == 100

    run(scenario())


# --- leases -----------------------------------------------------------------------------------------


def test_closing_is_done_once_whoever_asks() -> None:
    async def scenario() -> None:
        async with World() as world:
            lease = await world.lease("acme")
            lease.progressed("part", 7, 3, 0)
            lease.progressed("part", 7, 2, 0)
            lease.progressed("other", 1, 1, 1)
            await asyncio.gather(lease.close("disconnected"), lease.close("completed"), lease.close())
            await lease.close("failed")
            assert (lease.prompt_tokens, lease.output_tokens, lease.cached_tokens) == (8, 4, 1)
            assert world.outcomes() == {"disconnected": 1}
            world.check_idle()

    run(scenario())


def test_a_closer_that_is_cancelled_closes_all_the_same() -> None:
    async def scenario() -> None:
        async with World() as world:
            lease = await world.lease("acme")
            released = asyncio.Event()

            class Slow(Idle):
                async def abort(self) -> None:
                    await released.wait()

            lease.work = Slow()
            closer = asyncio.create_task(lease.close("disconnected"))
            await asyncio.sleep(0.1)
            closer.cancel()
            await asyncio.wait([closer])
            assert closer.cancelled()
            assert world.dispatcher.in_use([version("acme").key]), "the engine still holds it"
            released.set()
            await asyncio.sleep(0.1)
            world.check_idle()

    run(scenario())


def test_an_abort_that_fails_still_gives_the_place_back() -> None:
    async def scenario() -> None:
        async with World() as world:
            lease = await world.lease("acme")

            class Broken(Idle):
                async def abort(self) -> None:
                    raise RuntimeError("no")

            lease.work = Broken()
            with pytest.raises(RuntimeError):
                await lease.close("disconnected")
            world.check_idle()

    run(scenario())


def test_drain_refuses_what_waits_and_cut_ends_what_runs() -> None:
    async def scenario() -> None:
        async with World(max_running=1) as world, world.busy("acme", 200) as running:
            waiting = asyncio.create_task(world.ask("acme"))
            await asyncio.sleep(0.1)
            world.dispatcher.drain()
            for late in (waiting, world.ask("acme")):
                with pytest.raises(Unavailable) as refused:
                    await late
                assert refused.value.code == "shutting_down"
                assert headers_of(refused.value)["Retry-After"] == "5"
            assert not await world.dispatcher.wait_until_idle(0.5)
            assert not running.done()
            for lease in world.dispatcher.open_leases():
                await lease.close("cut")
            assert await world.dispatcher.wait_until_idle(0)
            assert "abort" in await running
            assert world.outcomes() == {"cut": 1, "unavailable": 2}

    run(scenario())


def test_drain_lets_what_runs_end() -> None:
    async def scenario() -> None:
        async with World() as world:
            running = asyncio.create_task(world.ask("acme", max_tokens=50))
            await asyncio.sleep(0.5)
            world.dispatcher.drain()
            assert await world.dispatcher.wait_until_idle(10)
            assert '" 49"' in await running

    run(scenario())


# --- pins, warmth, retirement -----------------------------------------------------------------------


def test_a_pinned_version_stays() -> None:
    async def scenario() -> None:
        async with World(gpu_slots=2, host_slots=2) as world:
            await world.ask("pinned")
            world.dispatcher.pin(version("pinned"), True)
            for name in ("b", "c", "d"):
                await world.ask(name)
            assert world.dispatcher.tier_of(version("pinned")) is Tier.GPU
            world.dispatcher.pin(version("pinned"), False)
            for name in ("b", "c", "d"):
                await world.ask(name)
            assert world.dispatcher.tier_of(version("pinned")) is Tier.DISK

    run(scenario())


def test_a_pinned_version_is_loaded_without_a_request() -> None:
    async def scenario() -> None:
        async with World() as world:
            world.dispatcher.pin(version("pinned"), True)
            await asyncio.sleep(1)
            assert world.dispatcher.tier_of(version("pinned")) is Tier.GPU

    run(scenario())


@pytest.mark.parametrize(("slot", "tier"), [(False, Tier.HOST), (True, Tier.GPU)])
def test_warm_returns_when_it_is_there(slot: bool, tier: Tier) -> None:
    async def scenario() -> None:
        async with World(times=Times(stage=1.0, activate=0.5)) as world:
            warming = [
                asyncio.create_task(world.dispatcher.warm(version("acme"), slot=slot, timeout=10))
                for _ in range(2)
            ]
            await asyncio.sleep(0.9)
            assert not any(one.done() for one in warming)
            assert await asyncio.gather(*warming) == [tier, tier]
            assert world.dispatcher.now() < 2
            assert await world.dispatcher.warm(version("acme"), slot=slot, timeout=0.1) is tier

    run(scenario())


def test_warm_says_why_not() -> None:
    async def scenario() -> None:
        async with World(gpu_slots=1, host_slots=1) as world:
            warm = world.dispatcher.warm
            async with world.busy("a"):
                with pytest.raises(Unavailable) as no_room:
                    await warm(version("b"), slot=False, timeout=0.5)
            world.engine.fail("stage", version("c").key)
            with pytest.raises(AdapterUnavailable):
                await warm(version("c"), slot=False, timeout=0.5)
            assert no_room.value.code == "no_room"
            assert world.plan.known_versions() <= {version("a").key}
            world.dispatcher.drain()
            with pytest.raises(Unavailable) as stopped:
                await warm(version("d"), slot=False, timeout=0.5)
            assert stopped.value.code == "shutting_down"

    run(scenario())


def test_a_retired_version_leaves_when_its_last_request_is_done() -> None:
    async def scenario() -> None:
        async with World() as world:
            opened = await world.open("acme", max_tokens=20)
            key = version("acme").key
            world.dispatcher.retire(version("acme"))
            assert world.dispatcher.in_use([key])
            await asyncio.sleep(0.1)
            assert world.engine.held(key)
            assert '" 19"' in await read(opened)
            assert not world.dispatcher.in_use([key])
            await asyncio.sleep(0.1)
            assert not world.engine.held(key)

    run(scenario())


def test_gauges_say_what_is_where() -> None:
    async def scenario() -> None:
        async with World(gpu_slots=2, host_slots=3) as world:
            for name in ("a", "b", "c"):
                await world.ask(name)
            async with world.busy("c"):
                gauges = world.dispatcher.gauges(10)
                assert gauges.adapters == {"disk": 7, "host": 1, "gpu": 2}
                assert (gauges.slots, gauges.slots_used, gauges.host_slots) == (2, 2, 3)
                assert gauges.running == {"c": 1}
            assert world.dispatcher.gauges(10).running == {}

    run(scenario())
