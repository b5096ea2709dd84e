"""A customer's ``max_running`` holds over all replicas and all gateways; what waits for it waits in order."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.errors import AdapterError
from server.accounts.tenants import Tenant
from server.accounts.terms import KeyLimits
from server.app import create_app
from server.errors import ServerError, TooManyRequests, Unavailable
from server.fleet.places import Place, Places
from server.inference.embeddings import inputs_of, most_places
from server.inference.embeddings import places_of as places_of_inputs
from server.limits.budget import Amount
from server.limits.ledger import PLACES, Entry, Refused, Scope
from server.limits.line import Waits
from server.limits.memory import MemoryLedger
from server.limits.rate import RateMeter
from server.limits.redis import RedisLedger
from tests.support import tiny
from tests.support.fakes import Times
from tests.support.fleet import FLEET_KEY, Fleet, fleet
from tests.support.ledgers import NO_BUDGET
from tests.support.services import redis
from tests.support.site import Site, serving
from tests.support.world import tenant


def some(**fields: Any) -> Tenant:
    return tenant(f"t{uuid.uuid4().hex[:12]}", **fields)


def places_of(ledger: Any = None, *, timeout: float = 600.0, max_queued: int = 64) -> Places:
    return Places(ledger or MemoryLedger(), timeout=timeout, max_queued=max_queued)


@asynccontextmanager
async def shared(**options: Any) -> AsyncIterator[RedisLedger]:
    ledger = RedisLedger(redis(), **options)
    await ledger.open()
    try:
        yield ledger
    finally:
        await ledger.stop()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "given", ["a text", ["a text"], ["one", "two", "three"], list(range(2000)), [[1, 2], [3]], ["a"] * 2000]
)
def test_a_gateway_counts_the_places_of_embeddings_as_a_replica_does(given: Any) -> None:
    """A prompt as a list of tokens is one input, however long it is."""
    inputs = inputs_of(SimpleNamespace(input=given))
    for running in (1, 8, 256):
        assert most_places({"input": given}, running) == places_of_inputs(inputs, running)


async def test_requests_wait_in_order_and_large_ones_run_alone() -> None:
    places, one = places_of(), some(max_running=2)
    held = [await places.take(one, 1), await places.take(one, 1)]
    order: list[int] = []

    async def wait(number: int, sequences: int) -> Place:
        place = await places.take(one, sequences)
        order.append(number)
        return place

    waiting = [asyncio.create_task(wait(number, sequences)) for number, sequences in enumerate((5, 1, 1))]
    await until(lambda: places.waiting() == {one.id: 3})
    await places.take(some(max_running=1), 1)  # another customer's
    await places.take(some(), 7)  # and one without such a limit
    held[0].give_back()
    held[0].give_back()  # once is enough
    await asyncio.sleep(0.2)
    assert order == [], "the first one needs all places, and nobody passes it"
    held[1].give_back()
    large = await waiting[0]
    assert order == [0]
    large.give_back()
    for each in await asyncio.gather(*waiting[1:]):
        each.give_back()
    assert order == [0, 1, 2]
    assert places.waiting() == {}


async def test_what_redis_reads_of_a_place_does_not_grow_with_the_places_of_the_last_minute() -> None:
    now, one = 1000.0, some(max_running=2)
    scope = Scope(f"{one.queue} {PLACES}", PLACES, KeyLimits(tokens_per_minute=2))
    async with shared(clock=lambda: now, lease=1e6) as ledger:
        places, held = places_of(ledger), deque[Place]()
        for number in range(100):
            if len(held) == 2:
                held.popleft().give_back()
            held.append(await places.take(one, 1))
            assert ledger.remaining(scope)["tokens"].remaining == (1 if number == 0 else 0)
            now += 0.1
        keys = [f"loraplex:{scope.name}:{part}" for part in ("requests", "tokens", "line")]
        assert await ledger._redis.exists(*keys) == 0, "no part of a window"
        assert await ledger._redis.hlen(f"loraplex:{scope.name}:reserved") == 2
        while held:
            held.pop().give_back()


@pytest.mark.parametrize("seed", range(5))
async def test_redis_keeps_the_line_as_the_meter_in_memory_does(seed: int) -> None:
    rng, now = random.Random(seed), 1000.0
    limits = KeyLimits(tokens_per_minute=4)
    scope, meter = Scope(f"{uuid.uuid4().hex} {PLACES}", PLACES, limits), RateMeter()
    came = {f"{number:02}": 0.0 for number in range(6)}
    held: list[tuple[Entry, int]] = []
    outcomes = Counter[str]()
    async with shared(clock=lambda: now, lease=1e6) as ledger:
        for _ in range(250):
            now += rng.choice([0.25, 0.5, 1.0])
            id_ = rng.choice(list(came))
            waits = Waits(id_, now - (came[id_] or now), 2.0)
            came[id_] = came[id_] or now
            match rng.choice(("ask", "ask", "end", "leave")):
                case "ask" if all(entry.id != id_ for entry, _ in held):
                    wanted = rng.randrange(1, 5)
                    refused = meter.check(limits, wanted, now, waits)
                    if refused is None:
                        meter.begin(wanted, now, waits)
                    try:
                        entry = await ledger.reserve([scope], NO_BUDGET, Amount(wanted), waits)
                    except Refused:
                        assert refused is not None
                        outcomes["passed over" if meter.reserved + wanted <= 4 else "full"] += 1
                    else:
                        assert refused is None
                        held.append((entry, wanted))
                        came[id_] = 0.0
                        outcomes["taken"] += 1
                case "end" if held:
                    entry, wanted = held.pop(rng.randrange(len(held)))
                    meter.use(0, wanted, now)
                    meter.end()
                    ledger.use(entry, Amount(), entry.reserved)
                    ledger.close(entry)
                    await ledger._report(only_closed=True)
                case "leave" if all(entry.id != id_ for entry, _ in held):
                    meter.line.leave(id_)
                    ledger.leave(scope, waits)
                    await ledger._report(only_closed=True)
                    came[id_] = 0.0
        for entry, _ in held:
            ledger.close(entry)
    assert min(outcomes.values()) >= 5
    assert len(outcomes) == 3


async def test_small_requests_of_another_gateway_do_not_pass_a_large_one_for_ever() -> None:
    one = some(max_running=2)
    async with shared() as first, shared() as second:
        here, there = places_of(first), places_of(second)
        answered, stopped = 0, asyncio.Event()

        async def small() -> None:
            nonlocal answered
            while not stopped.is_set():
                place = await there.take(one, 1)
                await asyncio.sleep(random.uniform(0.01, 0.03))
                place.give_back()
                answered += 1

        async with asyncio.timeout(120), asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(small())
            await until(lambda: answered > 8)
            large = await here.take(one, 2)
            before = answered
            await asyncio.sleep(0.2)
            assert answered == before, "it has all places"
            large.give_back()
            await until(lambda: answered > before)
            gone = asyncio.create_task(here.take(one, 2))
            await until(lambda: here.waiting() != {})
            gone.cancel()
            left = answered
            await until(lambda: answered > left + 8)
            stopped.set()
        assert (await first._redis.hlen(f"loraplex:{one.queue} {PLACES}:line")) == 0


async def test_too_many_may_not_wait_and_none_for_ever() -> None:
    places = places_of(timeout=0.2, max_queued=9)
    one = some(max_running=1, max_queued=1)
    held = await places.take(one, 1)
    waiting = asyncio.create_task(places.take(one, 1))
    await until(lambda: places.waiting() == {one.id: 1})
    with pytest.raises(TooManyRequests) as full:
        await places.take(one, 1)
    assert full.value.code == "rate_limit_exceeded"
    with pytest.raises(Unavailable) as late:
        await waiting
    assert late.value.code == "queue_timeout"
    held.give_back()
    (await places.take(one, 1)).give_back()


async def test_a_ledger_is_told_only_of_those_that_asked_it() -> None:
    """Whoever is refused at the gateway, or is behind others there, would be a question to Redis each."""
    ledger, one = Counted(), some(max_running=1, max_queued=2)
    places = places_of(ledger)
    held = await places.take(one, 1)
    waiting = [asyncio.create_task(places.take(one, 1)) for _ in range(2)]
    await until(lambda: places.waiting() == {one.id: 2})
    for _ in range(20):
        with pytest.raises(TooManyRequests):
            await places.take(one, 1)
    waiting.pop().cancel()  # the last one, which has never been first
    await until(lambda: places.waiting() == {one.id: 1})
    assert ledger.left == 0
    waiting.pop().cancel()
    await until(lambda: places.waiting() == {})
    assert ledger.left == 1, "the first one has asked"
    held.give_back()
    (await places.take(one, 1)).give_back()


class Counted(MemoryLedger):
    """How often it was told that somebody has left a line."""

    left = 0

    def leave(self, scope: Scope, waits: Waits) -> None:
        self.left += 1
        super().leave(scope, waits)


async def test_a_gateway_that_stops_tells_what_waits() -> None:
    places, one = places_of(), some(max_running=1)
    await places.take(one, 1)
    waiting = [asyncio.create_task(places.take(one, 1)) for _ in range(3)]
    await until(lambda: places.waiting() == {one.id: 3})
    places.drain()
    told = await asyncio.gather(*waiting, return_exceptions=True)
    assert [getattr(each, "code", each) for each in told] == ["shutting_down"] * 3


@pytest.mark.parametrize("seed", range(3))
async def test_whoever_leaves_whenever_no_place_is_lost_and_none_made(seed: int) -> None:
    """By two gateways that share a Redis."""
    rng, one = random.Random(seed), some(max_running=3)
    async with shared() as first, shared() as second:
        gateways = [places_of(first), places_of(second)]
        running = most = 0

        async def ask(gateway: Places, sequences: int, lasts: float) -> None:
            nonlocal running, most
            place = await gateway.take(one, sequences)
            running += min(sequences, 3)
            most = max(most, running)
            try:
                await asyncio.sleep(lasts)
            finally:
                running -= min(sequences, 3)
                place.give_back()

        asking = [
            asyncio.create_task(ask(rng.choice(gateways), rng.choice((1, 1, 1, 2, 5)), rng.random() / 100))
            for _ in range(40)
        ]
        for task in rng.sample(asking, 15):
            await asyncio.sleep(rng.random() / 50)
            task.cancel()
        ends = await asyncio.gather(*asking, return_exceptions=True)
        assert all(end is None or isinstance(end, asyncio.CancelledError) for end in ends), ends
        assert most == 3
        assert running == 0
        (await gateways[0].take(one, 5)).give_back()  # all are free again, and each gateway knows
        (await gateways[1].take(one, 5)).give_back()


async def test_a_gateway_that_died_gives_back_what_it_held() -> None:
    one = some(max_running=1)
    async with shared(lease=1.0) as died, shared(lease=1.0) as lives:
        await places_of(died).take(one, 1)
        waiting = asyncio.create_task(places_of(lives).take(one, 1))
        assert died._task is not None
        died._task.cancel()
        died._entries.clear()
        async with asyncio.timeout(60):
            (await waiting).give_back()


# --- in a fleet --------------------------------------------------------------------------------------------


@asynccontextmanager
async def two_gateways(folder: Path) -> AsyncIterator[tuple[Fleet, list[Site]]]:
    changes: dict[str, Any] = {"limits_redis_url": redis(), "gpu_slots": 4, "host_slots": 8}
    async with AsyncExitStack() as stack:
        made = await stack.enter_async_context(fleet(folder, times=Times(step=0.005), **changes))
        chosen = tiny.settings(folder, role="gateway", fleet_key=FLEET_KEY, replica_stall=5.0, **changes)
        other = await stack.enter_async_context(serving(create_app(chosen)))
        directory = other.services.completions.answers.directory
        await made.until(lambda: len(directory.ready()) == 2)
        yield made, [made.gateway, other]


async def test_it_holds_over_replicas_and_gateways(tmp_path: Path) -> None:
    async with two_gateways(tmp_path) as (made, gateways):
        name = f"t{uuid.uuid4().hex[:12]}"
        key = await made.gateway.tenant(
            name, {letter: tiny.adapter(number) for number, letter in enumerate("abcd")}, max_running=2
        )
        seen: list[list[int]] = []

        async def watch() -> None:
            while True:
                seen.append([len(one.engine.running) for one in made.replicas])
                await asyncio.sleep(0.002)  # each runs for 40 ms

        watching = asyncio.create_task(watch())
        try:
            asked = [
                gateways[number % 2].chat(key, "hello", model="abcd"[number % 4], max_tokens=8)
                for number in range(16)
            ]
            answers = await asyncio.gather(*asked)
        finally:
            watching.cancel()
        assert [answer.status_code for answer in answers] == [200] * 16
        assert max(map(sum, seen)) == 2, "two run, and never more"
        for which in range(2):
            assert max(each[which] for each in seen) > 0, "both replicas have answered"
        for gateway in gateways:
            await until(lambda gateway=gateway: not gateway.services.completions.answers._taken)


async def test_what_waits_for_it_is_shown_and_ends_with_its_client(tmp_path: Path) -> None:
    async with fleet(tmp_path, replicas=1, times=Times(step=0.02)) as made:
        key = await made.gateway.tenant("acme", {"a": tiny.adapter(1)}, max_running=1)
        answers = made.gateway.services.completions.answers
        first = asyncio.create_task(
            made.gateway.chat(key, "hello", model="a", max_tokens=80, ignore_eos=True)
        )
        await until(lambda: bool(answers._taken))
        second = asyncio.create_task(made.gateway.chat(key, "hello", model="a", max_tokens=4))
        await until(lambda: answers.places.waiting() == {"acme": 1})
        page = (await made.gateway.http.get("/metrics")).text
        assert 'loraplex_queue_depth{tenant="acme"} 1.0' in page
        shown = await made.gateway.admin.get("/admin/v1/tenants/acme/limits")
        assert shown.json()["queued"] == 1
        second.cancel()
        with suppress(asyncio.CancelledError, ServerError, AdapterError):
            await second
        await until(lambda: answers.places.waiting() == {})
        assert (await first).status_code == 200
        assert (await made.gateway.chat(key, "hello", model="a", max_tokens=4)).status_code == 200
