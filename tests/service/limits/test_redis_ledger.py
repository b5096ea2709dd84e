"""Limits in a real Redis: as in memory, and shared by processes."""

from __future__ import annotations

import asyncio
import random
import sys
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import RedisError

from server.accounts.terms import Budget, Budgets, KeyLimits, TenantLimits
from server.errors import TooManyRequests, Unavailable, headers_of
from server.limits.budget import Amount
from server.limits.ledger import PLACES, Entry, Refused, Scope
from server.limits.line import Waits
from server.limits.quotas import Quotas
from server.limits.rate import LimitExceeded, RateMeter
from server.limits.redis import LEASE_S, RedisLedger
from tests.support import tiny
from tests.support.ledgers import (
    NO_BUDGET,
    Gate,
    admitted,
    begun,
    budgeted,
    limited,
    opened,
    two_servers,
    used,
)
from tests.support.services import RedisServer, redis
from tests.support.world import tenant


@pytest.mark.parametrize("seed", range(5))
async def test_decides_as_the_meter_in_memory_does(seed: int) -> None:
    rng, now = random.Random(seed), 1000.0
    limits = KeyLimits(tokens_per_minute=300, requests_per_minute=20, requests_at_once=3)
    scope, meter = Scope(uuid.uuid4().hex, "tenant", limits), RateMeter()
    # Virtual time runs far ahead of the leases' renewal, which has its own test.
    shared = RedisLedger(redis(), clock=lambda: now, lease=1e6)
    await shared.check()
    shared._up = True
    running: list[Entry] = []
    outcomes = set()
    for _ in range(300):
        now += rng.choice([0.0, 0.05, 1.0, 2.0])
        if rng.random() < 0.6:
            tokens = rng.randrange(1, rng.choice([6, 6, 60, 320]))
            expected = meter.check(limits, tokens, now)
            outcomes.add(expected.limit if expected else "admitted")
            try:
                running.append(await shared.reserve([scope], NO_BUDGET, Amount(tokens)))
            except Refused as exc:
                assert expected is not None
                found = exc.reason
                assert isinstance(found, LimitExceeded)
                assert (found.limit, found.allowed, found.asked, found.never) == (
                    expected.limit,
                    expected.allowed,
                    expected.asked,
                    expected.never,
                )
                assert found.retry_after == pytest.approx(expected.retry_after, abs=1e-3)
            else:
                assert expected is None
                meter.begin(tokens, now)
        elif running:
            entry = running.pop(rng.randrange(len(running)))
            used, reserved = rng.randrange(entry.reserved.tokens + 1), entry.reserved
            meter.use(used, reserved.tokens, now)
            meter.end()
            shared.use(entry, Amount(used), reserved)
            shared.close(entry)
            await shared._report(only_closed=True)
        else:
            continue
        left = meter.remaining(limits, now)
        assert shared.remaining(scope).keys() == left.keys()
        for what, found_left in shared.remaining(scope).items():
            assert (found_left.limit, found_left.remaining) == (left[what].limit, left[what].remaining)
            assert found_left.reset == pytest.approx(left[what].reset, abs=1e-3)
    assert outcomes == {"admitted", "requests_at_once", "requests_per_minute", "tokens_per_minute"}
    await shared.stop()


@pytest.mark.parametrize("jump", [86_400.0, -86_400.0])
async def test_a_clock_that_jumps_a_day_refuses_nobody_for_a_day(jump: float) -> None:
    now = 1_000_000.0
    shared = RedisLedger(redis(), clock=lambda: now, lease=10.0)
    await shared.check()
    shared._up = True
    limits = KeyLimits(tokens_per_minute=100, requests_per_minute=5, requests_at_once=2)
    scope = Scope(uuid.uuid4().hex, "tenant", limits)
    for _ in range(2):
        entry = await shared.reserve([scope], NO_BUDGET, Amount(50))
        shared.use(entry, Amount(50), Amount(50))
        shared.close(entry)
        await shared._report(only_closed=True)
    with pytest.raises(Refused):
        await shared.reserve([scope], NO_BUDGET, Amount(50))
    # One that nobody renews or closes any more: its process has died.
    lost = Scope(uuid.uuid4().hex, "tenant", KeyLimits(requests_at_once=1))
    shared._entries.pop((await shared.reserve([lost], NO_BUDGET, Amount(1))).id)
    now += jump
    await shared.reserve([scope], NO_BUDGET, Amount(100))
    await shared.reserve([lost], NO_BUDGET, Amount(1))
    with pytest.raises(Refused):
        await shared.reserve([scope], NO_BUDGET, Amount(1))
    await shared.stop()


