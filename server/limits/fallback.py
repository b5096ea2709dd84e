"""Limits in Redis, and in this process alone while Redis does not answer (``LIMITS_FAIL=open``)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime

from adapters.database.rows import now as wall_now
from server.errors import Unavailable
from server.limits.budget import Amount, Spending
from server.limits.ledger import PLACES, Entry, Scope, TenantBudget
from server.limits.line import Waits
from server.limits.memory import MemoryLedger
from server.limits.rate import Remaining
from server.limits.redis import RedisLedger


class FallbackLedger:
    """A ``Ledger`` that never raises Unavailable.

    Each outage begins with a new ``MemoryLedger``: minutes begin anew, and budgets with the usage that is
    recorded at that moment. What requests use in an outage is owed to Redis, which is told when it is back.
    ``on_local`` is called for each request that is admitted without Redis.
    """

    def __init__(
        self,
        redis: RedisLedger,
        *,
        on_local: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = wall_now,
    ) -> None:
        self._redis = redis
        self._on_local = on_local
        self._clock = clock
        self._wall = wall
        self._memory: MemoryLedger | None = None  # of the outage, while there is one
        self._local: dict[Entry, MemoryLedger] = {}
        self._owed: dict[tuple[str, ...], Entry] = {}

    async def refresh(self, budget: TenantBudget) -> None:
        """See ``Ledger.refresh``."""
        if not self._redis.up:
            await self._outage().refresh(budget)
            return
        self._memory = None
        try:
            await self._redis.refresh(budget)
        except Unavailable:
            await self._outage().refresh(budget)

    async def reserve(
        self, scopes: Sequence[Scope], budget: TenantBudget, amount: Amount, waits: Waits | None = None
    ) -> Entry:
        """See ``Ledger.reserve``."""
        if self._redis.up:
            self._memory = None
            try:
                return await self._redis.reserve(scopes, budget, amount, waits)
            except Unavailable:
                pass
        memory = self._outage()
        await memory.refresh(budget)
        entry = await memory.reserve(scopes, budget, amount, waits)
        if any(scope.whose != PLACES for scope in scopes) or budget.budgets is not None:
            self._on_local()
        self._local[entry] = memory
        return entry

    def leave(self, scope: Scope, waits: Waits) -> None:
        """See ``Ledger.leave``."""
        if self._memory is not None:
            self._memory.leave(scope, waits)
        if self._redis.up:
            self._redis.leave(scope, waits)

    async def change(self, entry: Entry, more: Amount, whole: int) -> None:
        """See ``Ledger.change``. What Redis admitted and cannot be asked about now gets what it needs."""
        if (memory := self._local.get(entry)) is not None:
            await memory.change(entry, more, whole)
            return
        try:
            await self._redis.change(entry, more, whole)
        except Unavailable:
            self._redis.use(entry, Amount(), -more)

    def use(self, entry: Entry, used: Amount, freed: Amount) -> None:
        """See ``Ledger.use``."""
        memory = self._local.get(entry)
        if memory is None:
            self._redis.use(entry, used, freed)
            return
        memory.use(entry, used, freed)
        if used and (entry.scopes or entry.budget.budgets is not None):
            self._redis.use(self._owed_by(entry), used, Amount())

    def close(self, entry: Entry) -> None:
        """See ``Ledger.close``."""
        memory = self._local.pop(entry, None)
        (memory or self._redis).close(entry)

    def remaining(self, scope: Scope) -> dict[str, Remaining]:
        """See ``Ledger.remaining``; in an outage as this process counts it."""
        return (self._redis if self._redis.up else self._outage()).remaining(scope)

    def spending(self, budget: TenantBudget) -> Spending:
        """See ``Ledger.spending``; in an outage as this process counts it."""
        return (self._redis if self._redis.up else self._outage()).spending(budget)

    def _outage(self) -> MemoryLedger:
        if self._memory is None:
            self._memory = MemoryLedger(clock=self._clock, wall=self._wall)
        return self._memory

    def _owed_by(self, entry: Entry) -> Entry:
        """One entry for all that a tenant and its key use in an outage, however long that is."""
        origin = entry.budget.name, *(scope.name for scope in entry.scopes)
        owed = self._owed.get(origin)
        if owed is None or not self._redis.owes(owed):
            owed = self._owed[origin] = self._redis.owe(entry.scopes, entry.budget)
            self._owed = {key: kept for key, kept in self._owed.items() if self._redis.owes(kept)}
        return owed


def ledger_of(
    redis: RedisLedger | None, fail: str, on_local: Callable[[], None]
) -> RedisLedger | FallbackLedger | None:
    """What limits are kept in by the setting ``limits_fail`` (``open`` or ``closed``); None without Redis."""
    if redis is None or fail == "closed":
        return redis
    return FallbackLedger(redis, on_local=on_local)
