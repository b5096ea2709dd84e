"""The plan and the engine, kept together: events, time, paging, reconciliation, and another engine after a
loss.

One task, ``_page_forever``, talks to the engine about adapters, so that paging operations reach it in the
order in which the plan decided them. Time limits are timers of the event loop: they hold while the engine
does not answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from typing import Any, Protocol, TypeVar, TypeVarTuple

from adapters.awake import AwakeTimeout
from adapters.model import Version
from server.engine.calls import EngineDied, EngineHung, PageOp, PageReport, PageResult, WorkerReport
from server.engine.restarts import Restarts
from server.metrics import Metrics
from server.scheduling.event_log import KEPT, LOGGED, EventLog, as_lines
from server.scheduling.lease import Lease
from server.scheduling.nouns import Capacity, Effect
from server.scheduling.plan import Plan
from server.scheduling.reconcile import corrections
from server.scheduling.refusals import engine_restarting

logger = logging.getLogger(__name__)

# Each poll is one short call between engine steps; a load takes tens of milliseconds and more.
STAGE_POLL = 0.005
# Where workers say by themselves that a load has ended, in case they could not.
STAGE_LOOK = 0.25
RECONCILE_EVERY = 5.0
# The part of the time that an engine has for an answer after which it counts as one that may hang.
SILENT_AFTER = 0.25
WATCH_EVERY = 0.5
# Versions that ran when the engine was lost, as the log names them.
NAMED = 20
# Of the event loop, before a check of the plan lets others run; and between two such slices.
CHECK_SLICE, CHECK_PAUSE = 0.0005, 0.01

Ts = TypeVarTuple("Ts")
T = TypeVar("T")


class Pager(Protocol):
    """What the dispatcher needs of an engine."""

    async def page(self, ops: Sequence[PageOp]) -> PageReport: ...
    async def report(self) -> WorkerReport: ...

    async def check(self) -> None:
        """Raises EngineDied if the engine's process has ended; asks nothing of the engine."""

    def watch(self, on_lost: Callable[[EngineDied], None]) -> None:
        """Call ``on_lost`` as soon as the engine is known to be dead, before anybody else notices."""

    def listen(self, on_notice: Callable[[], None]) -> bool:
        """Call ``on_notice`` when a load has been read, or could not be. False: it has to be asked for."""

    def detach(self, reason: str) -> None:
        """The engine is given up: pause every call that can go on in the next one, and end all others."""

    async def kill(self) -> None:
        """End the engine's processes, whatever state they are in."""

    async def restart(self) -> None:
        """Start the engine again, without any adapter. Raises whatever keeps it from starting."""


