"""What a tenant may still use, and what it has used: every request has a ``Ticket`` from admission to end.

    await quotas.open(tenant)               what it used before this process began
    ticket = await quotas.take(asked)       before it waits for its turn; reserves the most it can use
    await ticket.settle()                   when the engine knows the prompt: reserves just that, or refuses
    lease.account = ticket                  told what is produced, and of the end
    ticket.withdraw()                       instead, where it never got a lease

Limits hold for a tenant and, each key's own, for its keys; budgets for a tenant. All of it is counted here,
on the event loop, so what is looked at is never stale and nothing runs between a look and a reservation.
With ``shared``, both are counted in Redis instead, where one script looks and reserves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from adapters.database.rows import now as wall_now
from adapters.model import Version
from server.accounts.tenants import Tenant
from server.accounts.terms import PERIODS, KeyLimits
from server.accounts.usage import Usage
from server.errors import BadRequest, Forbidden, ServerError, TooManyRequests
from server.limits.budget import Passed, Spending, began, ends
from server.limits.rate import Excess, Left, Meter, duration
from server.limits.redis import Exceeded, Hold, Overspent, Purse, Scope, SharedLimits
from server.metrics import Metrics
from server.scheduling.dispatcher import Lease
from server.settings import Price

logger = logging.getLogger(__name__)

# Admissions between two looks for what nobody uses any more.
SWEEP_EVERY = 1000

Spent = Callable[[str, datetime, datetime], Awaitable[tuple[int, int]]]


async def _nothing_spent(tenant: str, start: datetime, end: datetime) -> tuple[int, int]:
    return 0, 0


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as quotas see it: by whom, for what, and the most tokens it can use, as far as is known.

    ``elastic`` if it did not say how long its answer is to be.
    """

    tenant: Tenant
    version: Version | None
    endpoint: str
    request_id: str
    prompt_tokens: int
    output_tokens: int
    elastic: bool = False


