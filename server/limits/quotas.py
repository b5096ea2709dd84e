"""What a tenant may still use. A request passes here three times:

    reservation = await quotas.open(tenant, …)     refuses a model that the tenant may not use
    await reservation.reserve(prompt, output)     before it waits for its turn: the most that it can use
    await reservation.settle()                    when the engine has counted the prompt: just that
    lease.account = reservation                   learns what is produced, and of the end
    reservation.withdraw()                        instead, where the request never got a lease

Limits hold for a tenant and, each key's own, for its keys; budgets for a tenant. A ``Ledger`` counts both.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import datetime

from adapters.database.rows import now as wall_now
from adapters.model import Version
from server.accounts.tenants import Tenant
from server.accounts.usage import Usage
from server.limits.budget import Amount
from server.limits.ledger import Ledger, TenantBudget
from server.limits.memory import MemoryLedger
from server.limits.permissions import check_model, counted_scopes
from server.limits.rate import Remaining, duration
from server.limits.reservation import Books, Request, Reservation
from server.logs import LINE, REQUEST
from server.metrics import Metrics, Outcome
from server.settings import Price

# (tokens, cost) that a tenant's recorded requests used from one time on until before another.
Spent = Callable[[str, datetime, datetime], Awaitable[tuple[int, int]]]


async def _nothing_spent(tenant: str, start: datetime, end: datetime) -> tuple[int, int]:
    return 0, 0


class Quotas:
    """Opens reservations and says what is left.

    ``record`` takes what a request used when it is over, ``record_refused`` one that was refused, ``spent``
    reads from such records, ``prices`` are the settings', ``wall`` is the clock of budgets.
    """

    def __init__(
        self,
        ledger: Ledger | None = None,
        *,
        record: Callable[[Usage], None] = lambda _: None,
        record_refused: Callable[[Usage], None] = lambda _: None,
        spent: Spent = _nothing_spent,
        prices: Mapping[str, Price] | None = None,
        metrics: Metrics | None = None,
        wall: Callable[[], datetime] = wall_now,
    ) -> None:
        self.ledger: Ledger = MemoryLedger(wall=wall) if ledger is None else ledger
        self._books = Books(self.ledger, record, wall, prices or {}, metrics)
        self._spent = spent
        self._record_refused = record_refused
        self._wall = wall

    def reprice(self, prices: Mapping[str, Price]) -> None:
        """From the next request on; what runs is billed as it began."""
        self._books = replace(self._books, prices=prices)

    async def open(
        self,
        tenant: Tenant,
        version: Version | None,
        *,
        endpoint: str,
        request_id: str,
        numbered: bool = False,
        in_parts: bool = False,
    ) -> Reservation:
        """For a request to ``version``, or to the base model (None); what the tenant has used is then known.

        ``numbered`` if it named the version, and not only its adapter; ``in_parts`` if it is answered
        in parts, one after another.

        Forbidden (``model_not_allowed``) where tenant or key may not use the model; Unavailable
        (``limits_unavailable``) where the tenant has budgets and the ledger cannot be reached.
        """
        check_model(tenant, version.adapter if version else None)
        budget = self.budget(tenant)
        await self.ledger.refresh(budget)
        ids = REQUEST.get()
        client_id = ids.client if ids is not None else None
        request = Request(tenant, version, endpoint, request_id, client_id, numbered, in_parts)
        return Reservation(self._books, request, budget)

    def refused(
        self,
        tenant: Tenant,
        version: tuple[str, int] | None,
        *,
        endpoint: str,
        request_id: str,
        outcome: Outcome,
        code: str | None,
        seconds: float,
        numbered: bool = False,
    ) -> None:
        """Records a request that got no lease, so that it can be found; it counts nowhere.

        ``version`` is an adapter's name and the number.
        """
        ids = REQUEST.get()
        adapter, number = version or (None, None)
        if (line := LINE.get()) is not None:
            line["outcome"] = outcome
            line["adapter"] = adapter
            line["version"] = number
        self._record_refused(
            Usage(
                at=self._wall(),
                tenant=tenant.id,
                key=tenant.key.id if tenant.key else None,
                adapter=adapter,
                version=number,
                endpoint=endpoint,
                outcome=outcome,
                request_id=request_id,
                requests=0,
                queue_seconds=seconds,
                seconds=seconds,
                client_request_id=ids.client if ids is not None else None,
                code=code,
                numbered=numbered,
            )
        )

    def headers(self, tenant: Tenant) -> dict[str, str]:
        """OpenAI's ``x-ratelimit-…``, of whichever limit leaves less, and the warnings of soft budgets."""
        least: dict[str, Remaining] = {}
        for scope in counted_scopes(tenant):
            for what, remaining in self.ledger.remaining(scope).items():
                if what not in least or remaining.remaining < least[what].remaining:
                    least[what] = remaining
        headers = {}
        for what, remaining in least.items():
            headers[f"x-ratelimit-limit-{what}"] = str(remaining.limit)
            headers[f"x-ratelimit-remaining-{what}"] = str(remaining.remaining)
            headers[f"x-ratelimit-reset-{what}"] = duration(remaining.reset)
        if tenant.budgets is not None:
            spending = self.ledger.spending(self.budget(tenant))
            if passed := spending.warnings(tenant.budgets, self._wall()):
                headers["x-budget-warning"] = "; ".join(map(str, passed))
        return headers

    def now(self) -> datetime:
        """By the clock of budgets."""
        return self._wall()

    def budget(self, tenant: Tenant) -> TenantBudget:
        """The tenant's budgets, under a name that no later tenant of the same id has."""

        async def recorded(since: datetime, until: datetime) -> Amount:
            return Amount(*await self._spent(tenant.id, max(since, tenant.created_at), until))

        name = f"{tenant.id}@{tenant.created_at.timestamp():.6f}"
        return TenantBudget(name, tenant.budgets, recorded)
