"""Effects: carries out what the plan decides, against the engine.

One task, ``_page_forever``, talks to the engine about adapters, so paging operations reach it in the order in
which the plan decided them; everything else is a plain call on the event loop. A request holds a ``Lease``
from the moment it may run until its answer is closed:

    lease = await dispatcher.submit(ask, version)            waits for a slot and a place in the engine
    ...the engine runs the call, with the lease as its meter...
    await lease.close()                                      always, once; gives the place back
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, Protocol

from adapters.awake import LOOK_S
from adapters.errors import AdapterError, AdapterUnavailable
from adapters.model import Tier, Version
from server.engine.calls import EngineDied, PageOp
from server.engine.restarts import Restarts
from server.errors import ServerError, Unavailable
from server.metrics import Gauges, Metrics
from server.scheduling.engine_loop import EngineLoop, Pager
from server.scheduling.lease import Lease
from server.scheduling.nouns import (
    Activate,
    Ask,
    Capacity,
    Deactivate,
    Effect,
    Evict,
    Preempt,
    Quarantine,
    Refusal,
    Refuse,
    Run,
    Snapshot,
    Stage,
    Suspect,
    Warmed,
    by_tenant,
)
from server.scheduling.out_of_service import OutOfService
from server.scheduling.refusals import engine_stopped, error_of
from server.telemetry.by_adapter import Loaded

logger = logging.getLogger(__name__)

METER_POLL = 0.25


class Preparation(Protocol):
    """What comes before an engine reads a version."""

    def is_ready(self, version: Version) -> bool:
        """Whether there is nothing to do. Called on the event loop: cheap."""

    async def prepare(self, version: Version) -> None:
        """Does it. Raises the AdapterError that whoever waits for the version is told."""


class Dispatcher(EngineLoop):
    """Owns the plan. ``start`` before the first request, ``stop`` after the last.

    ``stall`` is how long the engine may leave a call unanswered, in seconds, before it counts as hung.
    ``restarts`` decides whether a lost engine is started again; if not, ``on_death`` is called once.
    ``on_fault`` is called with a version's key and a reason, for a version that ran in two losses in a row.
    ``suspects`` are the keys of those that ran in the last one, also in another process before this, and
    ``on_suspects`` is called with all of them whenever they change. ``on_losses`` is called at each loss with
    all that still matter, as ``Loss.as_json`` with times of ``time.time()``; ``losses`` are its own of
    before.
    ``preparation`` is done beside the engine, before it is asked to stage a version.
    """

    def __init__(
        self,
        pager: Pager,
        capacity: Capacity,
        metrics: Metrics,
        *,
        on_death: Callable[[EngineDied], None] = lambda _: None,
        stall: float = 60.0,
        restarts: Restarts | None = None,
        on_fault: Callable[[str, str], None] = lambda _version, _reason: None,
        on_suspects: Callable[[frozenset[str]], None] = lambda _versions: None,
        suspects: Collection[str] = (),
        on_losses: Callable[[list[dict[str, Any]]], None] = lambda _losses: None,
        losses: Sequence[dict[str, Any]] = (),
        preparation: Preparation | None = None,
    ) -> None:
        super().__init__(
            pager,
            capacity,
            metrics,
            on_death,
            stall,
            restarts or Restarts(0),
            on_fault,
            on_suspects,
            suspects,
            on_losses,
            losses,
        )
        self.out_of_service = OutOfService()
        self._preparation = preparation
        self._preparing: set[int] = set()  # loads that the engine has not heard of yet
        self._unprepared: AdapterError | None = None  # why, while the plan is told that a load failed
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._leases: dict[str, Lease] = {}
        self._warming: dict[str, set[asyncio.Future[None]]] = {}
        self._meters_to_poll = asyncio.Event()  # not set while no lease's meter has to be read
        self._loops: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._ids = itertools.count(1)

    def start(self) -> None:
        self._loops = [
            asyncio.create_task(self._page_forever(), name="loraplex-pager"),
            asyncio.create_task(self._poll_forever(), name="loraplex-meter"),
            asyncio.create_task(self._watch_forever(), name="loraplex-watchdog"),
        ]
        self._pager.watch(self._engine_lost)

    async def stop(self) -> None:
        # The engine ends next: whoever still asks it hears of that, and it is no loss.
        self._pager.watch(lambda exc: self._pager.detach(str(exc)))
        for loop in self._loops:
            loop.cancel()
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*self._loops, *self._tasks, return_exceptions=True)

    def new_id(self, tenant: str) -> str:
        """An id for an ``Ask``, which no other request of this process gets."""
        return f"{tenant}-{next(self._ids)}"

    async def submit(self, ask: Ask, version: Version | None = None, *, payer: str | None = None) -> Lease:
        """Waits until the request may run. Raises TooManyRequests, Unavailable, AdapterUnavailable or
        AdapterQuarantined.

        ``version`` is the one whose key ``ask`` has. ``payer`` is the tenant that the lease is of, where it
        waits in a queue that is not its own (``ask.tenant``).

        Cancelling the wait takes the request out of the queue; a lease that comes at the same moment is
        given back.
        """
        if self._died is not None:
            raise engine_stopped()
        self.out_of_service.check(version)
        tenant = payer or ask.tenant
        if version is not None:
            self._versions[version.key] = version
        lease = Lease(self, ask.id, tenant, version, self.now())
        lease.background = tenant != ask.tenant
        loaded = self._loaded.get(ask.version, 0.0) if ask.version else 0.0
        granted = asyncio.get_running_loop().create_future()
        self._waiting[ask.id] = granted
        self._leases[ask.id] = lease
        self._meters_to_poll.set()
        try:
            self._tell(self._plan.submitted, ask)
            await granted
        except asyncio.CancelledError:
            self._forget(ask.id)
            self._tell(self._plan.cancelled, ask.id)
            raise
        except BaseException:
            self._forget(ask.id)
            raise
        lease.queued_for = lease.age
        if ask.version:
            took = self._loaded.get(ask.version, 0.0) - loaded
            lease.load_seconds = min(lease.queued_for, max(0.0, took))
        self.metrics.queued(tenant, lease.queued_for)
        return lease

    async def wait_until_idle(self, timeout: float) -> bool:
        """True once nothing waits or runs; False if that is not so after ``timeout`` seconds.

        One in which this process stood still counts as little: nothing could end in it.
        """
        looked = self.now()
        while self._leases:
            if timeout <= 0:
                return False
            await asyncio.sleep(0.02)
            now = self.now()
            timeout, looked = timeout - min(now - looked, LOOK_S), now
        return True

    def drain(self) -> None:
        """Refuses requests that wait or come from now on; those that run go on to their end."""
        self._tell(self._plan.drain)

    def foreground(self) -> int:
        """How many requests wait or run that are not in the background."""
        return sum(not lease.background for lease in self._leases.values())

    @property
    def max_running(self) -> int:
        """How many sequences run in the engine at once."""
        return self._capacity.max_running

    def open_leases(self) -> list[Lease]:
        """What still runs, for closing at the end of a drain."""
        return [lease for id_, lease in self._leases.items() if id_ not in self._waiting]

    def in_use(self, keys: Collection[str]) -> bool:
        """True while a request waits for or runs on one of these versions."""
        return any(lease.version is not None and lease.version.key in keys for lease in self._leases.values())

    async def warm(self, version: Version, *, slot: bool, timeout: float) -> Tier:
        """Loads it without a request and says where it then is: in host memory, or with ``slot`` in a slot.

        Raises AdapterUnavailable if it cannot be loaded, and Unavailable if for ``timeout`` seconds no room
        was free or held by an idle adapter.
        """
        self.out_of_service.check(version)
        warmed = asyncio.get_running_loop().create_future()
        waiters = self._warming.setdefault(version.key, set())
        waiters.add(warmed)
        self._versions[version.key] = version
        try:
            self._tell(self._plan.warm, version.key, slot)
            async with asyncio.timeout(timeout):
                await warmed
        except TimeoutError:
            raise Unavailable(
                "There is no room for the adapter: all of it is pinned or in use.",
                code="no_room",
                retry_after=10,
            ) from None
        finally:
            waiters.discard(warmed)
            if not waiters and self._warming.get(version.key) is waiters:
                del self._warming[version.key]
                self._tell(self._plan.unwarm, version.key)
        return self.tier_of(version)

    def pin(self, version: Version, pinned: bool) -> None:
        """A pinned version is loaded whenever there is room, and then stays in its slot."""
        pinned = pinned and not self.out_of_service.has(version)
        if pinned:
            self._versions[version.key] = version
        self._tell(self._plan.pin, version.key, pinned, version.tenant)

    def quarantine(self, version: Version, reason: str) -> None:
        """Refuses what waits for ``version``, also what has run and was put aside. What runs goes on."""
        self._tell(self._plan.quarantined, version.key, reason)

    def retire(self, version: Version) -> None:
        """A version that no request can name any more: it leaves memory as soon as nothing runs on it."""
        self.retire_key(version.key)

    def retire_key(self, key: str) -> None:
        """As ``retire``, for what the engine knows a version by (``Version.key``)."""
        self._tell(self._plan.retire, key)

    def snapshot(self) -> Snapshot:
        return self._plan.snapshot()

    def resident(self) -> dict[str, tuple[Version, Tier]]:
        """What is in memory, by key, and where."""
        found = ((entry.version, entry.tier) for entry in self.snapshot().host)
        return {
            key: (self._versions[key], tier)
            for key, tier in found
            if tier is not Tier.DISK and key in self._versions
        }

    def numbered(self, version: Version) -> None:
        """``version`` has its number now; it may have been tried without one."""
        if version.key in self._versions:
            self._versions[version.key] = version

    def version(self, key: str) -> Version | None:
        """What is known under an engine's name, while it is in memory or waited for."""
        return self._versions.get(key)

    def tier_of(self, version: Version) -> Tier:
        return self._plan.tier_of(version.key)

    def served(self) -> dict[str, float]:
        """What each tenant with requests here has been charged for; see ``FairQueue.served``."""
        return self._plan.served()

    def known_digests(self) -> set[str]:
        """Digests of the files that are in memory, being loaded, or waited for by a request."""
        return {key.rpartition("@")[2] for key in self._plan.known_versions()}

    def gauges(self, versions_on_disk: int) -> Gauges:
        """``versions_on_disk``: all versions of the catalog, resident or not."""
        snapshot = self.snapshot()
        gpu = sum(1 for slot in snapshot.slots if slot.version is not None)
        host = sum(1 for entry in snapshot.host if entry.tier is not Tier.DISK)
        return Gauges(
            adapters={
                Tier.DISK: max(0, versions_on_disk - host),
                Tier.HOST: max(0, host - gpu),
                Tier.GPU: gpu,
            },
            slots=self._capacity.gpu_slots,
            slots_used=gpu,
            host_slots=self._capacity.host_slots,
            queued=by_tenant(snapshot.queued),
            running=by_tenant(snapshot.running),
            in_step_loads=self._in_step_loads,
            busy_slots=sum(bool(slot.running) for slot in snapshot.slots),
            most_running=self._capacity.max_running,
            loaded=[
                Loaded(
                    self._versions[entry.version], "gpu" if entry.tier is Tier.GPU else "cpu", entry.pinned
                )
                for entry in snapshot.host
                if entry.tier is not Tier.DISK and entry.version in self._versions
            ],
        )

    # --- effects ---------------------------------------------------------------------------------

    def _apply(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Stage(version=key, load_id=load_id):
                    version = self._versions[key]
                    self._staging.add(load_id)
                    self._version_of[load_id] = key
                    op = PageOp("stage", load_id, key, str(version.path))
                    if self._preparation is None or self._preparation.is_ready(version):
                        self._page(op)
                    else:
                        self._preparing.add(load_id)
                        self.spawn(self._stage_prepared(self._preparation, version, op))
                case Activate(load_id=load_id):
                    self._page(PageOp("activate", load_id))
                case Deactivate(load_id=load_id):
                    self.metrics.evicted("gpu")
                    self._page(PageOp("deactivate", load_id))
                case Evict(load_id=load_id):
                    self.metrics.evicted("host")
                    self._staging.discard(load_id)
                    self._version_of.pop(load_id, None)
                    if load_id in self._preparing:
                        self._preparing.discard(load_id)
                    else:
                        self._page(PageOp("evict", load_id))
                case Run(id=id_) if id_ in self._waiting:
                    granted = self._waiting.pop(id_)
                    if not granted.done():  # a cancelled wait gives its place back by itself
                        granted.set_result(None)
                case Run(id=id_):
                    self.spawn(self._resume(self._leases[id_]))
                case Preempt(id=id_):
                    self.spawn(self._preempt(self._leases[id_]))
                case Refuse(id=id_) if id_ in self._waiting:
                    granted = self._waiting.pop(id_)
                    if not granted.done():
                        granted.set_exception(
                            self._error_of(effect.reason, effect.retry_after, effect.detail)
                        )
                case Refuse(id=id_):
                    lease = self._leases[id_]
                    lease.failure = self._error_of(effect.reason, detail=effect.detail)
                    self.spawn(self._fail_preempted(lease, lease.failure.message))
                case Quarantine(version=key, reason=why):
                    logger.error("%s is taken to end the engine: %s", key, why)
                    self._on_fault(key, why)
                case Suspect(versions=versions):
                    self._on_suspects(versions)
                case Warmed(version=key, refusal=refusal):
                    for warmed in self._warming.pop(key, ()):
                        if warmed.done():
                            continue
                        if refusal is None:
                            warmed.set_result(None)
                        else:
                            warmed.set_exception(self._error_of(refusal))

    def _error_of(
        self, reason: Refusal, retry_after: float | None = None, detail: str = ""
    ) -> ServerError | AdapterError:
        if self._unprepared is not None and reason is Refusal.ADAPTER_UNAVAILABLE:
            return self._unprepared
        return self._died_error() or error_of(reason, retry_after, detail)

    async def _stage_prepared(self, preparation: Preparation, version: Version, op: PageOp) -> None:
        """Stages once all is prepared; not if the load was given up, or the engine lost, meanwhile."""
        failure: AdapterError | None = None
        try:
            await preparation.prepare(version)
        except AdapterError as exc:
            failure = exc
        except Exception as exc:
            logger.exception("%s could not be prepared", version.key)
            failure = AdapterUnavailable(f"The adapter could not be loaded: {type(exc).__name__}.")
        if op.load_id not in self._staging or op.load_id not in self._preparing:
            self._preparing.discard(op.load_id)
            return
        self._preparing.discard(op.load_id)
        if failure is None:
            self._page(op)
            return
        self._staging.discard(op.load_id)
        self._unprepared = failure
        try:
            self._failed("stage", op.load_id, failure.message)
        finally:
            self._unprepared = None

    async def _preempt(self, lease: Lease) -> None:
        losses = self._losses
        try:
            paused = lease.work is not None and await lease.work.pause()
        except EngineDied:
            return  # the pager's task meets it too
        if lease.closing or losses != self._losses:
            return  # its end is on its way to the plan, or there; or the plan knows that the engine was lost
        if paused:
            logger.info("preempted %r", lease)
            self.metrics.preempted(lease.tenant)
            self._tell(self._plan.preempted, lease.id)
        else:
            self._tell(self._plan.preempt_refused, lease.id)

    async def _resume(self, lease: Lease) -> None:
        assert lease.work is not None, f"{lease!r} goes on, but it never began"
        with contextlib.suppress(EngineDied):
            await lease.work.resume()

    async def _fail_preempted(self, lease: Lease, reason: str) -> None:
        """A preempted request cannot go on: whoever reads its answer gets an error, and closes the lease."""
        assert lease.work is not None, f"{lease!r} breaks off, but it never began"
        with contextlib.suppress(EngineDied):
            await lease.work.give_up(reason)

    async def _poll_forever(self) -> None:
        """Reads the meters of answers that are not streamed; they report nothing before their end."""
        while True:
            await self._meters_to_poll.wait()
            await asyncio.sleep(METER_POLL)
            silent = [lease for lease in self._leases.values() if not lease.streamed]
            if not silent:
                self._meters_to_poll.clear()
            for lease in silent:
                if lease.work is not None:
                    lease.work.poll()

    def _died_error(self) -> Unavailable | None:
        return None if self._died is None else engine_stopped()

    def _given_up(self) -> None:
        for lease in self.open_leases():
            lease.failure = engine_stopped()
            if lease.work is not None and lease.work.paused:
                self.spawn(self._fail_preempted(lease, str(engine_stopped())))

    # --- what leases tell ------------------------------------------------------------------------

    def progressed(self, lease: Lease) -> None:
        """``lease`` has consumed more."""
        if lease.account is not None:
            lease.account.progressed(lease)
        if lease.id in self._leases:
            self._tell(self._plan.progressed, lease.id, lease.prompt_tokens, lease.output_tokens)

    def closed(self, lease: Lease) -> None:
        """``lease`` has ended, and its work with it."""
        self._forget(lease.id)
        if lease.account is not None:
            lease.account.closed(lease)
        self.metrics.ended(lease.tenant, lease.outcome)
        self.metrics.by_adapter.ended(lease, lease.outcome)
        self._tell(self._plan.finished, lease.id, lease.outcome == "completed")

    def _forget(self, id_: str) -> None:
        self._waiting.pop(id_, None)
        self._leases.pop(id_, None)

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Runs ``work`` as a task; keeps a reference, or it might be collected half-way."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
