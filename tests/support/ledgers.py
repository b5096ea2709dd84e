"""Ledgers in a real Redis, and what asks them: customers with limits, reservations, servers that share."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from server.accounts.tenants import Tenant
from server.accounts.terms import Budget, Budgets, TenantLimits
from server.limits.budget import Amount
from server.limits.ledger import TenantBudget
from server.limits.quotas import Quotas
from server.limits.redis import RedisLedger
from server.limits.reservation import Reservation
from server.scheduling.lease import Lease
from tests.support.services import redis
from tests.support.site import Site
from tests.support.tiny import fake_site
from tests.support.world import tenant


async def nothing_recorded(_since: datetime, _until: datetime) -> Amount:
    return Amount()


NO_BUDGET = TenantBudget.none("none")


@asynccontextmanager
async def opened(url: str | None = None, **options: Any) -> AsyncIterator[RedisLedger]:
    shared = RedisLedger(url or redis(), **options)
    await shared.open()
    try:
        yield shared
    finally:
        await shared.stop()


def limited(**limits: int) -> Tenant:
    return tenant(f"t{uuid.uuid4().hex[:12]}", limits=TenantLimits(**limits))


def budgeted(**day: float) -> Tenant:
    return tenant(f"t{uuid.uuid4().hex[:12]}", budgets=Budgets(day=Budget(**day)))


def used(ticket: Reservation, tokens: int, *, ended: bool = False) -> None:
    """It has produced so many tokens in all."""
    lease = SimpleNamespace(
        prompt_tokens=0, cached_tokens=0, output_tokens=tokens, outcome="completed", queued_for=0.0,
        first_token_after=0.0, age=1.0, load_seconds=0.0, code=None, finish="stop",
    )  # fmt: skip
    (ticket.closed if ended else ticket.progressed)(cast("Lease", lease))


async def begun(quotas: Quotas, who: Tenant) -> Reservation:
    return await quotas.open(who, None, endpoint="chat", request_id="r")


async def admitted(quotas: Quotas, who: Tenant, tokens: int = 10) -> Reservation:
    reservation = await begun(quotas, who)
    await reservation.reserve(0, tokens)
    return reservation


@asynccontextmanager
async def two_servers(folder: Path) -> AsyncIterator[tuple[Site, Site]]:
    """On one database and one Redis."""
    both = {"limits_redis_url": redis(), "database_url": f"sqlite+aiosqlite:///{folder / 'both.db'}"}
    async with fake_site(folder / "a", **both) as one, fake_site(folder / "b", **both) as two:
        yield one, two


class Gate:
    """Redis's clients go through it; closed, it keeps connections open and says nothing."""

    def __init__(self) -> None:
        self.open, self._writers = True, set[asyncio.StreamWriter]()

    async def start(self) -> str:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"redis://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/0"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = redis().split("://")[1].split("/")[0].rpartition("@")[2].partition(":")
        there, back = await asyncio.open_connection(host, int(port or 6379))
        self._writers |= {writer, back}
        await asyncio.gather(self._pipe(reader, back), self._pipe(there, writer))

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                if self.open:
                    writer.write(data)
        finally:
            writer.close()

    def close(self) -> None:
        self.server.close()
        for writer in self._writers:
            writer.close()
