"""The parts of a running server, for the routes: one typed object in ``app.state``."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

from fastapi import Depends, Request

from adapters.database.database import Database
from adapters.model import Version
from adapters.store.blobs import BlobStore
from adapters.store.cache import Cache
from adapters.store.replicas import Replicas
from server.accounts.authentication import Authentication
from server.accounts.people import People
from server.accounts.tenants import Tenants
from server.accounts.usage import UsageWriter
from server.accounts.wrong_keys import WrongKeys
from server.batches.runner import Runner
from server.engine.engine import Engine
from server.http.counted import LastCounted
from server.http.held import HeldBodies
from server.inference.completion import Completions
from server.limits.redis import RedisLedger
from server.metrics import Metrics
from server.publishing.intake import Intake
from server.publishing.publish import Publishing
from server.rollouts.judge import Judge
from server.scheduling.dispatcher import Dispatcher
from server.scheduling.lease import Lease
from server.scheduling.refusals import shutting_down
from server.settings import Settings
from server.telemetry.spans import Tracer

logger = logging.getLogger(__name__)

# Largest bodies that may be in memory: of one customer, and in all.
BODIES_EACH, BODIES = 32, 128
# Seconds between two lines of the log about what a drain waits for.
DRAIN_TOLD_S = 30.0
# What has to be in the database before the server ends has so long, in seconds.
LASTING_S = 5.0


class Peers(Protocol):
    """Those who have slots and queues in the place of this process; see ``server.fleet.residency``."""

    async def residency(self, own: Mapping[str, Any], events: int, replica: str | None) -> dict[str, Any]: ...


@dataclass
class Services:
    """Everything that a route may need; complete once the server has started.

    ``redis_ledger`` is None where limits are counted in this process alone, ``cache`` where all files are in
    the data folder. ``started`` is in seconds since 1970. ``peers`` are a gateway's replicas, ``tracer`` is
    None where no traces are sent.
    ``on_drain`` goes on beside what still runs.
    """

    settings: Settings
    database: Database
    blobs: BlobStore
    tenants: Tenants
    people: People
    authentication: Authentication
    wrong_keys: WrongKeys
    redis_ledger: RedisLedger | None
    usage_writer: UsageWriter
    engine: Engine
    metrics: Metrics
    dispatcher: Dispatcher
    completions: Completions
    batches: Runner
    publishing: Publishing
    judge: Judge
    intake: Intake
    replicas: Replicas
    cache: Cache | None
    started: int
    peers: Peers | None = None
    on_drain: Callable[[], Coroutine[Any, Any, None]] | None = None
    tracer: Tracer | None = None
    draining: bool = False
    # A replica that is held against golden probes before it takes requests; see ``server.fleet.verifying``.
    verifying: bool = False
    # Tenants with a call of their own under way that only one at a time is allowed of.
    busy: set[str] = field(default_factory=set)
    holding: asyncio.Lock = field(default_factory=asyncio.Lock)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    lasting: set[asyncio.Task[None]] = field(default_factory=set)
    checking: asyncio.Task[dict[str, str]] | None = None
    counted: LastCounted = field(default_factory=LastCounted)
    bodies: HeldBodies = field(init=False)

    def __post_init__(self) -> None:
        largest = self.settings.max_body_bytes
        self.bodies = HeldBodies(BODIES_EACH * largest, BODIES * largest)

    def held(self, version: Version) -> AbstractAsyncContextManager[None]:
        """The files of ``version`` are in the data folder for as long as the block, or are known to be gone.

        Raises as ``Cache.prepare``.
        """
        return self.cache.held(version) if self.cache is not None else nullcontext()

    async def ready_checks(self, look: Callable[[Services], Awaitable[dict[str, str]]]) -> dict[str, str]:
        """What ``look`` says, once for all who ask at the same time: it writes to the disk."""
        if self.checking is None or self.checking.done():
            self.checking = asyncio.ensure_future(look(self))
        return await asyncio.shield(self.checking)

    def in_background(self, work: Coroutine[Any, Any, None], *, lasting: bool = False) -> asyncio.Task[None]:
        """Lets ``work`` go on after the answer. ``cancel_tasks`` ends what is left when the server stops;
        what is ``lasting`` has ``LASTING_S`` then."""
        task = asyncio.create_task(work)
        for tasks in (self.tasks, self.lasting) if lasting else (self.tasks,):
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        return task

    async def cancel_tasks(self) -> None:
        """Ends the background work and waits until it has ended."""
        if self.lasting:
            await asyncio.wait(self.lasting, timeout=LASTING_S)
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def drain(self) -> None:
        """Makes the server not ready at once; cuts requests that still run after ``drain_timeout``."""
        self.draining = True
        began, left = time.monotonic(), self.settings.drain_timeout
        logger.info(
            "draining: %s; what runs is cut after DRAIN_TIMEOUT, %g s", _under_way(self.dispatcher), left
        )
        self.dispatcher.drain()
        if self.on_drain is not None:
            self.in_background(self.on_drain())
        while not await self.dispatcher.wait_until_idle(min(left, DRAIN_TOLD_S)):
            left -= DRAIN_TOLD_S
            if left > 0:
                logger.info("still draining: %s; %g s are left", _under_way(self.dispatcher), left)
                continue
            leases = self.dispatcher.open_leases()
            logger.warning("cut %d requests that were still running", len(leases))
            await asyncio.gather(*map(_cut, leases))
            break
        logger.info("drained, after %.1f s", time.monotonic() - began)


def _under_way(dispatcher: Dispatcher) -> str:
    leases = dispatcher.open_leases()
    customers = len({lease.tenant for lease in leases})
    return f"{len(leases)} requests of {customers} customers run"


async def _cut(lease: Lease) -> None:
    """What waits for an engine that is just being started again has to be told; vLLM ends all others."""
    if lease.work is not None and lease.work.paused:
        lease.failure = lease.failure or shutting_down()
        await lease.work.give_up(lease.failure.message)
    await lease.close("cut")


def services_of(request: Request) -> Services:
    """The services of the app that ``request`` came to; no request comes before they are complete."""
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


ServicesOf = Annotated[Services, Depends(services_of)]
