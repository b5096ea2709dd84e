"""Limits: the arithmetic against a model that remembers all, and exactness under load in virtual time."""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_right
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.accounts.keys import KeyInfo
from server.accounts.terms import KeyLimits, TenantLimits
from server.errors import BadRequest, Forbidden, TooManyRequests, headers_of
from server.inference.completion import Completions
from server.limits.memory import MemoryLedger
from server.limits.quotas import Quotas
from server.limits.rate import GRAIN_S, WINDOW_S, RateMeter, Window, duration
from tests.service.http.test_api import CHAT, CHAT_URL, error
from tests.support import tiny
from tests.support.clock import run
from tests.support.fakes import Times
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site
from tests.support.world import World, read, tenant

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

KEY = KeyInfo("0123456789abcdef", None, datetime.now(UTC))


# --- a window ---------------------------------------------------------------------------------------

EVENTS = st.lists(st.tuples(st.floats(0, 30), st.integers(1, 1000)), max_size=40)


@example([(4.0, 1), (30.0, 1), (30.0, 1)])
@given(EVENTS)
def test_a_window_never_holds_less_than_a_minute_and_little_more(events: list[tuple[float, int]]) -> None:
    window, now, seen = Window(), 0.0, []
    for pause, amount in events:
        now += pause
        exact = sum(much for at, much in seen if at > now - WINDOW_S)
        at_most = sum(much for at, much in seen if at >= now - WINDOW_S - GRAIN_S)
        assert exact <= window.used(now) <= at_most
        window.add(now, amount)
        seen.append((now, amount))
    assert len(window._parts) <= WINDOW_S / GRAIN_S + 1
    rounding = 1e-9  # in floats 64.1 + 60 is more than 64 + 60 + 0.1
    assert window.used(now + window.until_empty(now) + GRAIN_S + rounding) == 0


@given(EVENTS.filter(bool), st.data())
def test_a_wait_is_just_long_enough(events: list[tuple[float, int]], data: Any) -> None:
    window, now = Window(), 0.0
    for pause, amount in events:
        now += pause
        window.add(now, amount)
    used = window.used(now)
    gone = data.draw(st.integers(1, used))
    wait = window.until(now, gone)
    if wait > 0.01:
        assert used - window.used(now + wait - 0.005) < gone
    assert used - window.used(now + wait + 1e-6) >= gone


# --- reservations -----------------------------------------------------------------------------------


