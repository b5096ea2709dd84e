"""Decisions: what to load, what to run, what to refuse. Pure: events in, effects out, no I/O, no clock.

A request's life:

    submitted -> waits in its tenant's queue -> Run -> progressed ... -> finished
                   |  its version is staged and activated meanwhile       |
                   +-> Refuse (queue full, waited too long, adapter       |
                   |       unavailable, shutting down)                    |
                   +-> cancelled                                          |
                   +<--- preempted (stopped; it has no time limit)   <----+ Preempt

A request runs when its version has a slot that is not draining and the engine has room; the order among
those is ``FairQueue``'s. Which versions have slots is ``Residency``'s. After every event the plan settles:
it takes one decision after the other until none is left, and returns what they say in that order.

Room in the engine is ``max_running`` sequences. A request too large for what is free may be passed by
smaller ones for ``slot_patience``; then nothing else starts until it fits. One that is larger than
``max_running`` runs alone.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from typing import Any

from adapters.model import Tier
from server.scheduling.evidence import Loss
from server.scheduling.fair_queue import FairQueue, Request
from server.scheduling.loads import Load
from server.scheduling.nouns import (
    Ask,
    Capacity,
    Effect,
    Preempt,
    Quarantine,
    Refusal,
    Refuse,
    Run,
    Snapshot,
    State,
    Suspect,
    Warmed,
)
from server.scheduling.residency import Residency
from server.scheduling.residency_checks import check_steps as check_residency
from server.scheduling.suspects import Suspects


class Plan:
    """The scheduler: one owner of all queues, slots and counters. ``nouns.Scheduler`` says what each event
    means.

    Load ids count up from ``first_load_id``. ``suspects`` are versions that ran when the engine before was
    lost; see ``server.scheduling.suspects``, also for ``evidence``, which knows the losses before this.
    """

    def __init__(self, capacity: Capacity, first_load_id: int = 1, suspects: Collection[str] = ()) -> None:
        self._capacity = capacity
        self._effects: list[Effect] = []
        self._queue = FairQueue(self._counted)
        self._suspects = Suspects(self._queue.gate, self._suspect, suspects)
        self._residency = Residency(
            capacity, first_load_id, self._emit, self._suspects.gate, self._queue.counter
        )
        self._waiting: OrderedDict[str, Request] = OrderedDict()  # by arrival
        self._preempted: dict[str, Request] = {}  # they wait too, without a time limit
        self._running: dict[str, tuple[Request, Load | None]] = {}
        self._lost: set[str] = set()  # of these, what ran in an engine that is gone and has not ended yet
        self._sequences = 0
        self._held_for: Request | None = None
        self._draining = False
        self._stopped = False  # there is no engine
        self._preemptions = 0

    # Events; ``nouns.Scheduler`` has their meaning.

    # --- requests ------------------------------------------------------------------------------------

    def submitted(self, now: float, ask: Ask) -> list[Effect]:
        if ask.id in self._waiting or ask.id in self._running or ask.id in self._preempted:
            raise ValueError(f"there is a request {ask.id} already")
        self._expire(now)
        limit = self._capacity.max_queued if ask.max_queued is None else ask.max_queued
        queued = self._queue.queued(ask.tenant)
        if self._draining:
            self._emit(Refuse(ask.id, Refusal.DRAINING, None))
        elif queued >= limit:
            after = self._queue.retry_after(ask.tenant, now)
            self._emit(Refuse(ask.id, Refusal.QUEUE_FULL, after, f"{queued} requests wait already"))
        else:
            self._waiting[ask.id] = self._queue.push(ask, now)
            if ask.version is not None:
                self._residency.want(ask.version, ask.tenant, now)
        return self._settle(now)

    def cancelled(self, now: float, id: str) -> list[Effect]:
        request = self._waiting.get(id)
        if request is not None:
            self._drop(request)
        return self.finished(now, id, completed=False)

    def progressed(self, now: float, id: str, prompt_tokens: int, output_tokens: int) -> list[Effect]:
        request, load = self._running.get(id, (None, None))
        if request is not None:
            before = request.tokens_left
            more = max(0, output_tokens - request.output_tokens)
            request.output_tokens += more
            self._queue.charge(request, prompt_tokens, output_tokens)
            if load is not None:
                self._residency.progress(load, before - request.tokens_left)
                if id not in self._lost:
                    self._suspects.progressed(load.version, more)
        first = self._queue.first()  # nothing but the order can have changed, or a suspect is cleared
        settles = self._effects or (first is not None and self._fits(first))
        return self._settle(now) if settles else []

    def finished(self, now: float, id: str, completed: bool = True) -> list[Effect]:
        if id in self._waiting:
            raise ValueError(f"request {id} finished, but it never ran")
        request, load = self._running.pop(id, (None, None))
        if request is not None:
            self._sequences -= request.ask.sequences
            self._queue.end(request)
            if load is not None:
                self._residency.end(load, request, now)
                self._leave(id, load, now, completed=completed)
        elif id in self._preempted:
            self._drop(self._preempted[id])
        return self._settle(now)

    def preempted(self, now: float, id: str) -> list[Effect]:
        if id in self._running:
            self._preemptions += 1
            self._put_back(id, now)
        return self._settle(now)

    def preempt_refused(self, now: float, id: str) -> list[Effect]:
        request, load = self._running.get(id, (None, None))
        if request is not None and load is not None and not request.not_preemptible:
            request.not_preemptible = True
            self._residency.preempt_refused(load)
        return self._settle(now)

    # --- adapters ------------------------------------------------------------------------------------

    def staged(self, now: float, load_id: int, size_bytes: int = 0, ranks: int = 0) -> list[Effect]:
        self._residency.staged(now, load_id, size_bytes, ranks)
        return self._settle(now)

    def stage_failed(self, now: float, load_id: int, detail: str) -> list[Effect]:
        version = self._residency.stage_failed(load_id)
        self._refuse_version(version, Refusal.ADAPTER_UNAVAILABLE, detail)
        return self._settle(now)

    def activated(self, now: float, load_id: int) -> list[Effect]:
        self._residency.activated(now, load_id)
        return self._settle(now)

    def activation_failed(self, now: float, load_id: int, detail: str) -> list[Effect]:
        version = self._residency.activation_failed(load_id)
        self._refuse_version(version, Refusal.ADAPTER_UNAVAILABLE, detail)
        return self._settle(now)

    def lost(self, now: float, load_id: int) -> list[Effect]:
        self._residency.lost(now, load_id)
        return self._settle(now)

    def engine_stopped(self, now: float, resumable: Collection[str]) -> list[Effect]:
        self._stopped = True
        ran = {id: load.version for id, (_, load) in self._running.items() if load and id not in self._lost}
        for id in resumable:
            if id in self._running:
                self._put_back(id, now)
        self._residency.engine_stopped()
        self._lost = set(self._running)
        for version, reason in self._suspects.lost(set(ran.values()), now).items():
            self._refuse_version(version, Refusal.QUARANTINED, reason)
            self._emit(Quarantine(version, reason))
        return self._settle(now)

    def recall(self, now: float, losses: Sequence[Mapping[str, Any]]) -> list[Effect]:
        self._suspects.evidence.recall(map(Loss.of_json, losses))
        return []

    def engine_started(self, now: float) -> list[Effect]:
        self._stopped = False
        self._suspects.evidence.started(now)
        self._residency.engine_started()
        return self._settle(now)

    def quarantined(self, now: float, version: str, reason: str) -> list[Effect]:
        self._refuse_version(version, Refusal.QUARANTINED, reason)
        return self._settle(now)

    def pin(self, now: float, version: str, pinned: bool, tenant: str) -> list[Effect]:
        self._residency.pin(version, tenant if pinned else None)
        return self._settle(now)

    def retire(self, now: float, version: str) -> list[Effect]:
        self._residency.retire(version)
        return self._settle(now)

    def warm(self, now: float, version: str, slot: bool) -> list[Effect]:
        if self._draining:
            self._emit(Warmed(version, Refusal.DRAINING))
        else:
            self._residency.warm(version, slot)
        return self._settle(now)

    def unwarm(self, now: float, version: str) -> list[Effect]:
        self._residency.unwarm(version)
        return self._settle(now)

    # --- time ----------------------------------------------------------------------------------------

    def drain(self, now: float) -> list[Effect]:
        self._draining = True
        self._residency.prefetch.stop()
        for request in list(self._waiting.values()):
            self._refuse(request, Refusal.DRAINING, None)
        return self._settle(now)

    def tick(self, now: float) -> list[Effect]:
        return self._settle(now)

    def next_deadline(self) -> float | None:
        deadlines = [self._residency.next_deadline()]
        if self._waiting:
            deadlines.append(self._timeout(next(iter(self._waiting.values()))))
        return min((at for at in deadlines if at is not None), default=None)

    # --- decisions -----------------------------------------------------------------------------------

    def _settle(self, now: float) -> list[Effect]:
        self._expire(now)
        while not self._stopped and self._decide(now):
            pass
        effects, self._effects = self._effects, []
        return effects

    def _decide(self, now: float) -> bool:
        """Take one decision, the most urgent first; False if there is none to take."""
        if self._admit(now):
            return True
        held = self._held_for
        spared = None if held is None else held.ask.version
        return (
            self._residency.sweep(now)
            or self._residency.grant(now)
            or self._residency.stage(now)
            or self._residency.drain(now, spared)
            or self._preempt(now, spared)
        )

    def _preempt(self, now: float, spared: str | None) -> bool:
        chosen = self._residency.preempt(now, spared)
        if chosen is None:
            return False
        for id, (_, load) in self._running.items():
            if load is chosen:
                self._emit(Preempt(id))
        return True

    def _admit(self, now: float) -> bool:
        self._held_for = None
        request = self._queue.first()
        if request is not None and not self._fits(request):
            request = self._passing(request, now)
        if request is None:
            return False
        self._run(request, now)
        return True

    def _passing(self, large: Request, now: float) -> Request | None:
        """A smaller request that may run before ``large``, which does not fit."""
        if large.passed_at is not None and now - large.passed_at >= self._capacity.slot_patience:
            self._held_for = large
            return None
        if self._sequences >= self._capacity.max_running:
            return None
        smaller = self._queue.first(self._fits)
        if smaller is not None and large.passed_at is None:
            large.passed_at = now
        return smaller

    def _fits(self, request: Request) -> bool:
        return not self._sequences or self._sequences + request.ask.sequences <= self._capacity.max_running

    def _run(self, request: Request, now: float) -> None:
        version = request.ask.version
        load = None if version is None else self._residency.begin(version, request, now)
        if version is not None:
            self._suspects.began(version, now)
        self._queue.start(request, now)
        self._forget_waiting(request)
        self._running[request.ask.id] = (request, load)
        self._sequences += request.ask.sequences
        self._emit(Run(request.ask.id))

    def _put_back(self, id: str, now: float) -> None:
        """A running request waits again, where its arrival puts it."""
        request, load = self._running.pop(id)
        self._sequences -= request.ask.sequences
        self._queue.put_back(request)
        self._preempted[id] = request
        if load is not None:
            self._residency.end(load, request, now)
            self._leave(id, load, now, completed=False)
            self._residency.want(load.version, request.ask.tenant, now)

    def _leave(self, id: str, load: Load, now: float, *, completed: bool) -> None:
        """A request that ran on ``load`` does so no more."""
        if id in self._lost:
            self._lost.remove(id)
        else:
            self._suspects.ended(load.version, now, finished=completed)

    def _expire(self, now: float) -> None:
        self._residency.expire(now)
        while self._waiting:
            oldest = next(iter(self._waiting.values()))
            if self._timeout(oldest) > now:
                return
            after = self._queue.retry_after(oldest.ask.tenant, now)
            self._refuse(oldest, Refusal.QUEUE_TIMEOUT, after)

    def _timeout(self, request: Request) -> float:
        return request.arrived + self._capacity.queue_timeout

    def _refuse_version(self, version: str, reason: Refusal, detail: str) -> None:
        for request in self._queue.waiting(version):
            self._refuse(request, reason, None, detail)

    def _refuse(self, request: Request, reason: Refusal, after: float | None, detail: str = "") -> None:
        self._drop(request)
        self._emit(Refuse(request.ask.id, reason, after, detail))

    def _drop(self, request: Request) -> None:
        """It leaves the queue and will not run."""
        self._queue.remove(request)
        self._forget_waiting(request)

    def _forget_waiting(self, request: Request) -> None:
        if self._waiting.pop(request.ask.id, None) is None:
            del self._preempted[request.ask.id]
        version = request.ask.version
        if version is not None and not self._queue.waits(version):
            self._residency.unwant(version)

    def _emit(self, effect: Effect) -> None:
        self._effects.append(effect)

    def _suspect(self, versions: frozenset[str]) -> None:
        self._emit(Suspect(versions))

    def _counted(self, tenant: str) -> None:
        self._residency.indices.for_slot.rerank(tenant)

    # --- what is seen --------------------------------------------------------------------------------

    @property
    def losses(self) -> tuple[Loss, ...]:
        """Those of the engine that still say something about versions, oldest first."""
        return self._suspects.evidence.losses

    def tier_of(self, version: str) -> Tier:
        """Where ``version`` is."""
        return self._residency.state(version).tier

    def known_versions(self) -> set[str]:
        """The versions that an effect may name unless a request for another is submitted."""
        return self._residency.known()

    def served(self) -> dict[str, float]:
        """What each tenant with requests here has been charged for; see ``FairQueue.served``."""
        return self._queue.served()

    def snapshot(self) -> Snapshot:
        """The whole state at this moment, for operators and metrics."""
        tenants = list(self._queue.tenants())
        return Snapshot(
            slots=self._residency.slots(),
            host=self._residency.entries(),
            queued={tenant.id: tenant.queued for tenant in tenants if tenant.queued},
            running={tenant.id: tenant.running for tenant in tenants if tenant.running},
            counters={tenant.id: tenant.counter for tenant in tenants},
            aside=len(self._preempted),
            drains=self._residency.drains,
            preemptions=self._preemptions,
            draining=self._draining,
        )

    def __repr__(self) -> str:
        """``x+`` is on its way, ``x~`` drains, ``x!`` is overdue; ``x:2`` has two running requests."""
        room = f"running={self._sequences}/{self._capacity.max_running} waiting={len(self._waiting)}"
        room += f" preempted={len(self._preempted)}" if self._preempted else ""
        held = "" if self._held_for is None else f" held_for={self._held_for.ask.id}"
        return f"<Plan {self._residency!r} {room}{held}{' draining' if self._draining else ''}>"

    def check(self) -> None:
        """Assert every invariant; looks at everything."""
        for _ in self.check_steps():
            pass

    def check_steps(self) -> Iterator[None]:
        """The same with a small piece of work between two steps. No event may come between the first and the
        last.
        """
        yield from self._queue.check_steps()
        assert self._preempted.keys().isdisjoint(self._waiting)
        assert self._preempted.keys().isdisjoint(self._running)
        yield from self._check_requests()
        loads, versions = yield from self._by_load_and_version()
        yield from check_residency(self._residency, loads, versions)
        yield from self._check_gates()
        first = self._queue.first()
        idle = self._stopped or first is None or not self._fits(first)
        assert idle, f"{first} could run: {self!r}"

    def _check_requests(self) -> Iterator[None]:
        queued = running = sequences = before = 0
        for tenant in self._queue.tenants():
            queued += tenant.queued
            running += tenant.running
            yield
        for request, _ in self._running.values():
            sequences += request.ask.sequences
            yield
        for id, waiting in self._waiting.items():
            assert waiting.number > before
            assert id not in self._running
            before = waiting.number
            yield
        assert queued == len(self._waiting) + len(self._preempted)
        assert running == sequences == self._sequences
        assert sequences <= self._capacity.max_running or len(self._running) == 1, f"{self!r}"

    def _by_load_and_version(
        self,
    ) -> Generator[None, None, tuple[dict[int, tuple[int, int, int]], set[str]]]:
        """What runs by load id (requests, tokens left, not preemptible), and the versions waited for."""
        sums: dict[int, tuple[int, int, int]] = {}
        versions: set[str] = set()
        for request, load in self._running.values():
            if load is not None:
                count, work, fixed = sums.get(load.id, (0, 0, 0))
                sums[load.id] = (count + 1, work + request.tokens_left, fixed + request.not_preemptible)
            yield
        for request in itertools.chain(self._waiting.values(), self._preempted.values()):
            if request.ask.version is not None:
                versions.add(request.ask.version)
            yield
        return sums, versions

    def _check_gates(self) -> Iterator[None]:
        """The open versions are the base model, and those in a slot that does not drain, unless a suspect is
        in another's way.
        """
        open_versions = self._queue.open_versions()
        open_slots = 0
        for slot in self._residency.in_slots:
            if slot is not None:
                is_open = slot.state is State.ACTIVE and not slot.draining
                is_open = is_open and self._suspects.may_run(slot.version)
                assert is_open == (slot.version in open_versions)
                open_slots += is_open
                yield
        suspects = {load.version for id, (_, load) in self._running.items() if load and id not in self._lost}
        assert len(suspects & self._suspects.versions) <= 1, f"suspects run together: {suspects}"
        assert None in open_versions
        assert len(open_versions) == open_slots + 1
