"""What a tenant may still use, and what it has used: every request has a ``Ticket`` from admission to end.

ticket = quotas.admit(tenant, ...)      before it waits for its turn
lease.account = ticket                  told what is produced, and of the end
ticket.withdraw()                       instead, where it never got a lease
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from adapters.model import Version
from adapters.tables import now
from server.dispatcher import Lease
from server.settings import Price
from server.tenants import Tenant
from server.usage import Usage


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as quotas see it: by whom, for what, and the most tokens it can use."""

    tenant: Tenant
    version: Version | None
    endpoint: str
    request_id: str
    prompt_tokens: int
    output_tokens: int


class Quotas:
    """``record`` takes what a request used when it is over; ``prices`` as in the settings."""

    def __init__(
        self,
        *,
        record: Callable[[Usage], None] = lambda _: None,
        prices: Mapping[str, Price] | None = None,
    ) -> None:
        self.record = record
        self._prices = prices or {}

    def admit(self, asked: Asked) -> Ticket:
        return Ticket(self, asked)

    def cost(self, asked: Asked, prompt: int, cached: int, output: int) -> int:
        """In ``COST_UNIT``ths of the currency."""
        model = f"{asked.tenant.id}/{asked.version.adapter}" if asked.version else "base"
        price = self._prices.get(model) or self._prices.get("*")
        return price.of(prompt, cached, output) if price else 0


class Ticket:
    """One request's part of everything that is counted."""

    def __init__(self, quotas: Quotas, asked: Asked) -> None:
        self._quotas = quotas
        self._asked = asked

    def withdraw(self) -> None:
        """It will not run."""

    def progressed(self, lease: Lease) -> None:
        """Something more was produced."""

    def closed(self, lease: Lease) -> None:
        asked, version = self._asked, self._asked.version
        used = lease.prompt_tokens, lease.cached_tokens, lease.output_tokens
        self._quotas.record(
            Usage(
                at=now(),
                tenant=asked.tenant.id,
                key=asked.tenant.key.id if asked.tenant.key else None,
                adapter=version.adapter if version else None,
                version=version.number if version else None,
                endpoint=asked.endpoint,
                outcome=lease.outcome,
                request_id=asked.request_id,
                prompt_tokens=used[0],
                cached_tokens=used[1],
                output_tokens=used[2],
                queue_seconds=lease.queued_for,
                first_token_seconds=lease.first_token_after or 0.0,
                seconds=lease.age,
                cost=self._quotas.cost(asked, *used),
            )
        )