@given(st.randoms(use_true_random=False), st.integers(50, 500))
@settings(max_examples=60, deadline=None)
def test_what_is_used_and_reserved_never_passes_the_limit_nor_leaks(rng: random.Random, most: int) -> None:
    """Requests use up to what they reserved, in pieces, and end or are withdrawn at any time."""
    limits, meter, now = (
        KeyLimits(tokens_per_minute=most, requests_per_minute=20, requests_at_once=4),
        RateMeter(),
        0.0,
    )
    running: list[int] = []  # what each has reserved still
    used: list[tuple[float, int]] = []
    started: list[float] = []
    for _ in range(300):
        now += rng.choice([0.0, 0.05, 1.0, 7.0])
        action = rng.random()
        if action < 0.5:
            tokens = rng.randrange(1, most // 2)
            excess = meter.check(limits, tokens, now)
            in_minute = sum(much for at, much in used if at > now - WINDOW_S - GRAIN_S)
            recent = sum(at > now - WINDOW_S - GRAIN_S for at in started)
            if excess is None:
                meter.begin(tokens, now)
                running.append(tokens)
                started.append(now)
            else:
                full = in_minute + sum(running) + tokens > most
                assert full or recent >= 20 or len(running) >= 4, "refused without a reason"
                assert excess.retry_after >= 0
        elif running:
            index = rng.randrange(len(running))
            more = rng.randrange(running[index] + 1)
            last = rng.random() < 0.5
            meter.use(more, running[index] if last else more, now)
            used.append((now, more))
            running[index] -= more
            if last:
                running.pop(index)
                meter.end()
        assert (meter.running, meter.reserved) == (len(running), sum(running))
        assert sum(much for at, much in used if at > now - WINDOW_S) + sum(running) <= most
        assert len(running) <= 4
        assert sum(at > now - WINDOW_S for at in started) <= 20
    for rest in running:
        meter.use(0, rest, now)
        meter.end()
    assert meter.idle(now + WINDOW_S + GRAIN_S)
    assert meter.reserved == 0


def test_a_request_that_can_never_run_is_told_so() -> None:
    excess = RateMeter().check(KeyLimits(tokens_per_minute=10), 11, 0.0)
    assert excess is not None
    assert excess.never
    assert RateMeter().check(KeyLimits(tokens_per_minute=10), 10, 0.0) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (0.12, "120ms"), (1, "1s"), (59.2, "1m0s"), (360, "6m0s"), (61, "1m1s")]
)
def test_durations_read_like_openais(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- under load, in virtual time --------------------------------------------------------------------


def limited(world: World, **limits: Any) -> Any:
    """A tenant with these limits, on a world whose quotas go by the loop's clock."""
    quotas = Quotas(MemoryLedger(clock=lambda: asyncio.get_running_loop().time()))
    world.service = Completions(world.service.answers, world.service.catalog, world.metrics, quotas)
    return tenant("acme", limits=TenantLimits(**limits))


def ledger_of(world: World) -> MemoryLedger:
    assert isinstance(world.service.quotas.ledger, MemoryLedger)
    return world.service.quotas.ledger


def most_in_a_minute(events: list[tuple[float, int]]) -> int:
    """The largest sum of any (t, t + 60]."""
    times = [at for at, _ in events]
    sums = [0, *accumulate(much for _, much in events)]
    return max(sums[bisect_right(times, at + WINDOW_S - 1e-9)] - sums[i] for i, at in enumerate(times))


@pytest.mark.parametrize("limit", [{"requests_per_minute": 120}, {"tokens_per_minute": 6000}])
def test_sixteen_clients_at_three_times_a_limit_get_all_of_it_and_no_more(limit: dict[str, int]) -> None:
    admitted: list[tuple[float, int]] = []
    used: list[tuple[float, int]] = []
    refused: list[TooManyRequests] = []
    pause = 16 * WINDOW_S / 360 if "requests_per_minute" in limit else 0.8

    async def client(world: World, who: Any, seed: int) -> None:
        rng = random.Random(seed)
        while (now := world.dispatcher.now()) < 120:
            try:
                opened = await world.open(who, max_tokens=rng.randrange(5, 30))
            except TooManyRequests as refusal:
                refused.append(refusal)
            else:
                admitted.append((now, 1))
                await read(opened)
                done = world.dispatcher.now()
                used.append((done, opened.lease.prompt_tokens + opened.lease.output_tokens))
            # Three times the limit, whatever of it is refused.
            await asyncio.sleep(rng.uniform(0, 2 * pause))

    async def scenario() -> None:
        times = Times(stage=0.05, activate=0.01, step=0.01, page=0.001)
        async with World(gpu_slots=2, max_running=32, times=times) as world:
            who = limited(world, **limit)
            await asyncio.gather(*(client(world, who, seed) for seed in range(16)))
            world.check_idle()

    run(scenario())
    events = admitted if "requests_per_minute" in limit else sorted(used)
    (most,) = limit.values()
    total = sum(much for at, much in events if at <= 120)
    assert {refusal.code for refusal in refused} == {"rate_limit_exceeded"}
    assert all(int(headers_of(refusal)["Retry-After"]) >= 1 for refusal in refused)
    assert most_in_a_minute(events) <= most
    assert 0.99 * 2 * most <= total <= 2 * most


def test_what_one_tenant_is_refused_another_gets() -> None:
    async def scenario() -> None:
        async with World(max_running=8) as world:
            who = limited(world, requests_per_minute=1)
            await world.ask(who)
            with pytest.raises(TooManyRequests):
                await world.ask(who)
            await world.ask("other")
            await asyncio.sleep(WINDOW_S + GRAIN_S)
            await world.ask(who)

    run(scenario())


def test_a_reservation_is_given_back_when_the_answer_ends_however_it_ends() -> None:
    async def scenario() -> None:
        async with World(max_running=8) as world:
            who = limited(world, tokens_per_minute=400)
            for ending in ("read", "left", "never read", "cancelled", "refused"):
                if ending == "cancelled":
                    asking = asyncio.create_task(world.open(who, max_tokens=300))
                    await asyncio.sleep(0.01)
                    asking.cancel()
                    await asyncio.wait([asking])
                elif ending == "refused":
                    world.engine.fail("stage", "acme/b@acme-b", times=9)
                    with pytest.raises(Exception, match="could not be loaded"):
                        await world.open(who, max_tokens=300, model="b")
                else:
                    opened = await world.open(who, max_tokens=300 if ending != "read" else 3)
                    with pytest.raises(TooManyRequests) as refusal:
                        await world.open(
                            replace(who, limits=TenantLimits(tokens_per_minute=100)), max_tokens=90
                        )
                    assert refusal.value.code == "rate_limit_exceeded"
                    if ending == "read":
                        await read(opened)
                    elif ending == "left":
                        assert opened.stream is not None
                        await anext(aiter(opened.stream))
                    await opened.lease.close("disconnected")
                meter = ledger_of(world).meters["acme"]
                assert (meter.running, meter.reserved) == (0, 0), ending
            world.check_idle()

    run(scenario())


def test_nothing_stays_reserved_wherever_a_request_is_cancelled() -> None:
    async def scenario() -> None:
        async with World(max_running=2) as world:
            who = limited(world, tokens_per_minute=10**6, requests_at_once=1)
            answered = 0
            for turns in range(0, 400, 7):
                asking = asyncio.create_task(world.ask(who, max_tokens=3))
                for _ in range(turns):
                    await asyncio.sleep(0.0005)
                asking.cancel()
                await asyncio.wait([asking])
                answered += not asking.cancelled()
                await asyncio.sleep(0.1)
                ledger = ledger_of(world)
                meter = ledger.meters.get("acme", RateMeter())
                spending = ledger.spending(world.service.quotas.budget(who))
                assert (meter.running, meter.reserved, spending.reserved.tokens) == (0, 0, 0), turns
            assert 5 < answered < 50
            world.check_idle()

    run(scenario())


def test_a_prompt_of_more_tokens_than_was_thought_is_reserved_before_it_runs() -> None:
    async def scenario() -> None:
        async with World(max_running=2) as world:
            who = limited(world, tokens_per_minute=160)
            dense = [{"role": "user", "content": "a " * 150}]
            with pytest.raises(TooManyRequests, match="may use 161"):
                await world.open(who, messages=dense, max_tokens=10)
            assert world.service.quotas.headers(who)["x-ratelimit-remaining-tokens"] == "160"
            opened = await world.open(who, messages=dense, max_tokens=5)
            await read(opened)
            assert opened.lease.prompt_tokens + opened.lease.output_tokens == 156
            with pytest.raises(TooManyRequests):
                await world.open(who, max_tokens=1)
            await asyncio.sleep(WINDOW_S + GRAIN_S)
            await world.ask(who, max_tokens=1)

    run(scenario())


def test_a_key_has_limits_of_its_own_within_its_tenants() -> None:
    async def scenario() -> None:
        async with World(max_running=8) as world:
            who = limited(world, requests_per_minute=3)
            keyed = replace(who, key=replace(KEY, limits=KeyLimits(requests_per_minute=1)))
            await world.ask(keyed)
            with pytest.raises(TooManyRequests, match="for this key: 1 requests per minute"):
                await world.ask(keyed)
            await world.ask(who)
            await world.ask(replace(who, key=replace(KEY, id="fedcba9876543210")))
            with pytest.raises(TooManyRequests, match="for this tenant: 3 requests per minute"):
                await world.ask(who)

    run(scenario())


def test_requests_at_once() -> None:
    async def scenario() -> None:
        async with World(max_running=8) as world:
            who = limited(world, requests_at_once=2)
            first, second = await world.open(who), await world.open(who)
            with pytest.raises(TooManyRequests, match="2 requests at once"):
                await world.open(who)
            await read(first)
            third = await world.open(who)
            await read(second)
            await read(third)

    run(scenario())


def test_who_does_not_say_how_much_gets_what_limits_leave() -> None:
    async def scenario() -> None:
        async with World(max_running=8) as world:
            for limits in ({"max_tokens": 5}, {"tokens_per_minute": 25}):
                who = limited(world, **limits)
                opened = await world.open(who, max_tokens=None, stream=False)
                assert 5 <= opened.lease.output_tokens < 20
                await world.open(who, max_tokens=1, stream=False) if limits.get("max_tokens") else None
            who = limited(world, max_tokens=5)
            with pytest.raises(BadRequest, match="at most 5 tokens") as refusal:
                await world.open(who, max_tokens=6)
            assert (refusal.value.code, refusal.value.param) == ("max_tokens_too_large", "max_tokens")

    run(scenario())


def test_only_what_may_be_named_is_answered() -> None:
    async def scenario() -> None:
        async with World(max_running=8) as world:
            who = limited(world, adapters=["a"])
            keyed = replace(who, key=replace(KEY, limits=KeyLimits(base=False)))
            await world.ask(keyed, model="a")
            for asker, model in ((who, "b"), (keyed, "base-model")):
                with pytest.raises(Forbidden) as refusal:
                    await world.ask(asker, model=model)
                assert refusal.value.code == "model_not_allowed"
            await world.ask(who, model="base-model")

    run(scenario())


def test_meters_that_nobody_uses_go_away() -> None:
    async def scenario() -> None:
        async with World(max_running=8) as world:
            limited(world)
            ledger = ledger_of(world)
            for number in range(20):
                await world.ask(tenant(f"t{number}", limits=TenantLimits(requests_per_minute=5)))
            assert len(ledger.meters) == 20
            ledger.sweep()
            assert len(ledger.meters) == 20
            await asyncio.sleep(2 * WINDOW_S)
            ledger.sweep()
            assert ledger.meters == {}

    run(scenario())


# --- over HTTP --------------------------------------------------------------------------------------


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path) as site:
        yield site


