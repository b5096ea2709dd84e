"""Limits and budgets of one process, counted on its event loop.

Nothing here waits between a look and a reservation, so no other request can come between them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import datetime

from adapters.database.rows import now as wall_now
from server.accounts.terms import PERIODS
from server.limits.budget import Amount, Spending, period_start
from server.limits.ledger import SWEEP_EVERY, Entry, Refused, Scope, TenantBudget
from server.limits.line import Waits
from server.limits.rate import RateMeter, Remaining


class MemoryLedger:
    """A ``Ledger`` whose counts end with the process.

    ``clock`` gives seconds for the limits, ``wall`` the time for the budgets. What a tenant with budgets used
    before this process began is read from its recorded requests, once.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], datetime] = wall_now
    ) -> None:
        self.meters: dict[str, RateMeter] = {}
        self._clock = clock
        self._wall = wall
        self._started = wall()
        self._spending: dict[str, Spending] = {}
        self._refreshed: set[str] = set()
        self._refreshing = asyncio.Lock()
        self._reservations = 0

    async def refresh(self, budget: TenantBudget) -> None:
        """Reads what the tenant used before this process began, if that is not known yet."""
        if budget.budgets is None or budget.name in self._refreshed:
            return
        async with self._refreshing:
            if budget.name in self._refreshed:
                return
            now, before = self._wall(), {}
            for period in PERIODS:
                start = period_start(period, now)
                before[start] = period, await budget.recorded(start, self._started)
            spending = self.spending(budget)
            spending.roll_over(self._wall())
            for start, (period, amount) in before.items():
                if spending.since[period] == start:
                    spending.used[period] += amount
            self._refreshed.add(budget.name)

    async def reserve(
        self, scopes: Sequence[Scope], budget: TenantBudget, amount: Amount, waits: Waits | None = None
    ) -> Entry:
        """See ``Ledger.reserve``; a limit is looked at before a budget."""
        now, meters = self._clock(), [self._meter(scope) for scope in scopes]
        for scope, meter in zip(scopes, meters, strict=True):
            if (exceeded := meter.check(scope.limits, amount.tokens, now, waits)) is not None:
                raise Refused(exceeded, scope.whose)
        spending = self.spending(budget)
        if budget.budgets is not None:
            passed = spending.check(budget.budgets, amount, self._wall())
            if passed is not None:
                raise Refused(passed)
        for meter in meters:
            meter.begin(amount.tokens, now, waits)
        spending.reserved += amount
        self._reservations += 1
        if self._reservations % SWEEP_EVERY == 0:
            self.sweep()
        return Entry(scopes, budget, amount)

    def leave(self, scope: Scope, waits: Waits) -> None:
        """See ``Ledger.leave``."""
        self._meter(scope).line.leave(waits.id)

    async def change(self, entry: Entry, more: Amount, whole: int) -> None:
        """See ``Ledger.change``."""
        now = self._clock()
        for scope in entry.scopes if more.tokens > 0 else ():
            exceeded = self._meter(scope).check_tokens(scope.limits, whole, more.tokens, now)
            if exceeded is not None:
                raise Refused(exceeded, scope.whose)
        if entry.budget.budgets is not None:
            passed = self.spending(entry.budget).check(entry.budget.budgets, more, self._wall(), begun=True)
            if passed is not None:
                raise Refused(passed)
        self.use(entry, Amount(), -more)

    def use(self, entry: Entry, used: Amount, freed: Amount) -> None:
        """See ``Ledger.use``."""
        now = self._clock()
        for scope in entry.scopes:
            self._meter(scope).use(used.tokens, freed.tokens, now)
        spending = self.spending(entry.budget)
        spending.reserved -= freed
        spending.add(used, self._wall())
        entry.reserved -= freed

    def close(self, entry: Entry) -> None:
        """See ``Ledger.close``."""
        entry.closed = True
        for scope in entry.scopes:
            self._meter(scope).end()

    def remaining(self, scope: Scope) -> dict[str, Remaining]:
        """See ``Ledger.remaining``; always up to date."""
        return self._meter(scope).remaining(scope.limits, self._clock())

    def spending(self, budget: TenantBudget) -> Spending:
        """See ``Ledger.spending``; also counted for tenants without budgets, who may get some later."""
        return self._spending.setdefault(budget.name, Spending())

    def sweep(self) -> None:
        """Forgets what says the same as if it had never been."""
        now, wall = self._clock(), self._wall()
        self.meters = {name: meter for name, meter in self.meters.items() if not meter.idle(now)}
        outdated = {name for name, spending in self._spending.items() if spending.outdated(wall)}
        self._spending = {name: kept for name, kept in self._spending.items() if name not in outdated}
        self._refreshed -= outdated

    def _meter(self, scope: Scope) -> RateMeter:
        return self.meters.setdefault(scope.name, RateMeter())
