"""Effects: carries out what the plan decides, against the engine.

One task, ``_page_forever``, talks to the engine about adapters, so paging operations reach it in the order in
which the plan decided them; everything else is a plain call on the event loop. A request holds a ``Lease``
from the moment it may run until its answer is closed:

    lease = await dispatcher.submit(tenant, version, ...)    waits for a slot and a place in the engine
    ...the engine runs the call, with the lease as its meter...
    await lease.close()                                      always, once; gives the place back
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Protocol

from adapters.errors import AdapterUnavailable
from adapters.model import Tier, Version
from server.engine.calls import Admission, EngineDied, PageOp, PageReport, PageResult, WorkerReport
from server.errors import TooManyRequests, Unavailable
from server.metrics import Gauges, Metrics, Outcome, TokenTimes
from server.scheduling.nouns import (
    Activate,
    Ask,
    Capacity,
    Deactivate,
    Effect,
    Evict,
    Preempt,
    Refusal,
    Refuse,
    Run,
    Snapshot,
    Stage,
    Warmed,
)
from server.scheduling.plan import Plan

logger = logging.getLogger(__name__)

# Each poll is one short call between engine steps; a load takes tens of milliseconds and more.
STAGE_POLL = 0.005
RECONCILE_EVERY = 5.0
METER_POLL = 0.25
# Tokens between two reports of one request to the plan: fine enough for fairness, cheap enough to stream.
REPORT_EVERY = 8


class Pager(Protocol):
    """What the dispatcher needs of an engine."""

    async def page(self, ops: Sequence[PageOp]) -> PageReport: ...
    async def report(self) -> WorkerReport: ...


class Work(Protocol):
    """What runs in the engine with a lease; see ``server.engine.engine.Engine`` for each."""

    async def abort(self) -> None: ...
    async def pause(self) -> bool: ...
    async def resume(self) -> None: ...
    async def give_up(self, reason: str) -> None: ...
    def poll(self) -> None: ...


class Account(Protocol):
    """Who is told what a lease has used, as it is produced; see ``server.limits.reservation.Reservation``."""

    def progressed(self, lease: Lease) -> None: ...
    def closed(self, lease: Lease) -> None: ...


class Lease:
    """A slot and a place in the engine, and the meter of what was consumed with it.

    The dispatcher may take both back for a while and return them later: the ``work`` is paused meanwhile.
    Its totals are cumulative: ``prompt_tokens``, ``output_tokens`` and ``cached_tokens`` over all parts.
    ``queued_for`` and ``first_token_after`` are seconds since arrival; an answer that is not streamed shows
    its first token at the next poll of its meter.
    """

    def __init__(
        self, owner: Dispatcher, id_: str, tenant: str, version: Version | None, since: float
    ) -> None:
        self.id = id_
        self.tenant = tenant
        self.version = version
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.cached_tokens = 0
        self.outcome: Outcome = "completed"
        self.streamed = False
        self.work: Work | None = None
        self.account: Account | None = None
        self.admission: Admission | None = None
        self.queued_for = 0.0
        self.first_token_after: float | None = None
        self._owner = owner
        self._since = since
        self._parts: dict[str, tuple[int, int, int]] = {}
        self._counted = (0, 0, 0)  # prompt, cached and output tokens that others know of
        self._last_token = 0.0
        self._token_times: TokenTimes | None = None
        self._gaps: list[tuple[float, int]] = []  # seconds before each of so many tokens, not yet told
        self._closing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        what = self.version.key if self.version else "base"
        return f"<Lease {self.id} {self.tenant} {what} {self.prompt_tokens}+{self.output_tokens} tokens>"

    def progressed(self, part: str, prompt_tokens: int, output_tokens: int, cached_tokens: int) -> None:
        """The engine's report on one part of the call; totals that go backwards are ignored."""
        prompt, output, cached = self._parts.get(part, (0, 0, 0))
        if output_tokens < output or (output_tokens == output and prompt_tokens <= prompt):
            return
        self._parts[part] = max(prompt, prompt_tokens), output_tokens, max(cached, cached_tokens)
        self.prompt_tokens += max(0, prompt_tokens - prompt)
        self.output_tokens += output_tokens - output
        self.cached_tokens += max(0, cached_tokens - cached)
        if self.first_token_after is None and output_tokens:
            self.first_token_after = self.age
        if self.streamed and output_tokens > output:
            self._time_tokens(output_tokens - output)
        counted = self._counted[2]
        if counted == 0 or self.output_tokens - counted >= REPORT_EVERY:
            self._report()

    async def close(self, outcome: Outcome | None = None) -> None:
        """Ends the call in the engine if it still runs, then gives slot and place back. Idempotent.

        Runs to its end even if the caller is cancelled meanwhile.
        """
        if self._closing is None:
            if outcome is not None:
                self.outcome = outcome
            self._closing = self._owner._spawn(self._close())
        await asyncio.shield(self._closing)

    @property
    def age(self) -> float:
        """Seconds since it was asked for."""
        return self._owner.now() - self._since

    @property
    def closing(self) -> bool:
        return self._closing is not None

    async def _close(self) -> None:
        try:
            if self.work is not None and self.outcome != "completed":
                await self.work.abort()
        finally:
            self._report()
            self._owner._closed(self)

    def _report(self) -> None:
        now = (self.prompt_tokens, self.cached_tokens, self.output_tokens)
        new = (after - before for after, before in zip(now, self._counted, strict=True))
        self._owner.metrics.consumed(self.tenant, *new)
        if self._token_times is not None:
            for gap, tokens in self._gaps:
                for _ in range(tokens):
                    self._token_times.gap(gap)
            self._gaps.clear()
        self._counted = now
        self._owner._progressed(self)

    def _time_tokens(self, new: int) -> None:
        now = self._owner.now()
        if self._token_times is None:
            self._token_times = self._owner.metrics.token_times(self.tenant)
            self._token_times.first(now - self._since)
        else:
            self._gaps.append(((now - self._last_token) / new, new))
        self._last_token = now


