"""What a tenant may use in a day or a month, in tokens and in money: the arithmetic, without clock or rows.

    soft   from there on every answer carries a warning
    hard   never passed: what requests under way may still use counts as used until they end

Days and months are those of UTC.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from server.accounts.terms import COST_UNIT, PERIODS, Budgets, Period, Unit


def began(period: Period, now: datetime) -> datetime:
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight if period == "day" else midnight.replace(day=1)


def ends(period: Period, now: datetime) -> datetime:
    start = began(period, now)
    return start + timedelta(days=1) if period == "day" else (start + timedelta(days=32)).replace(day=1)


@dataclass(slots=True)
class Amount:
    tokens: int = 0
    cost: int = 0

    def add(self, tokens: int, cost: int) -> None:
        self.tokens += tokens
        self.cost += cost


@dataclass(frozen=True, slots=True)
class Passed:
    """A budget, in tokens or ``COST_UNIT``ths, that has been used up or would be passed."""

    period: Period
    unit: Unit
    limit: int
    used: int

    def shown(self, amount: int) -> str:
        return f"{amount} tokens" if self.unit == "tokens" else f"{amount / COST_UNIT:.6g} of cost"


@dataclass(slots=True)
class Spending:
    """What one tenant has used in this day and this month, and what its requests may still use."""

    since: dict[Period, datetime] = field(default_factory=dict)
    used: dict[Period, Amount] = field(default_factory=dict)
    reserved: Amount = field(default_factory=Amount)
    warned: set[tuple[Period, Unit]] = field(default_factory=set)

    def turn(self, now: datetime) -> None:
        """Begins the day and the month that ``now`` is in, if they are new."""
        for period in PERIODS:
            start = began(period, now)
            if self.since.get(period) != start:
                self.since[period], self.used[period] = start, Amount()
                self.warned = {entry for entry in self.warned if entry[0] != period}

    def learn(self, now: datetime, used: Mapping[Period, Amount], reserved: Amount) -> None:
        """From whoever counts it for all processes."""
        self.turn(now)
        self.used.update(used)
        self.reserved = reserved

    def add(self, tokens: int, cost: int, now: datetime) -> None:
        self.turn(now)
        for period in PERIODS:
            self.used[period].add(tokens, cost)

    def excess(
        self, budgets: Budgets, tokens: int, cost: int, now: datetime, *, begun: bool = False
    ) -> Passed | None:
        """The hard budget that a request of at most so much, or one that has ``begun`` and needs so much
        more, could pass."""
        self.turn(now)
        for period, unit, limit, used in self._all(budgets, soft=False):
            asked = tokens if unit == "tokens" else cost
            taken = used + getattr(self.reserved, unit)
            if (asked > 0 or not begun) and (taken + asked > limit or taken >= limit):
                return Passed(period, unit, limit, used)
        return None

    def rest(self, budgets: Budgets, now: datetime) -> int | None:
        """Tokens that no hard budget forbids; None without one."""
        self.turn(now)
        tokens = [
            limit - used - self.reserved.tokens
            for _, unit, limit, used in self._all(budgets, soft=False)
            if unit == "tokens"
        ]
        return min(tokens, default=None)

    def warnings(self, budgets: Budgets, now: datetime) -> list[Passed]:
        self.turn(now)
        return [
            Passed(period, unit, limit, used)
            for period, unit, limit, used in self._all(budgets, soft=True)
            if used >= limit
        ]

    def _all(self, budgets: Budgets, *, soft: bool) -> Iterator[tuple[Period, Unit, int, int]]:
        units: tuple[Unit, ...] = ("tokens", "cost")
        for period, budget in budgets.items():
            for unit in units:
                if (limit := budget.limit(unit, soft=soft)) is not None:
                    yield period, unit, limit, getattr(self.used[period], unit)

    def over(self, now: datetime) -> bool:
        """Whether nothing of it is needed any more."""
        held = self.reserved.tokens or self.reserved.cost
        return not held and self.since.get("month") != began("month", now)