async def test_a_clock_that_is_set_back_a_little_forgets_nothing() -> None:
    now = 1_000_000.0
    shared = RedisLedger(redis(), clock=lambda: now, lease=10.0)
    await shared.check()
    shared._up = True
    scope = Scope(uuid.uuid4().hex, "tenant", KeyLimits(requests_per_minute=1))
    await shared.reserve([scope], NO_BUDGET, Amount(1))
    now -= 2.0
    with pytest.raises(Refused):
        await shared.reserve([scope], NO_BUDGET, Amount(1))
    await shared.stop()


async def test_two_processes_admit_exactly_the_limit_between_them() -> None:
    who = limited(requests_per_minute=200, tokens_per_minute=1500)
    async with opened() as one, opened() as two:
        each = [Quotas(one), Quotas(two)]
        results = await asyncio.gather(
            *(admitted(each[i % 2], who) for i in range(300)), return_exceptions=True
        )
        tickets = [found for found in results if not isinstance(found, BaseException)]
        assert len(tickets) == 150  # 1500 tokens of 10 each
        assert all(isinstance(r, TooManyRequests) for r in results if isinstance(r, BaseException))
        assert each[0].headers(who)["x-ratelimit-remaining-tokens"] == "0"
        for ticket in tickets:
            ticket.withdraw()
        results = await asyncio.gather(
            *(admitted(each[i % 2], who, 1) for i in range(100)), return_exceptions=True
        )
        assert sum(not isinstance(found, BaseException) for found in results) == 50
        assert each[1].headers(who)["x-ratelimit-remaining-requests"] == "0"


async def test_more_is_reserved_for_one_that_runs_or_nothing_changes() -> None:
    who = limited(tokens_per_minute=100)
    async with opened() as one, opened() as two:
        mine, theirs = Quotas(one), Quotas(two)
        ticket, other = await admitted(mine, who, 40), await admitted(theirs, who, 40)
        ticket.asks(50, 10, 1)
        assert await ticket.settle() is None  # 60 and 40
        other.asks(35, 6, 1)
        with pytest.raises(TooManyRequests, match="tokens per minute") as refused:
            await other.settle()
        assert refused.value.code == "rate_limit_exceeded"
        other.withdraw()
        await two._report(only_closed=True)
        rest = await admitted(mine, who, 40)
        rest.asks(90, 20, 1)
        with pytest.raises(TooManyRequests, match="may use 110"):
            await rest.settle()
        rest.withdraw()
        ticket.withdraw()
        last = await admitted(mine, who, 100)
        last.withdraw()


async def test_what_is_used_already_counts_where_more_is_reserved() -> None:
    scope = Scope(uuid.uuid4().hex, "tenant", KeyLimits(tokens_per_minute=100))
    async with opened() as shared:
        entry = await shared.reserve([scope], NO_BUDGET, Amount(50))
        shared.use(entry, Amount(30), Amount(30))
        await shared.change(entry, Amount(50), 100)
        assert (entry.used, entry.reserved) == (Amount(), Amount(70))
        assert shared.remaining(scope)["tokens"].remaining == 0
        with pytest.raises(Refused):
            await shared.change(entry, Amount(1), 101)
        shared._up = False
        with pytest.raises(Unavailable):
            await shared.change(entry, Amount(1), 101)
        shared._up = True
        shared.use(entry, Amount(), entry.reserved)
        shared.close(entry)


async def test_a_place_is_free_for_whoever_asks_right_after_the_end() -> None:
    who = limited(requests_at_once=1)
    async with opened() as shared:
        quotas = Quotas(shared)
        for _ in range(50):
            (await admitted(quotas, who)).withdraw()


