"""One request's part of everything that is counted, from before it waits for its turn to its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime

from adapters.model import Version
from server.accounts.tenants import Tenant
from server.accounts.usage import Usage
from server.errors import ServerError, TooManyRequests
from server.limits.budget import Amount, BudgetExceeded
from server.limits.errors import insufficient_quota, rate_limit_exceeded
from server.limits.ledger import Entry, Ledger, Refused, TenantBudget
from server.limits.permissions import check_max_tokens, counted_scopes, limits_of
from server.logs import LINE
from server.metrics import Metrics
from server.scheduling.lease import Lease, told_of
from server.settings import Price

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """Who asks for what. ``version`` is None for the base model, ``client_id`` the client's own id of it.

    ``numbered`` if the request named the version, and not only its adapter; ``in_parts`` if it is answered in
    parts, one after another.
    """

    tenant: Tenant
    version: Version | None
    endpoint: str
    id: str
    client_id: str | None = None
    numbered: bool = False
    in_parts: bool = False


@dataclass(frozen=True, slots=True)
class Books:
    """What all reservations share: the ledger, the prices, and where usage is recorded."""

    ledger: Ledger
    record: Callable[[Usage], None]
    wall: Callable[[], datetime]
    prices: Mapping[str, Price] = field(default_factory=dict)
    metrics: Metrics | None = None

    def cost(self, request: Request, prompt: int, cached: int, output: int) -> int:
        """The price of so many tokens, in ``COST_UNIT``ths of the currency."""
        model = f"{request.tenant.id}/{request.version.adapter}" if request.version else "base"
        price = self.prices.get(model) or self.prices.get("*")
        return price.of(prompt, cached, output) if price else 0

    @contextmanager
    def refusals(self, tenant: Tenant, tokens: int) -> Iterator[None]:
        """Turns what the ledger refuses to a request of ``tokens`` into what the client is told."""
        try:
            yield
        except Refused as exc:
            if isinstance(exc.reason, BudgetExceeded):
                self.count_budget(tenant, "hard")
                raise insufficient_quota(exc.reason, tokens, self.wall()) from None
            raise rate_limit_exceeded(exc.reason, exc.whose) from None

    def warn(self, tenant: Tenant, budget: TenantBudget) -> None:
        """Counts and logs the soft budgets that are used up; each has one line in the log in its period."""
        if budget.budgets is None:
            return
        spending = self.ledger.spending(budget)
        for passed in spending.warnings(budget.budgets, self.wall()):
            self.count_budget(tenant, "soft")
            if (passed.period, passed.unit) not in spending.warned:
                spending.warned.add((passed.period, passed.unit))
                logger.warning("tenant %s has used %s", tenant.id, passed)

    def count_budget(self, tenant: Tenant, kind: str) -> None:
        """Counts a request that a budget refused (``hard``) or warned about (``soft``)."""
        if self.metrics is not None:
            self.metrics.budget(tenant.id, kind)


class Reservation:
    """Holds nothing until ``reserve``; after that it needs either ``closed`` or ``withdraw``.

    It is the lease's account (``progressed``, ``closed``) and, where tokens are limited, its admission: the
    engine tells with ``asks`` what each part of the request comes to and then waits for ``settle``.
    ``refused`` is the error that this ended with, ``recorded`` whether its usage has been recorded.
    """

    def __init__(self, books: Books, request: Request, budget: TenantBudget) -> None:
        self.refused: ServerError | None = None
        self.recorded = False
        self._books = books
        self._request = request
        self._budget = budget
        self._entry = Entry((), budget, Amount())
        self._elastic = False
        self._used = Amount()
        self._asks = 0, 0, 0  # prompt tokens, output tokens, sequences
        self._settled: tuple[tuple[int, int, int], int | None] = self._asks, None
        self._settling = asyncio.Lock()

    @property
    def limits_tokens(self) -> bool:
        """Whether the engine has to wait for ``settle``."""
        tenant = self._request.tenant
        return tenant.budgets is not None or any(limits.tokens_per_minute for _, limits in limits_of(tenant))

    def check_max_tokens(self, max_tokens: int, param: str) -> None:
        """BadRequest (``max_tokens_too_large``) if one answer may not be so long."""
        check_max_tokens(self._request.tenant, max_tokens, param)

    def max_output(self, prompt_tokens: int, sequences: int) -> int | None:
        """Output tokens of each sequence that limits and budgets leave, at least 1; None if they say nothing.

        For requests that do not say how much they want.
        """
        limits = [limits for _, limits in limits_of(self._request.tenant)]
        together = [limit.tokens_per_minute for limit in limits]
        if self._budget.budgets is not None:
            spending = self._books.ledger.spending(self._budget)
            together.append(spending.remaining_tokens(self._budget.budgets, self._books.wall()))
        bounds = [limit.max_tokens for limit in limits if limit.max_tokens is not None]
        bounds += [(most - prompt_tokens) // sequences for most in together if most is not None]
        return max(1, min(bounds)) if bounds else None

    async def reserve(self, prompt_tokens: int, output_tokens: int, *, elastic: bool = False) -> None:
        """Reserves the most tokens that the request can use, as far as is known before they are counted.

        ``elastic`` if the request does not say how long its answer is to be. Raises TooManyRequests
        (``rate_limit_exceeded``, ``insufficient_quota``) or Unavailable (``limits_unavailable``).
        """
        request, ledger, self._elastic = self._request, self._books.ledger, elastic
        tokens = prompt_tokens + output_tokens
        amount = Amount(tokens, self._books.cost(request, prompt_tokens, 0, output_tokens))
        with self._books.refusals(request.tenant, tokens):
            self._entry = await ledger.reserve(counted_scopes(request.tenant), self._budget, amount)
        self._books.warn(request.tenant, self._budget)

    def asks(self, prompt_tokens: int, output_tokens: int, sequences: int) -> None:
        """Adds a part: its prompt, and the most that all its sequences together can answer."""
        prompt, output, parts = self._asks
        self._asks = prompt + prompt_tokens, output + output_tokens, parts + sequences

    async def settle(self) -> int | None:
        """Reserves what was asked for instead of what was estimated.

        Returns how many tokens each sequence may have at most, if fewer than it asked for; only where the
        request is elastic. Raises as ``reserve``, and then for every part.
        """
        async with self._settling:
            if self.refused is not None:
                raise self.refused
            if self._settled[0] != self._asks:
                try:
                    self._settled = self._asks, await self._settle(*self._asks)
                except ServerError as exc:
                    self.refused = exc
                    # Not only when the lease is closed, or the next request would be refused for it.
                    await self._books.ledger.change(self._entry, -self._entry.reserved, 0)
                    raise
            return self._settled[1]

    async def _settle(self, prompt: int, output: int, sequences: int) -> int | None:
        try:
            await self._change(prompt, output)
        except TooManyRequests:
            held = self._used.tokens + self._entry.reserved.tokens
            fewer = (held - prompt) // sequences if self._elastic and sequences else 0
            if fewer < 1:
                raise
            await self._change(prompt, fewer * sequences)
            return fewer
        return None

    async def _change(self, prompt: int, output: int) -> None:
        """Makes used and reserved together what so many tokens come to."""
        if self._entry.closed:
            return
        whole = Amount(prompt + output, self._books.cost(self._request, prompt, 0, output))
        more = whole - self._used - self._entry.reserved
        if self._request.in_parts:
            more = more.positive()  # more may follow
        with self._books.refusals(self._request.tenant, whole.tokens):
            await self._books.ledger.change(self._entry, more, whole.tokens)

    def withdraw(self) -> None:
        """Gives all back: the request does not run. It still counts as one of the minute's requests."""
        self._use(Amount(), last=True)

    def progressed(self, lease: Lease) -> None:
        """Counts what the lease has used so far."""
        self._use(self._used_by(lease))

    def closed(self, lease: Lease) -> None:
        """Counts what the lease has used, gives the rest back, and records the request's usage."""
        used = self._used_by(lease)
        self._use(used, last=True)
        self.recorded = True
        if (line := LINE.get()) is not None:
            line |= told_of(lease)
        request, version, key = self._request, self._request.version, self._request.tenant.key
        self._books.record(
            Usage(
                at=self._books.wall(),
                tenant=request.tenant.id,
                key=key.id if key else None,
                adapter=version.adapter if version else None,
                version=version.number if version else None,
                endpoint=request.endpoint,
                outcome=lease.outcome,
                request_id=request.id,
                prompt_tokens=lease.prompt_tokens,
                cached_tokens=lease.cached_tokens,
                output_tokens=lease.output_tokens,
                queue_seconds=lease.queued_for,
                first_token_seconds=lease.first_token_after or 0.0,
                seconds=lease.age,
                cost=used.cost,
                load_seconds=lease.load_seconds,
                client_request_id=request.client_id,
                code=lease.code,
                finish=lease.finish,
                numbered=request.numbered,
            )
        )

    def _used_by(self, lease: Lease) -> Amount:
        tokens = lease.prompt_tokens, lease.cached_tokens, lease.output_tokens
        return Amount(lease.prompt_tokens + lease.output_tokens, self._books.cost(self._request, *tokens))

    def _use(self, total: Amount, *, last: bool = False) -> None:
        """Counts what is new in ``total`` and takes it off the reservation; at the end takes all off."""
        new, reserved = total - self._used, self._entry.reserved
        freed = reserved if last else reserved.least(new.positive())
        self._used = total
        self._books.ledger.use(self._entry, new, freed)
        if last:
            self._books.ledger.close(self._entry)