def ratelimit(headers: Any) -> dict[str, str]:
    return {k.removeprefix("x-ratelimit-"): v for k, v in headers.items() if k.startswith("x-ratelimit-")}


async def test_every_answer_of_a_limited_tenant_says_what_is_left(site: Site) -> None:
    limits = {"requests_per_minute": 3, "tokens_per_minute": 1000}
    key = await site.tenant("acme", {"a": tiny.adapter(1)}, limits=limits)
    ledger = site.services.completions.quotas.ledger
    assert isinstance(ledger, MemoryLedger)
    ledger._clock = lambda: 1_000_000.0  # where the minute stands still
    first = await site.http.post(CHAT_URL, json=CHAT, headers=bearer(key))
    assert ratelimit(first.headers) == {
        "limit-requests": "3", "remaining-requests": "2", "reset-requests": "1m0s",
        "limit-tokens": "1000", "remaining-tokens": str(1000 - 7), "reset-tokens": "1m0s",
    }  # fmt: skip
    body = {**CHAT, "stream": True}
    async with site.http.stream("POST", CHAT_URL, json=body, headers=bearer(key)) as stream:
        assert ratelimit(stream.headers)["remaining-requests"] == "1"
        await stream.aread()
    unknown = await site.chat(key, "hi", model="nobody")
    assert unknown.status_code == 404
    assert ratelimit(unknown.headers)["remaining-requests"] == "1"
    await site.chat(key, "hi", max_tokens=1)
    refused = await site.chat(key, "hi", max_tokens=1)
    error(refused, 429, "rate_limit_exceeded")
    assert 59 <= int(refused.headers["retry-after"]) <= 61
    assert ratelimit(refused.headers)["remaining-requests"] == "0"
    free = await site.tenant("free", {"a": tiny.adapter(1)})
    assert ratelimit((await site.chat(free, "hi")).headers) == {}