async def test_a_living_process_keeps_its_places_and_a_dead_one_does_not() -> None:
    who = limited(requests_at_once=1, tokens_per_minute=100)
    now, reports = 1_000_000.0, 0
    async with opened(clock=lambda: now) as living, opened(clock=lambda: now) as other:
        quotas, report = Quotas(other), living._report

        async def counted(**options: bool) -> None:
            nonlocal reports
            await report(**options)
            reports += 1

        living._report = counted  # type: ignore[method-assign]
        ticket = await admitted(Quotas(living), who, 100)
        for _ in range(3):
            now, before = now + 0.9 * LEASE_S, reports
            async with asyncio.timeout(60):
                while reports < before + 2:  # the first one may have begun before
                    await asyncio.sleep(0.05)
            with pytest.raises(TooManyRequests):
                await admitted(quotas, who, 1)
        assert living._task is not None
        living._task.cancel()  # as if killed: nothing renews any more
        await asyncio.wait([living._task])
        now += 1.1 * LEASE_S
        (await admitted(quotas, who, 100)).withdraw()
        ticket.withdraw()


async def test_an_outage_refuses_only_those_with_limits_and_ends_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate()
    who, free = limited(requests_at_once=2), tenant("free")
    async with opened(await gate.start()) as shared:
        quotas = Quotas(shared)
        ticket = await admitted(quotas, who)
        gate.open = False
        monkeypatch.setattr("server.limits.redis.TIMEOUT_S", 1.0)
        async with asyncio.timeout(60):
            with pytest.raises(Unavailable) as refused:
                await admitted(quotas, who)
        assert refused.value.code == "limits_unavailable"
        assert int(headers_of(refused.value)["Retry-After"]) >= 1
        (await admitted(quotas, free)).withdraw()
        ticket.withdraw()
        with pytest.raises((TimeoutError, OSError, RedisError)):
            await shared.check()
        monkeypatch.setattr("server.limits.redis.TIMEOUT_S", 60.0)
        gate.open = True
        async with asyncio.timeout(60):
            while not shared._up:
                await asyncio.sleep(0.1)
        tickets = [await admitted(quotas, who) for _ in range(2)]
        for one in tickets:
            one.withdraw()
    gate.close()


async def test_who_leaves_a_line_in_an_outage_leaves_nothing_to_be_reported_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each refused request does; what Redis holds of a line ends by itself."""
    gate = Gate()
    scope = Scope(f"{uuid.uuid4().hex} {PLACES}", PLACES, KeyLimits(tokens_per_minute=1))
    async with opened(await gate.start()) as shared:
        gate.open = False
        monkeypatch.setattr("server.limits.redis.TIMEOUT_S", 1.0)
        waits = [Waits(f"{number:024}", 0.0, 2.0) for number in range(20)]
        async with asyncio.timeout(60):
            with pytest.raises(Unavailable):  # which Redis may have heard of, so it is told of the end
                await shared.reserve([scope], NO_BUDGET, Amount(1), waits[0])
        for each in waits:
            with pytest.raises(Unavailable):
                await shared.reserve([scope], NO_BUDGET, Amount(1), each)
            shared.leave(scope, each)
        assert shared._entries.keys() == {waits[0].id}
        monkeypatch.setattr("server.limits.redis.TIMEOUT_S", 60.0)
        gate.open = True
        async with asyncio.timeout(60):
            while not shared._up:
                await asyncio.sleep(0.1)
    gate.close()


async def test_redis_that_was_killed_comes_back_empty_and_is_told_what_is_held_and_spent() -> None:
    server = RedisServer()
    who = tenant(
        f"t{uuid.uuid4().hex[:12]}",
        limits=TenantLimits(requests_at_once=2),
        budgets=Budgets(day=Budget(tokens=100)),
    )

    async def recorded(tenant: str, start: datetime, end: datetime) -> tuple[int, int]:
        return spent, 0

    spent = 0
    async with opened(server.url) as shared:
        quotas = Quotas(shared, spent=recorded)
        used(await admitted(quotas, who, 40), 40, ended=True)
        spent = 40  # which its usage has recorded
        running = await admitted(quotas, who, 30)
        server.kill()
        with pytest.raises(Unavailable):
            await admitted(quotas, who, 1)
        server.start()
        async with asyncio.timeout(60):
            while not shared._up:
                await asyncio.sleep(0.1)
        with pytest.raises(TooManyRequests, match="40 tokens of 100"):
            await admitted(quotas, who, 31)
        second = await admitted(quotas, who, 30)
        with pytest.raises(TooManyRequests, match="2 requests at once"):
            await admitted(quotas, who, 1)
        used(running, 10, ended=True)
        second.withdraw()
        await shared._report()
        (await admitted(quotas, who, 50)).withdraw()
    server.kill()


async def test_what_is_on_record_is_read_once_for_all_who_ask_after_a_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hundreds of reads at once would make the customers wait for the database, and it for them."""
    read: list[datetime] = []
    asked = 0
    go_on = asyncio.Event()

    async def recorded(tenant: str, start: datetime, end: datetime) -> tuple[int, int]:
        read.append(start)
        await go_on.wait()
        return 40, 0

    who = budgeted(tokens=100)
    async with opened() as shared:
        ask = shared._recorded

        async def counted(*args: Any) -> Amount:
            nonlocal asked
            asked += 1
            return await ask(*args)

        monkeypatch.setattr(shared, "_recorded", counted)
        quotas = Quotas(shared, spent=recorded)
        asking = [asyncio.create_task(begun(quotas, who)) for _ in range(20)]
        async with asyncio.timeout(60):
            while asked < 40:
                await asyncio.sleep(0.01)
        left = asking.pop(0)  # who began to read, and goes away
        left.cancel()
        go_on.set()
        await asyncio.gather(*asking)
        assert len(read) == 2, "one of the day, one of the month"
        with pytest.raises(TooManyRequests, match="40 tokens of 100"):
            await admitted(quotas, who, 61)


