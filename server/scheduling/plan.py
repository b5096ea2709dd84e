"""Decisions: what to load, what to run, what to refuse. Pure: events in, effects out, no I/O, no clock.

A request's life:

    submitted -> waits in its tenant's queue -> Run -> progressed ... -> finished
                   |  its version is staged and activated meanwhile       |
                   +-> Refuse (queue full, waited too long, adapter       |
                   |       unavailable, shutting down)                    |
                   +-> cancelled                                          |
                   +<--- preempted (put aside; it has no time limit) <----+ Preempt

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
from collections.abc import Mapping
from dataclasses import dataclass

from adapters.model import Tier
from server.scheduling.fair_queue import Ask, FairQueue, Request
from server.scheduling.nouns import (
    Activate,
    Deactivate,
    Evict,
    HostEntry,
    Limits,
    Load,
    Refusal,
    Slot,
    Stage,
    State,
    Warmed,
)
from server.scheduling.residency import Residency

__all__ = [
    "Activate",
    "Ask",
    "Deactivate",
    "Effect",
    "Evict",
    "HostEntry",
    "Limits",
    "Plan",
    "Preempt",
    "Refusal",
    "Refuse",
    "Run",
    "Slot",
    "Snapshot",
    "Stage",
    "State",
    "Warmed",
]


@dataclass(frozen=True, slots=True)
class Run:
    """Start it in the engine; answered by finished or cancelled."""

    id: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Its one outcome. ``retry_after`` is in seconds; None if no time can be told."""

    id: str
    reason: Refusal
    retry_after: float | None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Preempt:
    """Take it out of the engine, to go on at its next Run; answered by preempted or kept, or by its end."""

    id: str


