"""What a tenant may use in a day or a month, in tokens and in money: the arithmetic, without clock or rows.

    soft   from there on every answer carries a warning
    hard   never passed: what requests under way may still use counts as used until they end

Days and months are those of UTC.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from server.accounts.terms import COST_UNIT, PERIODS, UNITS, Budgets, Period, Unit

# Periods that are over, or not there yet, of which it is still known what was used.
_OTHER_PERIODS = 6
# After the end of a month, when nobody doubts it.
_SURE_AFTER = timedelta(days=3)


def period_start(period: Period, now: datetime) -> datetime:
    """The first moment of the day or month that ``now`` is in."""
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight if period == "day" else midnight.replace(day=1)


def period_end(period: Period, now: datetime) -> datetime:
    """The first moment of the next day or month."""
    start = period_start(period, now)
    return start + timedelta(days=1) if period == "day" else (start + timedelta(days=32)).replace(day=1)


@dataclass(frozen=True, slots=True)
class Amount:
    """Tokens, and money in ``COST_UNIT``ths of the currency."""

    tokens: int = 0
    cost: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.tokens + other.tokens, self.cost + other.cost)

    def __sub__(self, other: Amount) -> Amount:
        return Amount(self.tokens - other.tokens, self.cost - other.cost)

    def __neg__(self) -> Amount:
        return Amount(-self.tokens, -self.cost)

    def __bool__(self) -> bool:
        return bool(self.tokens or self.cost)

    def least(self, other: Amount) -> Amount:
        """The smaller of both, each unit for itself."""
        return Amount(min(self.tokens, other.tokens), min(self.cost, other.cost))

    def positive(self) -> Amount:
        """With 0 for what is below 0."""
        return Amount(max(0, self.tokens), max(0, self.cost))


@dataclass(frozen=True, slots=True)
class BudgetExceeded:
    """A budget, in tokens or ``COST_UNIT``ths, that is used up or would be passed."""

    period: Period
    unit: Unit
    limit: int
    used: int

    def __str__(self) -> str:
        return f"{self._text(self.used)} of {self._text(self.limit)} of the {self.period}"

    def _text(self, amount: int) -> str:
        return f"{amount} tokens" if self.unit == "tokens" else f"{amount / COST_UNIT:.6g} of cost"


@dataclass(slots=True)
class Spending:
    """What one tenant has used in this day and this month, and what its requests may still use.

    ``since`` has the beginnings of the periods that ``used`` is for, ``warned`` the soft budgets about which
    the log has a line in this period. ``others`` has what was used in the last few other periods: a clock
    that jumps there and back gives nobody a budget twice.
    """

    since: dict[Period, datetime] = field(default_factory=dict)
    used: dict[Period, Amount] = field(default_factory=dict)
    reserved: Amount = Amount()
    warned: set[tuple[Period, Unit]] = field(default_factory=set)
    others: dict[tuple[Period, datetime], Amount] = field(default_factory=dict)

    def roll_over(self, now: datetime) -> None:
        """Begins the day and the month that ``now`` is in, where it is not in them already."""
        for period in PERIODS:
            start = period_start(period, now)
            if (since := self.since.get(period)) == start:
                continue
            if since is not None:
                self.others[period, since] = self.used[period]
            self.since[period], self.used[period] = start, self.others.pop((period, start), Amount())
            self.warned = {entry for entry in self.warned if entry[0] != period}
            while len(self.others) > _OTHER_PERIODS:
                del self.others[next(iter(self.others))]

    def set_from_store(self, now: datetime, used: Mapping[Period, Amount], reserved: Amount) -> None:
        """Takes over what the store that counts for all processes says."""
        self.roll_over(now)
        self.used.update(used)
        self.reserved = reserved

    def add(self, amount: Amount, now: datetime) -> None:
        """Counts ``amount`` as used."""
        self.roll_over(now)
        for period in PERIODS:
            self.used[period] += amount

    def check(
        self, budgets: Budgets, asked: Amount, now: datetime, *, begun: bool = False
    ) -> BudgetExceeded | None:
        """The hard budget that a request of at most ``asked`` could pass; None if it may run.

        With ``begun`` the request runs already and ``asked`` is what it needs beyond its reservation.
        """
        self.roll_over(now)
        for period, unit, limit, used in self._all(budgets, soft=False):
            more = getattr(asked, unit)
            taken = used + getattr(self.reserved, unit)
            if (more > 0 or not begun) and (taken + more > limit or taken >= limit):
                return BudgetExceeded(period, unit, limit, used)
        return None

    def remaining_tokens(self, budgets: Budgets, now: datetime) -> int | None:
        """Tokens that no hard budget forbids; None without one."""
        self.roll_over(now)
        tokens = [
            limit - used - self.reserved.tokens
            for _, unit, limit, used in self._all(budgets, soft=False)
            if unit == "tokens"
        ]
        return min(tokens, default=None)

    def warnings(self, budgets: Budgets, now: datetime) -> list[BudgetExceeded]:
        """The soft budgets that are used up."""
        self.roll_over(now)
        return [
            BudgetExceeded(period, unit, limit, used)
            for period, unit, limit, used in self._all(budgets, soft=True)
            if used >= limit
        ]

    def _all(self, budgets: Budgets, *, soft: bool) -> Iterator[tuple[Period, Unit, int, int]]:
        for period, budget in budgets.items():
            for unit in UNITS:
                if (limit := budget.limit(unit, soft=soft)) is not None:
                    yield period, unit, limit, getattr(self.used[period], unit)

    def outdated(self, now: datetime) -> bool:
        """Whether nothing of it is needed any more: its month is long over and no request has reserved any.

        Days after its end, for the clock may be the one that is wrong; and then it may go back too.
        """
        since = self.since.get("month")
        return not self.reserved and (since is None or since < period_start("month", now - _SURE_AFTER))