async def test_what_a_killed_process_held_is_free_soon() -> None:
    name = f"t{uuid.uuid4().hex[:12]}"
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _HOLDER, redis(), name, stdout=asyncio.subprocess.PIPE
    )
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"held\n"
    scope = Scope(name, "tenant", KeyLimits(requests_at_once=1))
    async with opened() as shared:
        with pytest.raises(Refused):
            await shared.reserve([scope], NO_BUDGET, Amount(1))
        holder.kill()
        await holder.wait()
        async with asyncio.timeout(120):
            while True:
                try:
                    entry = await shared.reserve([scope], NO_BUDGET, Amount(1))
                    break
                except Refused:
                    await asyncio.sleep(0.2)
        shared.close(entry)


_HOLDER = """
import asyncio, sys
from server.accounts.terms import KeyLimits
from server.limits.budget import Amount
from server.limits.ledger import Scope, TenantBudget
from server.limits.redis import RedisLedger

async def hold():
    shared = RedisLedger(sys.argv[1], lease=12.0)
    await shared.open()
    scope = Scope(sys.argv[2], "tenant", KeyLimits(requests_at_once=1))
    await shared.reserve([scope], TenantBudget("none", None, None), Amount(1))
    print("held", flush=True)
    await asyncio.sleep(600)

asyncio.run(hold())
"""


async def test_does_not_start_without_redis_nor_shows_the_password() -> None:
    shared = RedisLedger("redis://:secret@127.0.0.1:1/0")
    with pytest.raises(OSError, match="LIMITS_REDIS_URL") as refused:
        await shared.open()
    assert "secret" not in str(refused.value)
    with pytest.raises(ValueError, match="rediss://") as wrong:
        RedisLedger("http://:secret@host")
    assert "secret" not in str(wrong.value)


async def test_two_servers_share_what_a_tenant_may(tmp_path: Path) -> None:
    name = f"t{uuid.uuid4().hex[:12]}"
    async with two_servers(tmp_path) as (one, two):
        key = await one.tenant(name, limits={"requests_per_minute": 4})
        answers = [await (one, two)[i % 2].chat(key, "hi", model=tiny.NAME, max_tokens=2) for i in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 4 + [429] * 2
        left = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
        assert left == ["3", "2", "1", "0", "0", "0"]
        ready = (await two.http.get("/ready")).json()
        assert ready["checks"]["limits"] == "ok"