Effect = Stage | Evict | Activate | Deactivate | Run | Refuse | Preempt | Warmed


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state at one moment, for operators and metrics.

    ``queued`` counts requests and ``running`` sequences, of the tenants that have any; ``counters`` are
    the virtual token counters of all tenants seen. ``aside`` counts requests that have run and wait to go
    on. ``drains`` counts slots ever drained for another, ``preemptions`` requests ever put aside.
    """

    slots: tuple[Slot, ...]
    host: tuple[HostEntry, ...]
    queued: Mapping[str, int]
    running: Mapping[str, int]
    counters: Mapping[str, float]
    aside: int
    drains: int
    preemptions: int
    draining: bool


class Plan:
    """The one owner of this state. Every event takes ``now``, in seconds of a clock that never goes back.

    ``tick`` is due at ``next_deadline()``. An event that cannot have happened raises ValueError.
    """

    def __init__(self, limits: Limits, first_load_id: int = 1) -> None:
        self._limits = limits
        self._effects: list[Effect] = []
        self._queue = FairQueue(self._counted)
        self._residency = Residency(limits, first_load_id, self._emit, self._queue.gate, self._queue.counter)
        self._waiting: OrderedDict[str, Request] = OrderedDict()  # by arrival
        self._aside: dict[str, Request] = {}  # they wait too, but for as long as it takes
        self._running: dict[str, tuple[Request, Load | None]] = {}
        self._sequences = 0
        self._held_for: Request | None = None
        self._draining = False
        self._preemptions = 0

    # --- requests ------------------------------------------------------------------------------------

    def submitted(self, now: float, ask: Ask) -> list[Effect]:
        if ask.id in self._waiting or ask.id in self._running or ask.id in self._aside:
            raise ValueError(f"there is a request {ask.id} already")
        self._expire(now)
        limit = self._limits.max_queued if ask.max_queued is None else ask.max_queued
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
        """The client left. For a running request: once the engine has let go of it."""
        request = self._waiting.get(id)
        if request is not None:
            self._drop(request)
        return self.finished(now, id)

    def progressed(self, now: float, id: str, prompt_tokens: int, output_tokens: int) -> list[Effect]:
        """Totals of this request so far; smaller ones than before change nothing."""
        request, load = self._running.get(id, (None, None))
        if request is not None:
            before = request.tokens_left
            request.output_tokens = max(request.output_tokens, output_tokens)
            self._queue.charge(request, prompt_tokens, output_tokens)
            if load is not None:
                self._residency.progress(load, before - request.tokens_left)
        first = self._queue.first()  # nothing but the order can have changed
        return self._settle(now) if first is not None and self._fits(first) else []

    def finished(self, now: float, id: str) -> list[Effect]:
        """A running request ended, in any way; nothing happens if it has before."""
        if id in self._waiting:
            raise ValueError(f"request {id} finished, but it never ran")
        request, load = self._running.pop(id, (None, None))
        if request is not None:
            self._sequences -= request.ask.sequences
            self._queue.end(request)
            if load is not None:
                self._residency.end(load, request, now)
        elif id in self._aside:
            self._drop(self._aside[id])
        return self._settle(now)

    def preempted(self, now: float, id: str) -> list[Effect]:
        """A running request is out of the engine and waits again; nothing happens if it has ended."""
        request, load = self._running.pop(id, (None, None))
        if request is not None and load is not None:
            self._preemptions += 1
            self._sequences -= request.ask.sequences
            self._queue.put_back(request)
            self._aside[id] = request
            self._residency.end(load, request, now)
            self._residency.want(load.version, request.ask.tenant, now)
        return self._settle(now)

    def kept(self, now: float, id: str) -> list[Effect]:
        """A running request could not be put aside, and never can."""
        request, load = self._running.get(id, (None, None))
        if request is not None and load is not None and not request.fixed:
            request.fixed = True
            self._residency.fix(load)
        return self._settle(now)

    # --- adapters ------------------------------------------------------------------------------------

    def staged(self, now: float, load_id: int, size_bytes: int = 0) -> list[Effect]:
        self._residency.staged(now, load_id, size_bytes)
        return self._settle(now)

    def stage_failed(self, now: float, load_id: int, detail: str) -> list[Effect]:
        self._refuse_version(self._residency.stage_failed(load_id), detail)
        return self._settle(now)

    def activated(self, now: float, load_id: int) -> list[Effect]:
        self._residency.activated(now, load_id)
        return self._settle(now)

    def activation_failed(self, now: float, load_id: int, detail: str) -> list[Effect]:
        self._refuse_version(self._residency.activation_failed(load_id), detail)
        return self._settle(now)

    def lost(self, now: float, load_id: int) -> list[Effect]:
        """The worker does not have this load. Unknown ones and those under way are ignored."""
        self._residency.lost(now, load_id)
        return self._settle(now)

    def pin(self, now: float, version: str, pinned: bool, tenant: str) -> list[Effect]:
        """Keep ``version`` in a slot. It goes there when nobody waits for the room, as often as it is not."""
        self._residency.pin(version, tenant if pinned else None)
        return self._settle(now)

    def retire(self, now: float, version: str) -> list[Effect]:
        """It was deleted: what waits or runs goes on, then it is evicted. Pin or warm take that back."""
        self._residency.retire(version)
        return self._settle(now)

    def warm(self, now: float, version: str, slot: bool) -> list[Effect]:
        """Stage it, and with ``slot`` activate it, as soon as nobody waits for the same room.

        It takes what is free or held by an idle version without a pin. Answered by one Warmed, unless all who
        asked leave before; see unwarm.
        """
        if self._draining:
            self._emit(Warmed(version, Refusal.DRAINING))
        else:
            self._residency.warm(version, slot)
        return self._settle(now)

    def unwarm(self, now: float, version: str) -> list[Effect]:
        """Nobody waits for it to be warm any more."""
        self._residency.unwarm(version)
        return self._settle(now)

    # --- time ----------------------------------------------------------------------------------------

    def drain(self, now: float) -> list[Effect]:
        """Shut down: refuse all that waits and all that comes; what runs goes on."""
        self._draining = True
        self._residency.stop_warming()
        for request in list(self._waiting.values()):
            self._refuse(request, Refusal.DRAINING, None)
        return self._settle(now)

    def tick(self, now: float) -> list[Effect]:
        return self._settle(now)

    def next_deadline(self) -> float | None:
        """When tick is due; None if nothing happens by time alone."""
        deadlines = [self._residency.next_deadline()]
        if self._waiting:
            deadlines.append(self._timeout(next(iter(self._waiting.values()))))
        return min((at for at in deadlines if at is not None), default=None)

    # --- decisions -----------------------------------------------------------------------------------

    def _settle(self, now: float) -> list[Effect]:
        self._expire(now)
        while self._decide(now):
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
        if large.passed_at is not None and now - large.passed_at >= self._limits.slot_patience:
            self._held_for = large
            return None
        if self._sequences >= self._limits.max_running:
            return None
        smaller = self._queue.first(self._fits)
        if smaller is not None and large.passed_at is None:
            large.passed_at = now
        return smaller

    def _fits(self, request: Request) -> bool:
        return not self._sequences or self._sequences + request.ask.sequences <= self._limits.max_running

    def _run(self, request: Request, now: float) -> None:
        version = request.ask.version
        load = None if version is None else self._residency.begin(version, request, now)
        self._queue.start(request, now)
        self._forget_waiting(request)
        self._running[request.ask.id] = (request, load)
        self._sequences += request.ask.sequences
        self._emit(Run(request.ask.id))

    def _expire(self, now: float) -> None:
        self._residency.expire(now)
        while self._waiting:
            oldest = next(iter(self._waiting.values()))
            if self._timeout(oldest) > now:
                return
            after = self._queue.retry_after(oldest.ask.tenant, now)
            self._refuse(oldest, Refusal.QUEUE_TIMEOUT, after)

    def _timeout(self, request: Request) -> float:
        return request.arrived + self._limits.queue_timeout

    def _refuse_version(self, version: str, detail: str) -> None:
        for request in self._queue.waiting(version):
            self._refuse(request, Refusal.ADAPTER_UNAVAILABLE, None, detail)

    def _refuse(self, request: Request, reason: Refusal, after: float | None, detail: str = "") -> None:
        self._drop(request)
        self._emit(Refuse(request.ask.id, reason, after, detail))

    def _drop(self, request: Request) -> None:
        """It leaves the queue and will not run."""
        self._queue.remove(request)
        self._forget_waiting(request)

    def _forget_waiting(self, request: Request) -> None:
        if self._waiting.pop(request.ask.id, None) is None:
            del self._aside[request.ask.id]
        version = request.ask.version
        if version is not None and not self._queue.waits(version):
            self._residency.unwant(version)

    def _emit(self, effect: Effect) -> None:
        self._effects.append(effect)

    def _counted(self, tenant: str) -> None:
        self._residency.recount(tenant)

    # --- what is seen --------------------------------------------------------------------------------

    def tier_of(self, version: str) -> Tier:
        return self._residency.state(version).tier

    def known_versions(self) -> set[str]:
        """The versions that an effect may name unless a request for another is submitted."""
        return self._residency.known()

    def snapshot(self) -> Snapshot:
        tenants = list(self._queue.tenants())
        return Snapshot(
            slots=self._residency.slots(),
            host=self._residency.entries(),
            queued={tenant.id: tenant.queued for tenant in tenants if tenant.queued},
            running={tenant.id: tenant.running for tenant in tenants if tenant.running},
            counters={tenant.id: tenant.counter for tenant in tenants},
            aside=len(self._aside),
            drains=self._residency.drains,
            preemptions=self._preemptions,
            draining=self._draining,
        )

    def __repr__(self) -> str:
        """``x+`` is on its way, ``x~`` drains, ``x!`` is overdue; ``x:2`` has two running requests."""
        room = f"running={self._sequences}/{self._limits.max_running} waiting={len(self._waiting)}"
        room += f" aside={len(self._aside)}" if self._aside else ""
        held = "" if self._held_for is None else f" held_for={self._held_for.ask.id}"
        return f"<Plan {self._residency!r} {room}{held}{' draining' if self._draining else ''}>"

    def check(self) -> None:
        """Assert every invariant; looks at everything."""
        self._queue.check()
        running = [request for request, _ in self._running.values()]
        assert not self._waiting.keys() & self._running.keys()
        assert not self._aside.keys() & (self._waiting.keys() | self._running.keys())
        queued = len(self._waiting) + len(self._aside)
        assert sum(tenant.queued for tenant in self._queue.tenants()) == queued
        assert sum(tenant.running for tenant in self._queue.tenants()) == self._sequences
        assert sum(request.ask.sequences for request in running) == self._sequences
        assert self._sequences <= self._limits.max_running or len(running) == 1, f"{self!r}"
        numbers = [request.number for request in self._waiting.values()]
        assert numbers == sorted(numbers)
        self._residency.check(self._running_by_load(), self._versions_waited_for())
        self._check_gates()
        first = self._queue.first()
        assert first is None or not self._fits(first), f"{first} could run: {self!r}"

    def _running_by_load(self) -> dict[int, tuple[int, int, int]]:
        sums: dict[int, tuple[int, int, int]] = {}
        for request, load in self._running.values():
            if load is not None:
                count, work, fixed = sums.get(load.id, (0, 0, 0))
                sums[load.id] = (count + 1, work + request.tokens_left, fixed + request.fixed)
        return sums

    def _versions_waited_for(self) -> set[str]:
        waiting = itertools.chain(self._waiting.values(), self._aside.values())
        return {r.ask.version for r in waiting if r.ask.version is not None}

    def _check_gates(self) -> None:
        open_slots = {
            s.version for s in self._residency.slots() if s.state is State.ACTIVE and not s.draining
        }
        assert self._queue.open_versions() == open_slots | {None}
