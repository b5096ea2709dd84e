"""Budgets in a real Redis: as in memory, and shared by processes."""

from __future__ import annotations

import asyncio
import random
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from server.accounts.terms import Budget, Budgets, TenantLimits
from server.errors import TooManyRequests
from server.limits.budget import Amount, Spending
from server.limits.ledger import Entry, Refused, TenantBudget
from server.limits.quotas import Quotas
from server.limits.redis import LEASE_S, RedisLedger
from server.settings import Price
from tests.support import tiny
from tests.support.ledgers import admitted, begun, budgeted, nothing_recorded, opened, two_servers, used
from tests.support.services import redis
from tests.support.world import tenant


async def test_decides_about_budgets_as_is_done_in_memory() -> None:
    outcomes = set().union(*[await _walk_over_budgets(seed) for seed in range(5)])
    assert outcomes == {None, ("day", "tokens"), ("day", "cost"), ("month", "tokens")}


async def _walk_over_budgets(seed: int) -> set[tuple[str, str] | None]:
    """By which budgets requests were refused; None for those that were not."""
    rng, now = random.Random(seed), datetime(2026, 3, 30, 22, tzinfo=UTC)
    limits = Budgets(day=Budget(tokens=200, cost=450e-9), month=Budget(tokens=300))
    expected = Spending()
    shared = RedisLedger(redis(), wall=lambda: now, lease=1e6)
    await shared.check()
    shared._up = True
    budget = TenantBudget(uuid.uuid4().hex, limits, nothing_recorded)
    running: list[Entry] = []
    outcomes: set[tuple[str, str] | None] = set()
    for _ in range(300):
        now += timedelta(minutes=rng.choice([0, 1, 20]))
        if rng.random() < 0.6 or not running:
            tokens = rng.randrange(1, 60)
            asked = Amount(tokens, tokens * rng.randrange(1, 5))
            passed = expected.check(limits, asked, now)
            outcomes.add((passed.period, passed.unit) if passed else None)
            if passed is None:
                running.append(await shared.reserve([], budget, asked))
                expected.reserved += asked
            else:
                with pytest.raises(Refused) as refused:
                    await shared.reserve([], budget, asked)
                assert refused.value.reason == passed
        elif rng.random() < 0.3:
            entry, more = rng.choice(running), Amount(*[rng.randrange(1, 20)] * 2)
            passed = expected.check(limits, more, now, begun=True)
            if passed is None:
                await shared.change(entry, more, 0)
                expected.reserved += more
            else:
                with pytest.raises(Refused) as refused:
                    await shared.change(entry, more, 0)
                assert refused.value.reason == passed
        else:
            entry = running.pop(rng.randrange(len(running)))
            amount = Amount(rng.randrange(entry.reserved.tokens + 1), rng.randrange(entry.reserved.cost + 1))
            expected.add(amount, now)
            expected.reserved -= entry.reserved
            shared.use(entry, amount, entry.reserved)
            shared.close(entry)
            await shared._report(only_closed=True)
        expected.roll_over(now)
        await shared.refresh(budget)
        assert shared.spending(budget) == expected
    await shared.stop()
    return outcomes


async def test_two_processes_spend_exactly_the_budget_between_them() -> None:
    who = budgeted(tokens=1500)
    async with opened() as one, opened() as two:
        each = [Quotas(one), Quotas(two)]
        results = await asyncio.gather(
            *(admitted(each[i % 2], who) for i in range(300)), return_exceptions=True
        )
        tickets = [found for found in results if not isinstance(found, BaseException)]
        assert len(tickets) == 150
        refused = [found for found in results if isinstance(found, BaseException)]
        assert {getattr(found, "code", found) for found in refused} == {"insufficient_quota"}
        for ticket in tickets:
            used(ticket, 4, ended=True)  # of 10
        await asyncio.gather(one._report(), two._report())
        for quotas in each:
            assert (await begun(quotas, who)).max_output(0, 1) == 900
        results = await asyncio.gather(
            *(admitted(each[i % 2], who, 100) for i in range(20)), return_exceptions=True
        )
        assert sum(not isinstance(found, BaseException) for found in results) == 9