async def test_limits_are_changed_one_by_one_and_hold_at_once(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)}, limits={"requests_per_minute": 1})
    url = "/admin/v1/tenants/acme"
    assert (await site.chat(key, "hi")).status_code == 200
    error(await site.chat(key, "hi"), 429, "rate_limit_exceeded")
    changed = await site.admin.patch(url, json={"limits": {"max_tokens": 9}})
    assert changed.json()["limits"] == {"requests_per_minute": 1, "max_tokens": 9}
    changed = await site.admin.patch(url, json={"limits": {"requests_per_minute": None}})
    assert changed.json()["limits"] == {"max_tokens": 9}
    error(await site.chat(key, "hi", max_tokens=10), 400, "max_tokens_too_large", "max_tokens")
    assert (await site.chat(key, "hi", max_tokens=9)).status_code == 200
    assert (await site.admin.get(url)).json()["limits"] == {"max_tokens": 9}


async def test_the_list_of_models_has_what_may_be_named(site: Site) -> None:
    adapters = {"a": tiny.adapter(1), "b": tiny.adapter(2)}
    key = await site.tenant("acme", adapters, limits={"adapters": ["b"], "base": False})
    listed = await site.http.get("/v1/models", headers=bearer(key))
    assert [card["id"] for card in listed.json()["data"]] == ["b"]
    error(await site.chat(key, "hi", model="a"), 403, "model_not_allowed", "model")
    rows = (await site.admin.get("/admin/v1/requests", params={"tenant": "acme"})).json()["data"]
    assert [row["outcome"] for row in rows] == ["rejected"], "it is no fault of the server's"


async def test_tokens_are_counted_of_what_may_be_named_alone(site: Site) -> None:
    adapters = {"a": tiny.adapter(1), "b": tiny.adapter(2)}
    key = await site.tenant("acme", adapters, limits={"adapters": ["b"], "base": False})
    turns: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
    calls = {"/tokenize": {"prompt": "hi"}, "/detokenize": {"tokens": [0]}}
    for url, body in (calls | {"/v1/messages/count_tokens": turns}).items():
        for model in ("a", "a@1", tiny.NAME):
            refused = await site.http.post(url, json={**body, "model": model}, headers=bearer(key))
            assert (refused.status_code, "may use" in refused.text) == (403, True), refused.text
        allowed = await site.http.post(url, json={**body, "model": "b"}, headers=bearer(key))
        assert allowed.status_code == 200, allowed.text


@pytest.mark.parametrize(
    ("limits", "param"),
    [
        ({"requests_per_minute": 0}, "limits.requests_per_minute"),
        ({"tokens_per_minute": "9"}, "limits.tokens_per_minute"),
        ({"adapters": ["x" * 200]}, "limits.adapters.0"),
        ({"speed": 3}, "limits.speed"),
        (5, "limits"),
    ],
)
async def test_limits_that_cannot_be(site: Site, limits: Any, param: str) -> None:
    refused = await site.admin.post("/admin/v1/tenants", json={"id": "acme", "limits": limits})
    error(refused, 422, "invalid_request", param)