class EngineLoop:
    """Owns the plan. A subclass carries effects out (``_apply``) and holds the leases."""

    def __init__(
        self,
        pager: Pager,
        capacity: Capacity,
        metrics: Metrics,
        on_death: Callable[[EngineDied], None],
        stall: float,
        restarts: Restarts,
        on_fault: Callable[[str, str], None],
        on_suspects: Callable[[frozenset[str]], None],
        suspects: Collection[str],
        on_losses: Callable[[list[dict[str, Any]]], None],
        losses: Sequence[dict[str, Any]],
    ) -> None:
        self.metrics = metrics
        self._pager = pager
        self._capacity = capacity
        self._plan = Plan(capacity, suspects=suspects)
        self._on_death = on_death
        self._stall = stall
        self._restarts = restarts
        self._on_fault = on_fault
        self._on_suspects = on_suspects
        self._on_losses = on_losses
        self._losses_before = losses
        self._died: EngineDied | None = None  # it is not started any more
        self._lost: EngineDied | None = None  # it is gone, and may be started again
        self._lost_event = asyncio.Event()
        self._losses = 0
        self._came_back = 0
        self._events = EventLog(Plan(capacity, suspects=suspects))
        self._recorded = False  # in the log, at the first check that failed
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self._versions: dict[str, Version] = {}
        self._version_of: dict[int, str] = {}  # by load
        self._loaded: dict[str, float] = {}  # by version: seconds that its loads have taken so far
        self._ops: list[PageOp] = []
        self._staging: set[int] = set()
        self._pager_wake = asyncio.Event()
        self._in_step_loads = 0
        self._reconcile_soon = False
        self._unanswered: set[asyncio.Future[Any]] = set()  # calls; see SILENT_AFTER

    def _apply(self, effects: Sequence[Effect]) -> None:
        raise NotImplementedError

    def open_leases(self) -> list[Lease]:
        """What runs, or is preempted."""
        raise NotImplementedError

    def _given_up(self) -> None:
        raise NotImplementedError

    def now(self) -> float:
        """The event loop's clock, so that a simulated loop simulates the plan's time too."""
        return asyncio.get_running_loop().time()

    @property
    def is_restarting(self) -> bool:
        """Whether the engine is gone and being started again, or given up."""
        return self._lost is not None

    @property
    def is_silent(self) -> bool:
        """Whether a call has waited for the engine's answer for a good part of the time that it has."""
        return bool(self._unanswered)

    @property
    def restarts(self) -> int:
        """How often the engine was lost and came back, since the server started."""
        return self._came_back

    def last_events(self, number: int) -> list[dict[str, Any]]:
        """The last events that the plan was told, as JSON; see ``event_log.replay``."""
        return self._events.last(number)

    async def recorded(self, number: int) -> dict[str, Any]:
        """The same as ``events``; where that is all that is kept, also the ``checkpoint`` before the first of
        them; see ``checkpoints.restored``.
        """
        if number < KEPT:
            return {"events": self.last_events(number)}
        found: dict[str, Any] = {}
        with self._events.recording() as recording:
            steps = recording.steps(found)
            while _some(steps):
                await asyncio.sleep(0)
        return found

    def _tell(self, event: Callable[[float, *Ts], list[Effect]], *args: *Ts) -> None:
        """Tell the plan an event, carry out what follows, and be there when the next deadline is due."""
        now = self.now()
        self._events.add(event.__name__, now, args)
        self._apply(event(now, *args))
        self._set_timer()

    def _set_timer(self) -> None:
        """Not in the pager's task: time limits hold while the engine does not answer."""
        deadline = self._plan.next_deadline()
        if deadline == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = deadline
        if deadline is not None:
            self._timer = asyncio.get_running_loop().call_at(max(deadline, self.now() + 0.001), self._tick)

    def _tick(self) -> None:
        self._timer = self._timer_at = None
        try:
            self._tell(self._plan.tick)
        except Exception:
            logger.exception("a tick of the plan failed")
            self._reconcile_soon = True

    def _page(self, op: PageOp) -> None:
        self._ops.append(op)
        self._pager_wake.set()

    async def _page_forever(self) -> None:
        while True:
            try:
                await self._page_until_lost()
            except EngineDied as exc:
                self._engine_lost(exc)
            except Exception as exc:  # a defect; without this task every request would wait in silence
                logger.exception("paging failed")
                self._engine_lost(EngineDied(f"paging failed: {exc!r}"))
            if not await self._heal():
                return

    async def _page_until_lost(self) -> None:
        """Carry out what the plan decides, in order, until the engine is lost, which raises EngineDied."""
        reconcile_at = self.now() + RECONCILE_EVERY
        look = STAGE_LOOK if self._pager.listen(self._pager_wake.set) else STAGE_POLL
        while True:
            if self._lost is not None:
                raise self._lost
            if not self._ops:
                pause = look if self._staging else max(0.001, reconcile_at - self.now())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._pager_wake.wait()
            self._pager_wake.clear()
            await self._page_once()
            if not self._ops and (self._reconcile_soon or self.now() >= reconcile_at):
                self._reconcile_soon = False
                reconcile_at = self.now() + RECONCILE_EVERY
                await self._reconcile()
                await self._check_while_idle()

    async def _answer_of(self, call: Coroutine[Any, Any, T]) -> T:
        """What the engine answers to ``call``. Raises EngineHung if it does not within ``stall`` seconds in
        which this process ran, and EngineDied if it is lost meanwhile: a dead engine leaves calls
        unanswered.
        """
        if self._lost is not None:
            call.close()
            raise self._lost
        answering = asyncio.ensure_future(call)
        losing = asyncio.ensure_future(self._lost_event.wait())
        silence = self._stall * SILENT_AFTER
        try:
            for seconds in (silence, self._stall - silence):
                with contextlib.suppress(TimeoutError):
                    async with AwakeTimeout(seconds):
                        await asyncio.wait({answering, losing}, return_when=asyncio.FIRST_COMPLETED)
                if answering.done():
                    return answering.result()  # or what it raised
                if self._lost is not None:
                    raise self._lost
                self._unanswered.add(answering)
            raise EngineHung(f"the engine did not answer for {self._stall:g} s")
        finally:
            self._unanswered.discard(answering)
            losing.cancel()
            answering.cancel()

    async def _watch_forever(self) -> None:
        while True:
            await asyncio.sleep(WATCH_EVERY)
            if self._lost is None:
                try:
                    await self._pager.check()
                except EngineDied as exc:
                    self._engine_lost(exc)

    async def _page_once(self) -> None:
        ops, self._ops = self._ops, []
        if not ops and not self._staging:
            return
        report = await self._answer_of(self._pager.page(ops))
        for op, result in zip(ops, report.results, strict=True):
            self._paged(op, result)
        for staged in report.staged:
            self._staging.discard(staged.load_id)
            if staged.error is None:
                self.metrics.staged(staged.seconds)
                self._took(staged.load_id, staged.seconds)
                self._tell(self._plan.staged, staged.load_id, staged.size_bytes, staged.ranks)
            else:
                self._failed("stage", staged.load_id, staged.error)

    def _paged(self, op: PageOp, result: PageResult) -> None:
        if op.verb == "activate":
            if result.error is None:
                self.metrics.activated(result.seconds)
                self._took(op.load_id, result.seconds)
                self._tell(self._plan.activated, op.load_id)
            else:
                self._failed("activate", op.load_id, result.error)
        elif result.error is not None:
            if op.verb == "stage":
                self._staging.discard(op.load_id)
                self._failed("stage", op.load_id, result.error)
            else:
                self._note_failed(op.verb, op.load_id, result.error)

    def _took(self, load_id: int, seconds: float) -> None:
        """A step of a load has taken ``seconds``."""
        if (version := self._version_of.get(load_id)) is not None:
            self._loaded[version] = self._loaded.get(version, 0.0) + seconds

    def _name(self, key: str | None) -> str:
        """Whose version it is and which, for the log; ``key`` where no more is known of it."""
        if key is None:
            return "a version that is not known any more"
        found = self._versions.get(key)
        return f"{found.tenant}/{found.adapter}@{found.number}" if found is not None else key

    def _note_failed(self, step: str, load_id: int, error: str) -> None:
        whose = self._name(self._version_of.get(load_id))
        logger.error("%s of load %d (%s) failed: %s", step, load_id, whose, error)
        self._reconcile_soon = True

    def _failed(self, step: str, load_id: int, error: str) -> None:
        self._note_failed(step, load_id, error)
        if step == "stage":
            self.metrics.load_failed("stage")
            self._tell(self._plan.stage_failed, load_id, error)
        else:
            self.metrics.load_failed("activate")
            self._tell(self._plan.activation_failed, load_id, error)

    async def _reconcile(self) -> None:
        """Compares what the plan believes with what the worker holds; the worker is right."""
        snapshot = self._plan.snapshot()
        report = await self._answer_of(self._pager.report())
        self._in_step_loads = report.in_step_loads
        if self._ops:
            return  # the plan moved on meanwhile; there is another look in a few seconds
        wrong = corrections(snapshot, report, self._staging)
        for load_id in wrong.lost:
            logger.error("load %d is gone from the engine", load_id)
            self._tell(self._plan.lost, load_id)
        for load_id in wrong.unknown:
            logger.error("load %d is in the engine, but nobody knows it", load_id)
            self._page(PageOp("evict", load_id))
        for load_id in wrong.slots:
            logger.error("load %d holds a slot that was taken from it", load_id)
            self._page(PageOp("deactivate", load_id))
        needed = self._plan.known_versions()
        self._versions = {key: v for key, v in self._versions.items() if key in needed}
        self._loaded = {key: seconds for key, seconds in self._loaded.items() if key in needed}

    async def _check_while_idle(self) -> None:
        """Check the plan's invariants in small slices, for as long as nothing happens.

        A failure is logged with the state and the last events, and counted; the next reconciliation then
        corrects what the worker knows better. Requests go on.
        """
        before, steps = self._events.total, self._plan.check_steps()
        try:
            while self._events.total == before and _some(steps):
                await asyncio.sleep(CHECK_PAUSE)
        except Exception as exc:
            self.metrics.plan_check_failed()
            last = self._events.last(LOGGED)
            logger.exception("the plan is wrong: %r; %r; last events: %s", exc, self._plan, last)
            self._reconcile_soon = True
            await self._log_recording()

    async def _log_recording(self) -> None:
        """Log all that is kept, once in a process: a defect that stays would fill the disk."""
        if self._recorded:
            return
        self._recorded = True
        try:
            for line in as_lines(await self.recorded(KEPT)):
                logger.error("%s", line)
        except Exception:
            logger.exception("the events could not be recorded")

    # --- healing ---------------------------------------------------------------------------------

    def _engine_lost(self, exc: EngineDied) -> None:
        """Everything that depends on the engine stops, at once and in one step of the event loop."""
        if self._lost is not None:
            return
        self._lost = exc
        self._losses += 1
        logger.critical("the engine died: %s", exc)
        running = [lease for lease in self.open_leases() if not lease.closing]
        self._pager.detach(str(exc))
        self._ops.clear()
        self._staging.clear()
        self._version_of.clear()
        kept = []
        for lease in running:
            if lease.work is not None and lease.work.paused:
                kept.append(lease.id)
            else:
                lease.failure = engine_restarting()
        ahead = time.time() - self.now()
        if before := self._losses_before:
            known = [dict(loss, at=min(loss["at"] - ahead, self.now())) for loss in before]
            self._losses_before = ()
            self._tell(self._plan.recall, known)
        self._log_running()
        self._tell(self._plan.engine_stopped, kept)
        self._on_losses([dict(loss.as_json(), at=loss.at + ahead) for loss in self._plan.losses])
        self._lost_event.set()
        self._pager_wake.set()

    def _log_running(self) -> None:
        """Which versions run at a loss, for whoever looks before one of them is found to be the reason."""
        slots = self._plan.snapshot().slots
        ran = sorted(self._name(slot.version) for slot in slots if slot.version and slot.running)
        told = ", ".join(ran[:NAMED]) if ran else "no version of an adapter"
        more = f" and {len(ran) - NAMED} more" if len(ran) > NAMED else ""
        logger.critical("when the engine was lost there ran: %s%s", told, more)

    async def _heal(self) -> bool:
        """Start the engine again until it stays; False once it has been lost too often."""
        assert self._lost is not None
        while True:
            wait = self._restarts.lost(self.now())
            if wait is None:
                self._give_up(self._lost)
                return False
            try:
                await self._pager.kill()
                await asyncio.sleep(wait)
                began = self.now()
                await self._pager.restart()
            except Exception:
                logger.exception("the engine did not start again")
                continue
            self.metrics.engine_restarted("hang" if isinstance(self._lost, EngineHung) else "death")
            self._came_back += 1
            logger.warning("the engine is back, after %.1f s", self.now() - began + wait)
            self._lost = None
            self._lost_event.clear()
            self._tell(self._plan.engine_started)
            return True

    def _give_up(self, exc: EngineDied) -> None:
        self._died = exc
        logger.critical("the engine is not started again: %s", exc)
        self._on_death(exc)
        self._tell(self._plan.drain)  # or it would start them when something ends
        self._given_up()


def _some(steps: Iterator[None]) -> bool:
    """Take steps for ``CHECK_SLICE`` seconds; False once there are no more."""
    end = time.perf_counter() + CHECK_SLICE
    return any(time.perf_counter() >= end for _ in steps)
