"""Budgets: counted as produced, never passed, right after a restart and at the turn of a day."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.accounts.terms import COST_UNIT, Budget, Budgets
from server.accounts.usage import Usage
from server.errors import TooManyRequests, headers_of
from server.inference.completion import Completions
from server.limits.budget import Amount, Spending, period_end, period_start
from server.limits.memory import MemoryLedger
from server.limits.quotas import Quotas
from server.settings import Price
from tests.service.http.test_api import CHAT, CHAT_URL, error
from tests.support import tiny
from tests.support.clock import run
from tests.support.fakes import FakeEngine, Times
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site
from tests.support.world import World, read, tenant

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

START = datetime(2026, 5, 31, 23, 50, tzinfo=UTC)


# --- arithmetic -------------------------------------------------------------------------------------


def test_periods_are_those_of_utc() -> None:
    assert period_start("day", START) == datetime(2026, 5, 31, tzinfo=UTC)
    assert period_start("month", START) == datetime(2026, 5, 1, tzinfo=UTC)
    assert period_end("day", START) == period_end("month", START) == datetime(2026, 6, 1, tzinfo=UTC)
    assert period_end("month", datetime(2026, 12, 31, tzinfo=UTC)) == datetime(2027, 1, 1, tzinfo=UTC)
    assert period_end("month", datetime(2028, 2, 1, tzinfo=UTC)) == datetime(2028, 3, 1, tzinfo=UTC)


@pytest.mark.parametrize("jump", [timedelta(days=1), timedelta(days=-1), timedelta(days=40)])
def test_a_clock_that_jumps_there_and_back_gives_nobody_a_budget_twice(jump: timedelta) -> None:
    budgets = Budgets(day=Budget(tokens=100), month=Budget(tokens=150))
    spending = Spending()
    spending.add(Amount(100, 0), START)
    for _ in range(3):
        assert spending.check(budgets, Amount(1, 0), START) is not None
        spending.roll_over(START + jump)
        assert not spending.outdated(START + timedelta(days=1))
        spending.roll_over(START)
    assert spending.used == {"day": Amount(100, 0), "month": Amount(100, 0)}
    spending.add(Amount(7, 0), START + jump)
    spending.roll_over(START)
    spending.roll_over(START + jump)
    assert spending.used["day"] == Amount(7, 0)
    assert spending.outdated(START + timedelta(days=40 + 5 + abs(jump.days)))
    for days in range(100):
        spending.roll_over(START + timedelta(days=days))
    assert len(spending.others) < 10


@given(st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_a_hard_budget_is_never_passed_and_all_of_it_can_be_used(rng: random.Random) -> None:
    budgets = Budgets(day=Budget(tokens=1000), month=Budget(cost=3.0))
    spending, now = Spending(), START
    used: dict[str, int] = {"day": 0, "month": 0}
    running: list[tuple[int, int]] = []
    day = now.date()
    for _ in range(200):
        now += timedelta(minutes=rng.randrange(30))
        if now.date() != day:
            day, used["day"] = now.date(), 0
            used["month"] = used["month"] if now.day != 1 else 0
        tokens = rng.randrange(1, 200)
        cost = tokens * COST_UNIT // 1000
        held = [sum(amounts) for amounts in zip(*running, strict=True)] or [0, 0]
        passed = spending.check(budgets, Amount(tokens, cost), now)
        over = used["day"] + held[0] + tokens > 1000 or used["month"] + held[1] + cost > 3 * COST_UNIT
        assert (passed is not None) == over
        if passed is None:
            spending.reserved += Amount(tokens, cost)
            running.append((tokens, cost))
        while running and rng.random() < 0.5:
            tokens, cost = running.pop()
            part = rng.randrange(tokens + 1)
            spending.reserved -= Amount(tokens, cost)
            spending.add(Amount(part, part * COST_UNIT // 1000), now)
            used["day"] += part
            used["month"] += part * COST_UNIT // 1000
        assert used["day"] <= 1000
        assert used["month"] <= 3 * COST_UNIT
        assert spending.used["day"].tokens == used["day"]
        assert spending.used["month"].cost == used["month"]


# --- with requests, in virtual time -----------------------------------------------------------------


class Ledger:
    """Records that outlive a process, and its clock."""

    def __init__(self) -> None:
        self.records: list[Usage] = []
        self.began = START
        self.reads = 0

    def now(self) -> datetime:
        return self.began + timedelta(seconds=asyncio.get_running_loop().time())

    async def spent(self, who: str, start: datetime, end: datetime) -> tuple[int, int]:
        self.reads += 1
        await asyncio.sleep(0.01)
        found = [r for r in self.records if r.tenant == who and start <= r.at < end]
        return sum(r.prompt_tokens + r.output_tokens for r in found), sum(r.cost for r in found)

    def serve(self, world: World) -> None:
        quotas = Quotas(
            MemoryLedger(clock=lambda: asyncio.get_running_loop().time(), wall=self.now),
            record=self.records.append,
            spent=self.spent,
            prices={"*": Price(input=1000, output=2000)},
            metrics=world.metrics,
            wall=self.now,
        )
        world.service = Completions(world.service.answers, world.service.catalog, world.metrics, quotas)


def acme(**budgets: dict[str, Any]) -> Any:
    terms = Budgets(**{period: Budget(**budget) for period, budget in budgets.items()})
    return replace(tenant("acme", budgets=terms), created_at=datetime(2020, 1, 1, tzinfo=UTC))


async def use_up(world: World, who: Any, **fields: Any) -> tuple[int, TooManyRequests]:
    """(answers until a refusal, the refusal)."""
    for count in range(1000):
        try:
            await world.ask(who, **fields)
        except TooManyRequests as refusal:
            return count, refusal
    raise AssertionError("nothing was refused")


def test_a_hard_budget_holds_over_restarts_and_ends_with_its_day() -> None:
    ledger = Ledger()

    async def first() -> None:
        async with World() as world:
            ledger.serve(world)
            who = acme(day={"tokens": 60})
            await world.ask(who, max_tokens=20)
            assert ledger.reads == 2
            await world.ask(who, max_tokens=10)

    async def second() -> None:
        async with World() as world:
            ledger.serve(world)
            who = acme(day={"tokens": 60})
            # Of 60 tokens, 30 and two prompts are used, which only the records know.
            left = 60 - sum(r.prompt_tokens + r.output_tokens for r in ledger.records)
            with pytest.raises(TooManyRequests) as refusal:
                await asyncio.gather(*(world.ask(who, max_tokens=left) for _ in range(3)))
            assert refusal.value.code == "insufficient_quota"
            assert "tokens of the day used" in refusal.value.message
            until_midnight = (datetime(2026, 6, 1, tzinfo=UTC) - ledger.now()).total_seconds()
            assert abs(int(headers_of(refusal.value)["Retry-After"]) - until_midnight) <= 1
            await use_up(world, who, max_tokens=1)
            await world.ask("other", max_tokens=20)
            await asyncio.sleep(until_midnight)
            await world.ask(who, max_tokens=20)

    run(first())
    ledger.began += timedelta(minutes=5)
    run(second())
    days: Counter[Any] = Counter()
    for record in ledger.records:
        if record.tenant == "acme":
            days[record.at.date()] += record.prompt_tokens + record.output_tokens
    assert max(days.values()) <= 60
    assert len(days) == 2


def test_streams_that_clients_left_are_paid_for_and_what_is_not_produced_is_not() -> None:
    ledger = Ledger()

    async def scenario() -> None:
        async with World() as world:
            ledger.serve(world)
            who = acme(month={"cost": 0.5})
            opened = await world.open(who, max_tokens=200)
            with pytest.raises(TooManyRequests):
                await world.ask(who, max_tokens=200)
            assert opened.stream is not None
            chunks = aiter(opened.stream)
            for _ in range(50):
                await anext(chunks)
            await opened.stream.aclose()
            (record,) = ledger.records
            assert record.outcome == "disconnected"
            assert 40 < record.output_tokens < 60
            assert record.cost == (record.prompt_tokens * 1000 + record.output_tokens * 2000) * 1000
            quotas = world.service.quotas
            spending = quotas.ledger.spending(quotas.budget(who))
            assert spending.used["month"].cost == record.cost
            assert (spending.reserved.tokens, spending.reserved.cost) == (0, 0)
            await world.ask(who, max_tokens=150)
            count, refusal = await use_up(world, who, max_tokens=10)
            assert count > 0
            assert refusal.code == "insufficient_quota"
            assert sum(record.cost for record in ledger.records) <= 0.5 * COST_UNIT

    run(scenario())


def test_a_soft_budget_warns_and_refuses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger()

    async def scenario() -> None:
        async with World() as world:
            ledger.serve(world)
            who = acme(day={"soft_tokens": 20, "tokens": 10_000})
            quotas = world.service.quotas
            await world.ask(who, max_tokens=10)
            assert "x-budget-warning" not in quotas.headers(who)
            await world.ask(who, max_tokens=20)
            assert quotas.headers(who)["x-budget-warning"].endswith(" tokens of 20 tokens of the day")
            assert caplog.records == []
            for _ in range(3):
                await world.ask(who, max_tokens=1)
            (logged,) = caplog.records
            assert logged.getMessage().startswith("tenant acme has used ")
            text = world.metrics.render().decode()
            assert 'loraplex_budget_requests_total{kind="soft",tenant="acme"} 3.0' in text

    run(scenario())


def test_a_budget_that_is_set_later_counts_from_the_beginning_of_its_period() -> None:
    ledger = Ledger()

    async def scenario() -> None:
        async with World() as world:
            ledger.serve(world)
            without = acme()
            await world.ask(without, max_tokens=30)
            with pytest.raises(TooManyRequests):
                await world.ask(acme(day={"tokens": 40}), max_tokens=20)

    run(scenario())


def test_who_does_not_say_how_much_gets_the_rest_of_the_budget() -> None:
    ledger = Ledger()

    async def scenario() -> None:
        async with World() as world:
            ledger.serve(world)
            who = acme(day={"tokens": 20})
            text = await world.ask(who, max_tokens=None)
            assert '" 4"' in text
            assert ledger.records[0].output_tokens < 8
            await read(await world.open("other", max_tokens=None))
            assert ledger.records[1].output_tokens == 8

    run(scenario())


# --- over HTTP --------------------------------------------------------------------------------------


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path, FakeEngine(tiny.base(), times=Times(step=0.002))) as site:
        yield site


async def test_a_spent_budget_is_another_error_than_a_limit(site: Site) -> None:
    budgets = {"month": {"tokens": 40, "soft_tokens": 5}}
    key = await site.tenant("acme", {"a": tiny.adapter(1)}, budgets=budgets)
    assert (await site.admin.get("/admin/v1/tenants/acme")).json()["budgets"] == budgets
    first = await site.http.post(CHAT_URL, json=CHAT, headers=bearer(key))
    assert first.status_code == 200
    assert first.headers["x-budget-warning"] == "7 tokens of 5 tokens of the month"
    error(await site.chat(key, "hi", max_tokens=39), 429, "insufficient_quota")
    raised = await site.admin.patch("/admin/v1/tenants/acme", json={"budgets": {"month": {"tokens": 500}}})
    assert raised.json()["budgets"] == {"month": {"tokens": 500}}
    assert (await site.chat(key, "hi", max_tokens=39)).status_code == 200
    cleared = await site.admin.patch("/admin/v1/tenants/acme", json={"budgets": {"month": None}})
    assert cleared.json()["budgets"] == {}
    refused = await site.admin.patch("/admin/v1/tenants/acme", json={"budgets": {"year": {}}})
    error(refused, 422, "invalid_request", "budgets.year")