async def test_what_a_long_answer_uses_is_known_to_the_other_process_before_its_end() -> None:
    who = budgeted(tokens=100, soft_tokens=50)
    async with opened() as one, opened() as two:
        mine, theirs = Quotas(one), Quotas(two)
        ticket = await admitted(mine, who, 60)
        used(ticket, 55)
        await one._report()
        await begun(theirs, who)
        assert "55 tokens of 50 tokens" in theirs.headers(who)["x-budget-warning"]
        assert (await begun(theirs, who)).max_output(0, 1) == 40
        with pytest.raises(TooManyRequests, match="55 tokens of 100 tokens of the day"):
            await admitted(theirs, who, 41)
        used(ticket, 57, ended=True)
        await one._report()
        last = await admitted(theirs, who, 43)
        last.withdraw()


async def test_money_is_shared_too() -> None:
    who, prices = budgeted(cost=1.0), {"*": Price(input=0.0, output=100_000.0)}  # 0.1 a token
    async with opened() as one, opened() as two:
        mine, theirs = Quotas(one, prices=prices), Quotas(two, prices=prices)
        ticket = await admitted(mine, who, 6)
        with pytest.raises(TooManyRequests, match="of cost"):
            await admitted(theirs, who, 5)
        used(ticket, 2, ended=True)
        await one._report()
        (await admitted(theirs, who, 8)).withdraw()


async def test_what_was_recorded_before_redis_knew_anything_counts_once() -> None:
    who, asked_for = budgeted(tokens=100), []

    async def recorded(tenant: str, start: datetime, end: datetime) -> tuple[int, int]:
        asked_for.append(tenant)
        return 70, 0

    async with opened() as one, opened() as two:
        mine, theirs = Quotas(one, spent=recorded), Quotas(two, spent=recorded)
        ticket = await admitted(mine, who, 20)
        with pytest.raises(TooManyRequests, match="70 tokens of 100"):
            await admitted(theirs, who, 11)
        used(ticket, 20, ended=True)
        await one._report()
        (await admitted(theirs, who, 10)).withdraw()
        assert len(asked_for) == 2  # day and month
        # Redis loses everything: the record has it.
        keys = [key async for key in one._redis.scan_iter(f"loraplex:{who.id}*")]
        await one._redis.delete(*keys)
        with pytest.raises(TooManyRequests, match="70 tokens of 100"):
            await admitted(mine, who, 31)
        assert len(asked_for) == 4


async def test_a_customer_that_is_made_again_begins_with_nothing_spent() -> None:
    who = budgeted(tokens=100)
    again = tenant(who.id, budgets=who.budgets)
    async with opened() as shared:
        quotas = Quotas(shared)
        used(await admitted(quotas, who, 100), 100, ended=True)
        with pytest.raises(TooManyRequests):
            await admitted(quotas, who, 1)
        (await admitted(quotas, again, 100)).withdraw()


async def test_a_request_that_a_budget_refuses_is_none_of_the_minutes_requests() -> None:
    who = tenant(
        f"t{uuid.uuid4().hex[:12]}",
        limits=TenantLimits(requests_per_minute=2),
        budgets=Budgets(day=Budget(tokens=10)),
    )
    async with opened() as shared:
        quotas = Quotas(shared)
        for _ in range(5):
            with pytest.raises(TooManyRequests) as refused:
                await admitted(quotas, who, 11)
            assert refused.value.code == "insufficient_quota"
        (await admitted(quotas, who, 10)).withdraw()
        assert quotas.headers(who)["x-ratelimit-remaining-requests"] == "1"


async def test_a_dead_process_gives_back_what_it_held_of_a_budget() -> None:
    who = budgeted(tokens=100)
    now = 1_000_000.0
    async with opened(clock=lambda: now) as dying, opened(clock=lambda: now) as other:
        await admitted(Quotas(dying), who, 100)
        assert dying._task is not None
        dying._task.cancel()
        await asyncio.wait([dying._task])
        quotas = Quotas(other)
        with pytest.raises(TooManyRequests):
            await admitted(quotas, who, 1)
        now += 1.1 * LEASE_S
        (await admitted(quotas, who, 100)).withdraw()
        dying._entries.clear()


async def test_two_servers_share_a_budget(tmp_path: Path) -> None:
    name = f"t{uuid.uuid4().hex[:12]}"
    async with two_servers(tmp_path) as (one, two):
        key = await one.tenant(name, budgets={"day": {"tokens": 60}})
        codes, told = [], 0
        for i in range(30):
            answer = await (one, two)[i % 2].chat(key, "hi", model=tiny.NAME, max_tokens=2)
            codes.append(answer.status_code)
            if answer.status_code == 200:
                told += answer.json()["usage"]["total_tokens"]
        assert codes == sorted(codes)
        assert set(codes) == {200, 429}
        assert told <= 60
        assert answer.json()["error"]["code"] == "insufficient_quota"
