"""How many sequences of a customer with a ``max_running`` run at once, at all replicas together.

    place = await places.take(tenant, sequences)    before its request is sent to a replica
    place.give_back()                               once, however the request ended

A replica sees only what runs there. So a gateway takes the places of such a request from the ledger that
counts limits, which gateways share where that is in Redis: what is reserved there and never used is a place.
It is renewed with the limits, and free again when a gateway that died has not renewed it for
``server.limits.redis.LEASE_S`` seconds.

A request that finds no place waits here, those of one customer in order of arrival. Whoever is first looks
again every few hundredths of a second, at no fixed beat, so that no gateway is always the first to see what
another one gave back. The ledger knows who is first at each gateway, and since when it waits: nobody takes
what those who came before it need; see ``server.limits.line``.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from adapters.awake import AwakeTimeout
from server.accounts.tenants import Tenant
from server.accounts.terms import KeyLimits
from server.limits.budget import Amount
from server.limits.ledger import PLACES, Entry, Ledger, Refused, Scope, TenantBudget
from server.limits.line import Waits
from server.scheduling.nouns import Refusal
from server.scheduling.refusals import error_of, shutting_down

logger = logging.getLogger(__name__)

# Between two looks of whoever is first; longer where more customers wait than that, so that a gateway asks
# its ledger at most 500 times a second.
LOOK_EVERY_S, OFTEN_FOR = 0.02, 10
# Whoever has not looked for so many beats is passed, as one whose gateway died.
LOOKS = 50
RETRY_SOONEST, RETRY_LATEST = 1.0, 60.0  # seconds


@dataclass(slots=True, eq=False)
class Waiter:
    """One request that found no place. ``first`` is set when those before it have left."""

    since: float
    first: asyncio.Event


class Place:
    """What a request holds; nothing of a customer without ``max_running``."""

    def __init__(self, ledger: Ledger, entry: Entry | None) -> None:
        self._ledger = ledger
        self._entry = entry

    def give_back(self) -> None:
        """May be repeated."""
        entry, self._entry = self._entry, None
        if entry is not None:
            self._ledger.use(entry, Amount(), entry.reserved)
            self._ledger.close(entry)


class Places:
    """``timeout`` is how many seconds a request may wait here, ``max_queued`` how many requests of a customer
    that has no such limit of its own.
    """

    def __init__(self, ledger: Ledger, *, timeout: float, max_queued: int) -> None:
        self._ledger = ledger
        self._timeout = timeout
        self._max_queued = max_queued
        self._lines: dict[str, deque[Waiter]] = {}
        self._stopping = asyncio.Event()

    def waiting(self) -> dict[str, int]:
        """How many requests of each customer wait here; as ``Tenant.queue`` names them."""
        return {name: len(line) for name, line in self._lines.items()}

    async def take(self, tenant: Tenant, sequences: int) -> Place:
        """Waits for as many places as the request has ``sequences``. One that has more than ``max_running``
        runs when nothing else of its customer does.

        TooManyRequests (``rate_limit_exceeded``) where ``max_queued`` wait already; Unavailable after
        ``timeout`` seconds (``queue_timeout``), where the gateway stops (``shutting_down``), and while the
        ledger cannot be reached (``limits_unavailable``).
        """
        most = tenant.max_running
        if most is None:
            return Place(self._ledger, None)
        scope = Scope(f"{tenant.queue} {PLACES}", PLACES, KeyLimits(tokens_per_minute=most))
        wanted = Amount(min(sequences, most))
        budget = TenantBudget.none(scope.name)

        clock = asyncio.get_running_loop().time
        id_, came = secrets.token_hex(12), clock()
        asked = False

        def waits() -> Waits:
            return Waits(id_, clock() - came, LOOKS * self._beat)

        async def taken() -> Place | None:
            nonlocal asked
            asked = True
            try:
                return Place(self._ledger, await self._ledger.reserve([scope], budget, wanted, waits()))
            except Refused:
                return None

        place = None
        try:
            if tenant.queue not in self._lines:
                place = await taken()
            if place is None:
                place = await self._in_line(tenant, taken)
            return place
        finally:
            if asked and place is None:
                self._ledger.leave(scope, waits())

    def drain(self) -> None:
        """What waits is told that the server is shutting down."""
        self._stopping.set()

    async def _in_line(self, tenant: Tenant, taken: Callable[[], Awaitable[Place | None]]) -> Place:
        clock = asyncio.get_running_loop().time
        line = self._lines.setdefault(tenant.queue, deque())
        most = self._max_queued if tenant.max_queued is None else tenant.max_queued
        if len(line) >= most:
            after = min(max(clock() - line[0].since, RETRY_SOONEST), RETRY_LATEST)
            raise error_of(Refusal.QUEUE_FULL, after)
        mine = Waiter(clock(), asyncio.Event())
        line.append(mine)
        if line[0] is mine:
            mine.first.set()
        limit = AwakeTimeout(self._timeout)
        try:
            async with limit:
                await mine.first.wait()
                while not self._stopping.is_set():
                    if (place := await taken()) is not None:
                        return place
                    await self._until_next_look()
            raise shutting_down()
        except TimeoutError:
            if not limit.expired():
                raise
            raise error_of(Refusal.QUEUE_TIMEOUT, min(self._timeout, RETRY_LATEST)) from None
        finally:
            line.remove(mine)
            if line:
                line[0].first.set()
            else:
                del self._lines[tenant.queue]

    @property
    def _beat(self) -> float:
        """Seconds from one look to the next, on average."""
        return LOOK_EVERY_S * max(1.0, len(self._lines) / OFTEN_FOR)

    async def _until_next_look(self) -> None:
        try:
            async with asyncio.timeout(random.uniform(0.5, 1.5) * self._beat):  # noqa: S311 - no secret
                await self._stopping.wait()
        except TimeoutError:
            pass
