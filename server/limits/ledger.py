"""Where limits and budgets are counted: the nouns, and the one interface of both ledgers.

    entry = await ledger.reserve(scopes, budget, amount)   all or nothing; raises Refused, Unavailable
    await ledger.change(entry, more, whole)                when the engine has counted the prompt
    ledger.use(entry, used, freed)                         as tokens are produced; never waits
    ledger.close(entry)                                    once, however the request ended; never waits

``server.limits.memory`` counts in this process, ``server.limits.redis`` for all that share a Redis.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from server.accounts.terms import Budgets, KeyLimits
from server.limits.budget import Amount, BudgetExceeded, Spending
from server.limits.line import Waits
from server.limits.rate import LimitExceeded, Remaining

# Reservations between two searches for counts that nobody needs any more.
SWEEP_EVERY = 1000

# ``Scope.whose`` of what is no limit of the customer's own: a place to run at; see ``server.fleet.places``.
PLACES = "places"

# Reads what a tenant's recorded requests used from the first time on until before the second.
Recorded = Callable[[datetime, datetime], Awaitable[Amount]]


async def _nothing(_since: datetime, _until: datetime) -> Amount:
    return Amount()


@dataclass(frozen=True, slots=True)
class Scope:
    """A tenant or one of its keys, and its limits. ``whose`` is ``tenant``, ``key <id>`` or ``PLACES``."""

    name: str
    whose: str
    limits: KeyLimits


@dataclass(frozen=True, slots=True)
class TenantBudget:
    """A tenant's budgets, None for one without any.

    ``name`` belongs to nobody else, not even to a later tenant of the same id.
    """

    name: str
    budgets: Budgets | None
    recorded: Recorded

    @classmethod
    def none(cls, name: str) -> TenantBudget:
        """For what no budget bounds."""
        return cls(name, None, _nothing)


@dataclass(slots=True, eq=False)
class Entry:
    """One request in a ledger.

    ``reserved`` is what the request may still use, ``used`` what it has used and the ledger has not counted.
    """

    scopes: Sequence[Scope]
    budget: TenantBudget
    reserved: Amount
    used: Amount = field(default_factory=Amount)
    closed: bool = False
    id: str = ""


class Refused(Exception):
    """A limit (then ``whose`` is its scope's) or a budget forbids it now."""

    def __init__(self, reason: LimitExceeded | BudgetExceeded, whose: str = "") -> None:
        super().__init__(str(reason))
        self.reason = reason
        self.whose = whose


class Ledger(Protocol):
    """Counts requests and tokens of scopes, and tokens and money of budgets.

    ``reserve``, ``change`` and ``refresh`` raise Unavailable (``limits_unavailable``) while the ledger cannot
    be reached. Each of them is atomic: nothing is counted or reserved when it raises or is cancelled.
    """

    async def refresh(self, budget: TenantBudget) -> None:
        """Brings ``spending(budget)`` up to date."""

    async def reserve(
        self, scopes: Sequence[Scope], budget: TenantBudget, amount: Amount, waits: Waits | None = None
    ) -> Entry:
        """Counts a new request that may use ``amount``. Raises Refused.

        ``waits`` for places, of one scope: it is in the ``Line`` of all who ask this ledger from the first
        time that it is refused, until it is admitted or ``leave`` is called, and asks with the same id.
        """

    def leave(self, scope: Scope, waits: Waits) -> None:
        """It waits no more, and was not admitted; never waits."""

    async def change(self, entry: Entry, more: Amount, whole: int) -> None:
        """Reserves ``more`` (below 0: less) for a request of ``whole`` tokens in all. Raises Refused."""

    def use(self, entry: Entry, used: Amount, freed: Amount) -> None:
        """Counts ``used``, and takes ``freed`` off what ``entry`` has reserved."""

    def close(self, entry: Entry) -> None:
        """The request is over: it is none of those at once any more. ``use`` has freed its reservation."""

    def remaining(self, scope: Scope) -> dict[str, Remaining]:
        """What is left of ``requests`` and ``tokens`` a minute, as far as this process knows."""

    def spending(self, budget: TenantBudget) -> Spending:
        """What the tenant has used and reserved, as far as this process knows."""