class Dispatcher:
    """Owns the plan. ``start`` before the first request, ``stop`` after the last."""

    def __init__(
        self,
        pager: Pager,
        capacity: Capacity,
        metrics: Metrics,
        *,
        on_death: Callable[[EngineDied], None] = lambda _: None,
    ) -> None:
        self.metrics = metrics
        self._pager = pager
        self._capacity = capacity
        self._plan = Plan(capacity)
        self._on_death = on_death
        self._died: EngineDied | None = None
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._leases: dict[str, Lease] = {}
        self._versions: dict[str, Version] = {}
        self._warming: dict[str, set[asyncio.Future[None]]] = {}
        self._ops: list[PageOp] = []
        self._staging: set[int] = set()
        self._pager_wake = asyncio.Event()
        self._meters_to_poll = asyncio.Event()  # not set while no lease's meter has to be read
        self._loops: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._ids = itertools.count(1)
        self._in_step_loads = 0
        self._reconcile_soon = False

    def start(self) -> None:
        self._loops = [
            asyncio.create_task(self._page_forever(), name="loraplex-pager"),
            asyncio.create_task(self._poll_forever(), name="loraplex-meter"),
        ]

    async def stop(self) -> None:
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, *self._tasks, return_exceptions=True)

    def now(self) -> float:
        """The event loop's clock, so that a simulated loop simulates the plan's time too."""
        return asyncio.get_running_loop().time()

    async def submit(
        self,
        tenant: str,
        version: Version | None,
        *,
        prompt_tokens: int,
        max_tokens: int,
        sequences: int = 1,
        weight: float = 1.0,
        max_queued: int | None = None,
        max_running: int | None = None,
        resumable: bool = False,
    ) -> Lease:
        """Waits until the request may run. Raises TooManyRequests, Unavailable or AdapterUnavailable.

        Cancelling the wait takes the request out of the queue; a lease that comes at the same moment is
        given back.
        """
        if self._died is not None:
            raise Unavailable("The engine has stopped; the server is restarting.", code="engine_stopped")
        ask = Ask(
            id=f"{tenant}-{next(self._ids)}",
            tenant=tenant,
            version=version.key if version else None,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            sequences=sequences,
            weight=weight,
            max_queued=max_queued,
            max_running=max_running,
            resumable=resumable,
        )
        if version is not None:
            self._versions[version.key] = version
        lease = Lease(self, ask.id, tenant, version, self.now())
        granted = asyncio.get_running_loop().create_future()
        self._waiting[ask.id] = granted
        self._leases[ask.id] = lease
        self._meters_to_poll.set()
        try:
            self._on_event(self._plan.submitted(self.now(), ask))
            await granted
        except asyncio.CancelledError:
            self._forget(ask.id)
            self._on_event(self._plan.cancelled(self.now(), ask.id))
            raise
        except BaseException:
            self._forget(ask.id)
            raise
        lease.queued_for = lease.age
        self.metrics.queued(tenant, lease.queued_for)
        return lease

    async def wait_until_idle(self, timeout: float) -> bool:
        """True once nothing waits or runs; False if that is not so after ``timeout`` seconds."""
        deadline = self.now() + timeout
        while self._leases:
            if self.now() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    def drain(self) -> None:
        """Refuses what waits and what comes; what runs goes on."""
        self._on_event(self._plan.drain(self.now()))

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
        warmed = asyncio.get_running_loop().create_future()
        waiters = self._warming.setdefault(version.key, set())
        waiters.add(warmed)
        self._versions[version.key] = version
        try:
            self._on_event(self._plan.warm(self.now(), version.key, slot))
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
                self._on_event(self._plan.unwarm(self.now(), version.key))
        return self.tier_of(version)

    def pin(self, version: Version, pinned: bool) -> None:
        """A pinned version is loaded whenever there is room, and then stays in its slot."""
        if pinned:
            self._versions[version.key] = version
        self._on_event(self._plan.pin(self.now(), version.key, pinned, version.tenant))

    def retire(self, version: Version) -> None:
        """A version that no request can name any more: it leaves memory as soon as nothing runs on it."""
        self._on_event(self._plan.retire(self.now(), version.key))

    def snapshot(self) -> Snapshot:
        return self._plan.snapshot()

    def tier_of(self, version: Version) -> Tier:
        return self._plan.tier_of(version.key)

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
            queued=snapshot.queued,
            running=snapshot.running,
            in_step_loads=self._in_step_loads,
        )

    # --- effects ---------------------------------------------------------------------------------

    def _apply(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Stage(version=key, load_id=load_id):
                    version = self._versions[key]
                    self._staging.add(load_id)
                    self._page(PageOp("stage", load_id, key, str(version.path)))
                case Activate(load_id=load_id):
                    self._page(PageOp("activate", load_id))
                case Deactivate(load_id=load_id):
                    self.metrics.evicted("gpu")
                    self._page(PageOp("deactivate", load_id))
                case Evict(load_id=load_id):
                    self.metrics.evicted("host")
                    self._staging.discard(load_id)
                    self._page(PageOp("evict", load_id))
                case Run(id=id_) if id_ in self._waiting:
                    granted = self._waiting.pop(id_)
                    if not granted.done():  # a cancelled wait gives its place back by itself
                        granted.set_result(None)
                case Run(id=id_):
                    self._spawn(self._resume(self._leases[id_]))
                case Preempt(id=id_):
                    self._spawn(self._preempt(self._leases[id_]))
                case Refuse(id=id_) if id_ in self._waiting:
                    granted = self._waiting.pop(id_)
                    if not granted.done():
                        granted.set_exception(_refusal(effect.reason, effect.retry_after))
                case Refuse(id=id_):
                    self._spawn(self._fail_preempted(self._leases[id_], str(_refusal(effect.reason))))
                case Warmed(version=key, refusal=refusal):
                    for warmed in self._warming.pop(key, ()):
                        if warmed.done():
                            continue
                        if refusal is None:
                            warmed.set_result(None)
                        else:
                            warmed.set_exception(_refusal(refusal))

    async def _preempt(self, lease: Lease) -> None:
        try:
            paused = lease.work is not None and await lease.work.pause()
        except EngineDied:
            return  # the pager's task meets it too
        if lease.closing:
            return  # its end is on its way to the plan, or there
        if paused:
            logger.info("preempted %r", lease)
            self.metrics.preempted(lease.tenant)
            self._on_event(self._plan.preempted(self.now(), lease.id))
        else:
            self._on_event(self._plan.preempt_refused(self.now(), lease.id))

    async def _resume(self, lease: Lease) -> None:
        assert lease.work is not None, f"{lease!r} goes on, but it never began"
        with contextlib.suppress(EngineDied):
            await lease.work.resume()

    async def _fail_preempted(self, lease: Lease, reason: str) -> None:
        """A preempted request cannot go on: whoever reads its answer gets an error, and closes the lease."""
        assert lease.work is not None, f"{lease!r} breaks off, but it never began"
        with contextlib.suppress(EngineDied):
            await lease.work.give_up(reason)

    def _on_event(self, effects: Sequence[Effect]) -> None:
        """An event from outside the pager's task, which looks anew at what is due."""
        self._apply(effects)
        self._pager_wake.set()

    def _page(self, op: PageOp) -> None:
        self._ops.append(op)

    async def _page_forever(self) -> None:
        reconcile_at = self.now() + RECONCILE_EVERY
        while True:
            if not self._ops:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._pause(reconcile_at)):
                        await self._pager_wake.wait()
            self._pager_wake.clear()
            try:
                await self._page_once()
                if not self._ops and (self._reconcile_soon or self.now() >= reconcile_at):
                    self._reconcile_soon = False
                    reconcile_at = self.now() + RECONCILE_EVERY
                    await self._reconcile()
                self._apply(self._plan.tick(self.now()))
            except EngineDied as exc:
                self._give_up(exc)
                return
            except Exception as exc:  # a defect; without this task every request would wait in silence
                logger.exception("paging failed")
                self._give_up(EngineDied(f"paging failed: {exc!r}"))
                return

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

    def _pause(self, reconcile_at: float) -> float:
        """Seconds until there is something to do without being woken."""
        if self._staging:
            return STAGE_POLL
        deadline = self._plan.next_deadline()
        due = reconcile_at if deadline is None else min(deadline, reconcile_at)
        return max(0.001, due - self.now())

    async def _page_once(self) -> None:
        ops, self._ops = self._ops, []
        if not ops and not self._staging:
            return
        report = await self._pager.page(ops)
        for op, result in zip(ops, report.results, strict=True):
            self._paged(op, result)
        for staged in report.staged:
            self._staging.discard(staged.load_id)
            if staged.error is None:
                self.metrics.staged(staged.seconds)
                self._apply(self._plan.staged(self.now(), staged.load_id, staged.size_bytes))
            else:
                self._failed("stage", staged.load_id, staged.error)

    def _paged(self, op: PageOp, result: PageResult) -> None:
        if op.verb == "activate":
            if result.error is None:
                self.metrics.activated(result.seconds)
                self._apply(self._plan.activated(self.now(), op.load_id))
            else:
                self._failed("activate", op.load_id, result.error)
        elif result.error is not None:
            if op.verb == "stage":
                self._staging.discard(op.load_id)
                self._failed("stage", op.load_id, result.error)
            else:
                logger.error("%s of load %d failed: %s", op.verb, op.load_id, result.error)
                self._reconcile_soon = True

    def _failed(self, step: str, load_id: int, error: str) -> None:
        logger.error("%s of load %d failed: %s", step, load_id, error)
        self._reconcile_soon = True
        if step == "stage":
            self.metrics.load_failed("stage")
            self._apply(self._plan.stage_failed(self.now(), load_id, error))
        else:
            self.metrics.load_failed("activate")
            self._apply(self._plan.activation_failed(self.now(), load_id, error))

    async def _reconcile(self) -> None:
        """Compares what the plan believes with what the worker holds; the worker is right."""
        self._plan.check()
        snapshot = self._plan.snapshot()
        believed = {entry.load_id for entry in snapshot.host}
        in_slots = {slot.load_id for slot in snapshot.slots if slot.load_id is not None}
        report = await self._pager.report()
        self._in_step_loads = report.in_step_loads
        if self._ops:
            return  # the plan moved on meanwhile; there is another look in a few seconds
        gone = (believed - report.host - self._staging) | in_slots.difference(report.slots)
        for load_id in gone:
            logger.error("load %d is gone from the engine", load_id)
            self._apply(self._plan.lost(self.now(), load_id))
        for load_id in (report.host - believed - self._staging) | (report.host & gone):
            logger.error("load %d is in the engine, but nobody knows it", load_id)
            self._page(PageOp("evict", load_id))
        for load_id in (believed - in_slots).intersection(report.slots):
            logger.error("load %d holds a slot that was taken from it", load_id)
            self._page(PageOp("deactivate", load_id))
        needed = self._plan.known_versions()
        self._versions = {key: v for key, v in self._versions.items() if key in needed}

    def _give_up(self, exc: EngineDied) -> None:
        self._died = exc
        logger.critical("the engine died: %s", exc)
        for granted in self._waiting.values():
            if not granted.done():
                granted.set_exception(Unavailable("The engine has stopped.", code="engine_stopped"))
        self._on_death(exc)
        self._apply(self._plan.drain(self.now()))  # or it would start them when something ends

    # --- what leases tell ------------------------------------------------------------------------

    def _progressed(self, lease: Lease) -> None:
        if lease.account is not None:
            lease.account.progressed(lease)
        if lease.id in self._leases:
            effects = self._plan.progressed(self.now(), lease.id, lease.prompt_tokens, lease.output_tokens)
            if effects:
                self._on_event(effects)

    def _closed(self, lease: Lease) -> None:
        self._forget(lease.id)
        if lease.account is not None:
            lease.account.closed(lease)
        self.metrics.ended(lease.tenant, lease.outcome)
        self._on_event(self._plan.finished(self.now(), lease.id))

    def _forget(self, id_: str) -> None:
        self._waiting.pop(id_, None)
        self._leases.pop(id_, None)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """A task that nobody but this dispatcher needs to hold on to."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _refusal(reason: Refusal, retry_after: float | None = None) -> Exception:
    match reason:
        case Refusal.QUEUE_FULL:
            return TooManyRequests(
                "Too many of your requests are waiting already; send the next ones later.",
                code="rate_limit_exceeded",
                retry_after=retry_after,
            )
        case Refusal.QUEUE_TIMEOUT:
            return Unavailable(
                "The server is too busy: the request waited too long for its turn.",
                code="queue_timeout",
                retry_after=retry_after,
            )
        case Refusal.ADAPTER_UNAVAILABLE:
            return AdapterUnavailable("The adapter could not be loaded; try again in a moment.")
        case Refusal.DRAINING:
            return Unavailable("The server is shutting down.", code="shutting_down", retry_after=5)