class Quotas:
    """``record`` takes what a request used when it is over, ``spent`` tells (tokens, cost) from such records.

    ``prices`` is as in the settings; ``clock`` and ``wall`` are the clocks of limits and of budgets.
    """

    def __init__(
        self,
        *,
        record: Callable[[Usage], None] = lambda _: None,
        spent: Spent = _nothing_spent,
        prices: Mapping[str, Price] | None = None,
        metrics: Metrics | None = None,
        shared: SharedLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = wall_now,
    ) -> None:
        self.record = record
        self.clock = clock
        self.wall = wall
        self._spent = spent
        self._prices = prices or {}
        self._metrics = metrics
        self._shared = shared
        self._started = wall()
        self._meters: dict[str, Meter] = {}
        self._spending: dict[tuple[str, datetime], Spending] = {}
        self._opened: set[tuple[str, datetime]] = set()
        self._opening = asyncio.Lock()
        self._admissions = 0

    async def open(self, tenant: Tenant) -> None:
        """Reads what a tenant with budgets used before this process began, once; or always what Redis knows.

        Unavailable (``limits_unavailable``) without Redis.
        """
        if self._shared is not None:
            if (purse := self._purse(tenant)) is not None:
                await self._shared.look(purse)
            return
        owner = (tenant.id, tenant.created_at)
        if tenant.budgets is None or owner in self._opened:
            return
        async with self._opening:
            if owner in self._opened:
                return
            now, before = self.wall(), {}
            for period in PERIODS:
                start = max(began(period, now), tenant.created_at)
                before[began(period, now)] = period, await self._spent(tenant.id, start, self._started)
            spending = self.spending(tenant)
            spending.turn(self.wall())
            for start, (period, amount) in before.items():
                if spending.since[period] == start:
                    spending.used[period].add(*amount)
            self._opened.add(owner)

    def most_output(self, tenant: Tenant, prompt_tokens: int, sequences: int) -> int | None:
        """Output tokens of each sequence that limits and budgets leave, at least 1; None if they say nothing.

        For requests that do not say how much they want.
        """
        limits = [limits for _, limits in _limits(tenant)]
        together = [limit.tokens_per_minute for limit in limits]
        if tenant.budgets is not None:
            together.append(self.spending(tenant).rest(tenant.budgets, self.wall()))
        bounds = [limit.max_tokens for limit in limits if limit.max_tokens is not None]
        bounds += [(most - prompt_tokens) // sequences for most in together if most is not None]
        return max(1, min(bounds)) if bounds else None

    async def take(self, asked: Asked) -> Ticket:
        """As ``admit``, wherever limits are counted; Unavailable (``limits_unavailable``) without Redis."""
        if self._shared is None:
            return self.admit(asked)
        scopes, purse = _scopes(asked.tenant), self._purse(asked.tenant)
        if not scopes and purse is None:
            return self.admit(asked)
        tokens = asked.prompt_tokens + asked.output_tokens
        cost = self.cost(asked, asked.prompt_tokens, 0, asked.output_tokens)
        with self._refusals(asked, tokens):
            hold = await self._shared.admit(scopes, tokens, purse, cost)
        try:
            return self.admit(asked, hold)
        except BaseException:
            hold.use(0, hold.reserved, 0, hold.reserved_cost)
            self._shared.end(hold)
            raise

    @contextmanager
    def _refusals(self, asked: Asked, tokens: int) -> Iterator[None]:
        """What Redis refuses, as clients are told it."""
        try:
            yield
        except Exceeded as exc:
            raise _limited(exc.excess, exc.whose) from None
        except Overspent as exc:
            self._count(asked.tenant, "hard")
            raise _spent_out(exc.passed, tokens, self.wall()) from None

    def admit(self, asked: Asked, hold: Hold | None = None) -> Ticket:
        """BadRequest for more ``max_tokens`` than are allowed, TooManyRequests (``rate_limit_exceeded``,
        ``insufficient_quota``) for what limits and budgets forbid now. With ``hold``, both were seen to."""
        now, tokens = self.clock(), asked.prompt_tokens + asked.output_tokens
        meters = []
        for whose, limits in _limits(asked.tenant) if hold is None else ():
            meter = self._meter(asked.tenant, whose)
            if (excess := meter.excess(limits, tokens, now)) is not None:
                raise _limited(excess, whose)
            meters.append(meter)
        cost = self.cost(asked, asked.prompt_tokens, 0, asked.output_tokens)
        spending = self.spending(asked.tenant)
        known = hold is not None and hold.purse is not None
        if asked.tenant.budgets is not None:
            if not known:
                passed = spending.excess(asked.tenant.budgets, tokens, cost, self.wall())
                if passed is not None:
                    self._count(asked.tenant, "hard")
                    raise _spent_out(passed, tokens, self.wall())
            self._warn(asked.tenant, spending)
        for meter in meters:
            meter.admit(tokens, now)
        if not known:
            spending.reserved.add(tokens, cost)
        self._admissions += 1
        if self._admissions % SWEEP_EVERY == 0:
            self._sweep(now)
        return Ticket(self, asked, meters, spending, tokens, cost, hold)

    def headers(self, tenant: Tenant) -> dict[str, str]:
        """OpenAI's ``x-ratelimit-…``, of whichever limit leaves less, and the warnings of soft budgets."""
        now, found = self.clock(), {}
        left: dict[str, Left] = {}
        if self._shared is not None:
            counted = [self._shared.left(scope) for scope in _scopes(tenant)]
        else:
            counted = [self._meter(tenant, whose).left(limits, now) for whose, limits in _limits(tenant)]
        for one in counted:
            for what, rest in one.items():
                if what not in left or rest.remaining < left[what].remaining:
                    left[what] = rest
        for what, rest in left.items():
            found[f"x-ratelimit-limit-{what}"] = str(rest.limit)
            found[f"x-ratelimit-remaining-{what}"] = str(rest.remaining)
            found[f"x-ratelimit-reset-{what}"] = duration(rest.reset)
        if tenant.budgets is not None:
            passed = self.spending(tenant).warnings(tenant.budgets, self.wall())
            if passed:
                found["x-budget-warning"] = "; ".join(map(_used_of, passed))
        return found

    def cost(self, asked: Asked, prompt: int, cached: int, output: int) -> int:
        """In ``COST_UNIT``ths of the currency."""
        model = f"{asked.tenant.id}/{asked.version.adapter}" if asked.version else "base"
        price = self._prices.get(model) or self._prices.get("*")
        return price.of(prompt, cached, output) if price else 0

    def spending(self, tenant: Tenant) -> Spending:
        return self._spending.setdefault((tenant.id, tenant.created_at), Spending())

    def _purse(self, tenant: Tenant) -> Purse | None:
        if tenant.budgets is None:
            return None

        async def recorded(since: datetime) -> tuple[int, int]:
            return await self._spent(tenant.id, max(since, tenant.created_at), self.wall())

        name = f"{tenant.id}@{tenant.created_at.timestamp():.6f}"
        return Purse(name, tenant.budgets, self.spending(tenant), recorded)

    def _meter(self, tenant: Tenant, whose: str) -> Meter:
        return self._meters.setdefault(f"{tenant.id} {whose}", Meter())

    async def reserve(self, ticket: Ticket, tokens: int, cost: int, whole: int) -> None:
        """So much more for a request of ``whole`` tokens, or less; raises as ``take`` does."""
        if ticket.hold is None:
            self._reserve_here(ticket, tokens, cost, whole)
        elif tokens > 0 or cost > 0:
            assert self._shared is not None
            with self._refusals(ticket.asked, whole):
                await self._shared.more(ticket.hold, tokens, cost)
            if ticket.hold.purse is None and not ticket.ended:
                ticket.spending.reserved.add(tokens, cost)
        else:
            ticket.hold.use(0, -tokens, 0, -cost)
            ticket.spending.reserved.add(tokens, cost)

    def _reserve_here(self, ticket: Ticket, tokens: int, cost: int, whole: int) -> None:
        asked, now = ticket.asked, self.clock()
        if tokens > 0:
            for meter, (whose, limits) in zip(ticket.meters, _limits(asked.tenant), strict=False):
                if (excess := meter.short(limits, whole, tokens, now)) is not None:
                    raise _limited(excess, whose)
        if (budgets := asked.tenant.budgets) is not None:
            wall = self.wall()
            passed = self.spending(asked.tenant).excess(budgets, tokens, cost, wall, begun=True)
            if passed is not None:
                self._count(asked.tenant, "hard")
                raise _spent_out(passed, whole, wall)
        for meter in ticket.meters:
            meter.used(0, -tokens, now)
        ticket.spending.reserved.add(tokens, cost)

    def release(self, hold: Hold) -> None:
        assert self._shared is not None
        self._shared.end(hold)

    def _warn(self, tenant: Tenant, spending: Spending) -> None:
        assert tenant.budgets is not None
        for passed in spending.warnings(tenant.budgets, self.wall()):
            self._count(tenant, "soft")
            if (passed.period, passed.unit) not in spending.warned:
                spending.warned.add((passed.period, passed.unit))
                logger.warning("tenant %s has used %s", tenant.id, _used_of(passed))

    def _count(self, tenant: Tenant, kind: str) -> None:
        if self._metrics is not None:
            self._metrics.budget(tenant.id, kind)

    def _sweep(self, now: float) -> None:
        self._meters = {key: meter for key, meter in self._meters.items() if not meter.idle(now)}
        over = {key for key, spending in self._spending.items() if spending.over(self.wall())}
        self._spending = {key: spending for key, spending in self._spending.items() if key not in over}
        self._opened -= over


class Ticket:
    """One request's part of everything that is counted.

    The engine says with ``asks`` what each part of it comes to, and then waits for ``settle`` before it runs
    any. ``refused`` is what that ended with.
    """

    def __init__(
        self,
        quotas: Quotas,
        asked: Asked,
        meters: list[Meter],
        spending: Spending,
        tokens: int,
        cost: int,
        hold: Hold | None,
    ) -> None:
        self._quotas = quotas
        self.asked = asked
        self.meters = meters
        self.hold = hold
        self.spending = spending
        self.refused: ServerError | None = None
        self._reserved = tokens, cost
        self._used = 0, 0
        self._asks = 0, 0, 0  # prompt tokens, output tokens, sequences
        self._settled: tuple[tuple[int, int, int], int | None] = self._asks, None
        self._settling = asyncio.Lock()
        self.ended = False

    @property
    def limits_tokens(self) -> bool:
        tenant = self.asked.tenant
        return tenant.budgets is not None or any(limits.tokens_per_minute for _, limits in _limits(tenant))

    def asks(self, prompt_tokens: int, output_tokens: int, sequences: int) -> None:
        """One more part: its prompt, and the most that all its sequences together can answer."""
        prompt, output, parts = self._asks
        self._asks = prompt + prompt_tokens, output + output_tokens, parts + sequences

    async def settle(self) -> int | None:
        """Reserves what was asked for instead of what was estimated.

        How many tokens each sequence may have at most, if fewer than it asked for; only of what is elastic.
        TooManyRequests or Unavailable, as at admission, and then for every part.
        """
        async with self._settling:
            if self.refused is not None:
                raise self.refused
            if self._settled[0] != self._asks:
                try:
                    self._settled = self._asks, await self._settle(*self._asks)
                except ServerError as exc:
                    self.refused = exc
                    tokens, cost = self._reserved  # not at its end, lest the next is refused for it
                    self._reserved = 0, 0
                    await self._quotas.reserve(self, -tokens, -cost, 0)
                    raise
            return self._settled[1]

    async def _settle(self, prompt: int, output: int, sequences: int) -> int | None:
        try:
            await self._reserve(prompt, output)
        except TooManyRequests:
            held = self._used[0] + self._reserved[0]
            fewer = (held - prompt) // sequences if self.asked.elastic and sequences else 0
            if fewer < 1:
                raise
            await self._reserve(prompt, fewer * sequences)
            return fewer
        return None

    async def _reserve(self, prompt: int, output: int) -> None:
        if self.ended:
            return
        whole = prompt + output
        more = (
            whole - self._used[0] - self._reserved[0],
            self._quotas.cost(self.asked, prompt, 0, output) - self._used[1] - self._reserved[1],
        )
        if self.asked.endpoint == "embedding":  # which comes in pieces, of which more may follow
            more = max(0, more[0]), max(0, more[1])
        await self._quotas.reserve(self, *more, whole)
        self._reserved = self._reserved[0] + more[0], self._reserved[1] + more[1]

    def withdraw(self) -> None:
        """It will not run. It stays one of the minute's requests."""
        self._use(0, 0, last=True)

    def progressed(self, lease: Lease) -> None:
        used = lease.prompt_tokens, lease.cached_tokens, lease.output_tokens
        self._use(used[0] + used[2], self._quotas.cost(self.asked, *used))

    def closed(self, lease: Lease) -> None:
        asked, version = self.asked, self.asked.version
        used = lease.prompt_tokens, lease.cached_tokens, lease.output_tokens
        cost = self._quotas.cost(asked, *used)
        self._use(used[0] + used[2], cost, last=True)
        self._quotas.record(
            Usage(
                at=self._quotas.wall(),
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
                cost=cost,
            )
        )

    def _use(self, tokens: int, cost: int, *, last: bool = False) -> None:
        """In all, so far. What is used is taken from what was reserved; at the end the rest is given back."""
        new = tokens - self._used[0], cost - self._used[1]
        freed = tuple(
            held if last else min(held, max(0, more)) for held, more in zip(self._reserved, new, strict=True)
        )
        self._used = tokens, cost
        self.ended = last
        self._reserved = self._reserved[0] - freed[0], self._reserved[1] - freed[1]
        for meter in self.meters:
            meter.used(new[0], freed[0], self._quotas.clock())
            if last:
                meter.end()
        if self.hold is not None:
            self.hold.use(new[0], freed[0], new[1], freed[1])
            if last:
                self._quotas.release(self.hold)
        self.spending.reserved.add(-freed[0], -freed[1])
        self.spending.add(*new, self._quotas.wall())


def check_model(tenant: Tenant, adapter: str | None) -> None:
    """Forbidden (``model_not_allowed``) unless tenant and key may name it; None is the base model."""
    if not may_name(tenant, adapter):
        raise Forbidden("This model is not one that you may use.", code="model_not_allowed", param="model")


def may_name(tenant: Tenant, adapter: str | None) -> bool:
    return all(limits.allows(adapter) for _, limits in _limits(tenant))


def check_max_tokens(tenant: Tenant, max_tokens: int, param: str) -> None:
    """BadRequest (``max_tokens_too_large``) if one answer may not be so long."""
    for whose, limits in _limits(tenant):
        if limits.max_tokens is not None and max_tokens > limits.max_tokens:
            raise BadRequest(
                f"Answers for this {whose.split()[0]} may have at most {limits.max_tokens} tokens.",
                code="max_tokens_too_large",
                param=param,
            )


def _limits(tenant: Tenant) -> Iterator[tuple[str, KeyLimits]]:
    """("tenant" or "key <id>", its limits), where there are any."""
    if tenant.limits is not None:
        yield "tenant", tenant.limits
    if tenant.key is not None and tenant.key.limits is not None:
        yield f"key {tenant.key.id}", tenant.key.limits


def _scopes(tenant: Tenant) -> list[Scope]:
    """What Redis is asked about: the limits that count something."""
    return [
        Scope(tenant.id if whose == "tenant" else f"{tenant.id} {whose}", whose, limits)
        for whose, limits in _limits(tenant)
        if limits.requests_at_once or limits.requests_per_minute or limits.tokens_per_minute
    ]


def _limited(excess: Excess, whose: str) -> TooManyRequests:
    what = excess.limit.replace("_", " ")
    text = f"Rate limit reached for this {whose.split()[0]}: {excess.allowed} {what}."
    if excess.never:
        text += f" This request may use {excess.asked}; make it shorter, or ask for fewer max_tokens."
    else:
        text += f" Try again in {duration(excess.retry_after)}."
    return TooManyRequests(text, code="rate_limit_exceeded", retry_after=excess.retry_after)


def _spent_out(passed: Passed, tokens: int, now: datetime) -> TooManyRequests:
    text = f"You exceeded your current quota: {_used_of(passed)} used or reserved"
    if passed.used < passed.limit and passed.unit == "tokens":
        text += f", and this request may use {tokens} tokens; ask for fewer max_tokens"
    seconds = (ends(passed.period, now) - now).total_seconds()
    return TooManyRequests(f"{text}.", code="insufficient_quota", retry_after=seconds)


def _used_of(passed: Passed) -> str:
    return f"{passed.shown(passed.used)} of {passed.shown(passed.limit)} of the {passed.period}"
