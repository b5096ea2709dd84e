"""Where every adapter version is, who waits for it, and whose place may be given away.

A version is on disk unless it has a load, and every load has an engine id of its own:

          stage                 activate
    DISK --------> STAGING -> HOST --------> ACTIVATING -> ACTIVE    (draining: what runs goes on,
      ^                       | ^                            |        nothing new starts)
      +-------- evict --------+ +-------- deactivate --------+

STAGING and ACTIVATING last until the engine answers; deactivating and evicting count as done when they are
decided. A load in any of the four states has a host entry; from ACTIVATING on it has a slot as well. A
version with waiting requests has a claim, which is overdue once it has waited for ``slot_patience`` since its
first request, or since it lost its slot.

The five decisions, in the order in which the plan asks for them. The branches below carry these numbers.

1. sweep    Evict a retired version that is idle.
2. grant    Give a slot to a version on the host: (a) to the claim whose tenant has had the fewest tokens, but
            first of all to a tenant that has waited for three times ``slot_patience`` since its last slot
            (who is asked for most has had most, and an endless row of tenants that come once would pass it);
            (b) without claims, to a version that is pinned or to be warmed.
            A claim takes a free slot, else an idle one, else a drained one. A prefetch takes a free slot, or
            an idle one without a pin.
3. stage    Load a version from disk: (a) for the claim whose tenant's turn it is; (b) without claims, a
            version that is pinned or to be warmed.
            A claim takes a free host entry, else an idle one on the host, else an idle one in a slot. An
            overdue claim also takes the entry of the latest claim that is not overdue, or of a drained slot.
            A prefetch takes a free entry, or an idle one without a pin.
4. drain    Close a slot to new requests: (a) open one again if more drain than claims wait; (b) for every
            overdue claim on the host, or one for an overdue claim that finds no host entry: the slot with the
            least work left; (c) for a claim that is not overdue, if the slot's tenant has had more than the
            claim's, once the slot has been used for a while.
            A slot that the full engine has kept from running anything is left alone for ``slot_patience``.
5. preempt  Stop the requests of a slot, to resume them later, once a claim has been overdue for
            ``preempt_after``: (a) of a slot that drains, else (b) of any slot where all requests can be
            resumed. Nobody is preempted sooner than ``preempt_after`` after getting the slot.
"""

from __future__ import annotations

from collections.abc import Callable

from server.scheduling import victims
from server.scheduling.fair_queue import Request
from server.scheduling.indices import Indices
from server.scheduling.loads import Claim, Load, by_work, has_room, shown_entries, shown_slots, text_of
from server.scheduling.nouns import (
    Activate,
    Capacity,
    Deactivate,
    Evict,
    HostEntry,
    Move,
    Refusal,
    Slot,
    Stage,
    State,
    Warmed,
)
from server.scheduling.prefetch import Prefetch


class Residency:
    """Owner of loads, slots and claims; nothing else changes them.

    ``emit`` gets every move in order. ``gate`` is told whether a version takes requests, after every change
    to it. ``counter`` returns the tokens that a tenant has had: rerank ``indices.for_slot`` when they change.
    ``sweep``, ``grant``, ``stage``, ``drain`` and ``preempt`` are the decisions: each makes at most one and
    returns whether it did; the plan calls them until none does.
    """

    def __init__(
        self,
        capacity: Capacity,
        first_load_id: int,
        emit: Callable[[Move | Warmed], None],
        gate: Callable[[str, bool], None],
        counter: Callable[[str], float],
    ) -> None:
        self.capacity = capacity
        self._turn = victims.TURN_FRACTION * capacity.slot_patience
        self._starving_after = victims.STARVING * capacity.slot_patience
        self.next_id = first_load_id
        self._emit = emit
        self._gate = gate
        self._counter = counter
        self.loads: dict[str, Load] = {}
        self.loads_by_id: dict[int, Load] = {}
        self.in_slots: list[Load | None] = [None] * capacity.gpu_slots
        self.claims: dict[str, Claim] = {}
        self.claims_of: dict[str, int] = {}  # how many, by tenant
        self.pins: dict[str, str] = {}  # version -> tenant
        self._retired: dict[str, None] = {}  # by time; only while in memory or wanted
        self.prefetch = Prefetch(emit)
        self.indices = Indices(self.share)
        self.is_blocked = False  # the next to be staged is overdue and finds no host entry
        self._look_again: float | None = None  # when a slot that drain passed over may be taken
        self._preempt_at: float | None = None  # when requests may be preempted for the next claim
        self.is_stopped = False  # there is no engine
        self.drains = 0  # slots ever drained

    # --- what happens --------------------------------------------------------------------------------

    def want(self, version: str, tenant: str, now: float) -> None:
        """A request waits for ``version``."""
        if version not in self.claims:
            self.claims[version] = Claim(tenant, now)
            self.claims_of[tenant] = self.claims_of.get(tenant, 0) + 1
            self.prefetch.retry(version)
            self._index(version)

    def unwant(self, version: str) -> None:
        """No request waits for ``version`` any more."""
        claim = self.claims.pop(version, None)
        if claim is None:
            return
        self._index(version)
        self.claims_of[claim.tenant] -= 1
        if not self.claims_of[claim.tenant]:
            del self.claims_of[claim.tenant]
            self.indices.forget(claim.tenant)

    def begin(self, version: str, request: Request, now: float) -> Load:
        """``request`` runs on ``version``, which must be open."""
        load = self.loads[version]
        assert load.state is State.ACTIVE, f"{version} is {load.state}"
        load.running += 1
        load.work += request.tokens_left
        load.not_preemptible += request.not_preemptible
        load.has_run = True
        load.tenant = request.tenant.id
        load.used = now
        self._index(version)
        return load

    def end(self, load: Load, request: Request, now: float) -> None:
        """One of its running requests ended, or was preempted."""
        load.running -= 1
        load.work -= request.tokens_left
        load.not_preemptible -= request.not_preemptible
        load.used = now
        self._index(load.version)

    def preempt_refused(self, load: Load) -> None:
        """One of its running requests turned out to be one that cannot be preempted."""
        load.not_preemptible += 1
        load.preempting = False

    def progress(self, load: Load, tokens: int) -> None:
        """Its running requests produced ``tokens`` more."""
        load.work -= tokens

    def staged(self, now: float, load_id: int, size_bytes: int, ranks: int) -> None:
        """A load is in host memory. ValueError unless it was being staged."""
        load = self._answered(load_id, State.STAGING)
        load.size_bytes, load.ranks = size_bytes, ranks
        load.used = now
        self._change(load, State.HOST)

    def activated(self, now: float, load_id: int) -> None:
        """A load is in its slot. ValueError unless it was being activated."""
        load = self._answered(load_id, State.ACTIVATING)
        load.used = load.active_since = now
        load.has_run = False
        self._change(load, State.ACTIVE)

    def stage_failed(self, load_id: int) -> str:
        """Give the load up; returns its version. ValueError unless it was being staged."""
        load = self._answered(load_id, State.STAGING)
        self._fail(load)
        return load.version

    def activation_failed(self, load_id: int) -> str:
        """Give the load up and evict what the engine has of it; returns its version. ValueError unless it was
        being activated.
        """
        load = self._answered(load_id, State.ACTIVATING)
        self._fail(load)
        self._emit(Evict(load.version, load.id))
        return load.version

    def lost(self, now: float, load_id: int) -> None:
        """The engine has it no more. One under way is left to its own answer."""
        load = self.loads_by_id.get(load_id)
        if load is None or load.state not in (State.HOST, State.ACTIVE):
            return
        if load.state is State.ACTIVE:
            self._restart_patience(load.version, now)
        self._vanish(load)

    def engine_stopped(self) -> None:
        """Every load is gone, also those under way. What waits keeps its place and its patience."""
        self.is_stopped = True
        self._look_again = self._preempt_at = None
        self.is_blocked = False
        for load in list(self.loads.values()):
            self._vanish(load)
        self.indices.for_host.forget_turns()
        self.indices.for_slot.forget_turns()

    def engine_started(self) -> None:
        """An engine without any load is there. Pinned versions that could not be loaded are tried again."""
        self.is_stopped = False
        self.prefetch.retry_all()
        for version in self.pins:
            self._index(version)

    def pin(self, version: str, tenant: str | None) -> None:
        """Keep ``version`` in a slot, on account of ``tenant``; None lets it go."""
        self.prefetch.retry(version)
        if tenant is None:
            self.pins.pop(version, None)
        else:
            self.pins[version] = tenant
            self._retired.pop(version, None)
        self._index(version)

    def retire(self, version: str) -> None:
        """Evict ``version`` as soon as nothing runs on it or waits for it."""
        self._retired[version] = None
        self.prefetch.end(version, Refusal.ADAPTER_UNAVAILABLE)
        self.pin(version, None)

    def warm(self, version: str, slot: bool) -> None:
        """Load ``version`` when nothing else needs the room."""
        self._retired.pop(version, None)
        self.prefetch.ask(version, slot)
        self._index(version)

    def unwarm(self, version: str) -> None:
        """Nobody waits for ``version`` to be warm any more."""
        self.prefetch.withdraw(version)
        self._index(version)

    def expire(self, now: float) -> None:
        """Mark the claims whose patience has ended."""
        while (version := self.indices.patient.first()) is not None and self._patience_end(version) <= now:
            self.claims[version].overdue = True
            self._index(version)

    def next_deadline(self) -> float | None:
        """When the passing of time alone changes a decision next; None if it never does."""
        first = self.indices.patient.first()
        ends = [] if first is None else [self._patience_end(first)]
        ends += [at for at in (self._look_again, self._preempt_at) if at is not None]
        return min(ends, default=None)

    # --- decisions -----------------------------------------------------------------------------------

    def sweep(self, now: float) -> bool:
        """Decision 1: evict a retired version that is idle."""
        for version in self._retired:
            load = self.loads.get(version)
            if load is None and version not in self.claims:
                del self._retired[version]
                return True
            if load is not None and self.indices.is_idle(version):
                self._evict(load, now)
                return True
        return False

    def grant(self, now: float) -> bool:
        """Decision 2: give a slot to the next that waits for one on the host."""
        version = self.indices.for_slot.next(now - self._starving_after)
        if version is not None:  # 2a
            victim = victims.for_slot(self.indices, self.loads, self.in_slots, self.pins)
            if not self._free_slot(version, victim, now):
                return victim is not None  # and the next one has to leave, too
            self.indices.for_slot.take(version, now)
        else:  # 2b
            version = self.prefetch.next_to_activate
            victim = victims.quiet(self.loads, self.pins, self.indices.idle_in_slot)
            if version is None or not self._free_slot(version, victim, now):
                return version is not None and victim is not None
        self._activate(self.loads[version])
        return True

    def stage(self, now: float) -> bool:
        """Decision 3: start to load the next that waits on disk."""
        self.is_blocked = False
        if len(self.indices.staging) >= self.capacity.max_staging:
            return False
        version = self.indices.for_host.first()
        if version is not None:  # 3a
            overdue = self.claims[version].overdue
            if not self._free_entry(victims.for_entry(self.indices, self.loads, self.pins, overdue), now):
                self.is_blocked = overdue
                return False
            self.indices.for_host.take(version, now)
        else:  # 3b
            version = self.prefetch.next_to_stage
            if version is None or not self._free_entry(
                victims.quiet(self.loads, self.pins, self.indices.idle_on_host, self.indices.idle_in_slot),
                now,
            ):
                return False
        self._start(version, now)
        return True

    def drain(self, now: float, spared: str | None) -> bool:
        """Decision 4: close a slot for a claim, or open one again that nobody needs; never ``spared``'s."""
        self._look_again = None
        if len(self.indices.draining) > max(len(self.indices.for_slot), int(self.is_blocked)):  # 4a
            self._set_draining(max(self._draining_loads(), key=by_work), False)
            return True
        choice = None
        if len(self.indices.draining) < (len(self.indices.overdue) or int(self.is_blocked)):  # 4b
            choice = min(self._drainable(now, spared), key=by_work, default=None)
        choice = choice or self._ahead(now, spared)  # 4c
        if choice is None:
            return False
        self.drains += 1
        self._set_draining(choice, True)
        return True

    def preempt(self, now: float, spared: str | None) -> Load | None:
        """Decision 5: the load whose requests are to be preempted for a claim that waited for too long."""
        self._preempt_at = at = self._next_preemption()
        if at is None or at > now:
            return None
        drained = [load for load in self._draining_loads() if not load.preempting]
        able = victims.preemptible(drained)  # 5a
        if not able:
            able = victims.preemptible(self._drainable(now, spared))  # 5b
        # What cannot be preempted is looked at whenever something happens.
        choice, self._preempt_at = victims.to_preempt(able, now, self.capacity.preempt_after)
        if choice is None:
            return None
        if not choice.draining:
            if drained:
                self._set_draining(max(drained, key=by_work), False)
            self._set_draining(choice, True)
        choice.preempting = True
        return choice

    def _ahead(self, now: float, spared: str | None) -> Load | None:
        """A slot whose tenant has had more than that of the next claim that gets none of those draining."""
        if len(self.indices.for_slot) <= len(self.indices.draining):
            return None
        loads = [load for load in self._drainable(now, spared) if load.has_run]
        first = self.indices.for_slot.leading(1)[0]
        if not loads or max(self._counter(load.tenant) for load in loads) <= self._had(first):
            return None  # most often; then no other claim needs to be looked at
        waiting = self.indices.for_slot.leading(len(self.indices.draining) + 1)
        if len(waiting) <= len(self.indices.draining):
            return None
        choice, again = victims.of_tenant_with_most(
            loads, self._counter, self._had(waiting[-1]), now, self._turn
        )
        self._look_again = victims.soonest(self._look_again, again)
        return choice

    def _drainable(self, now: float, spared: str | None) -> list[Load]:
        loads, ripe_at = victims.drainable(
            self.in_slots, self.pins, self.claims, now, spared, self.capacity.slot_patience
        )
        self._look_again = victims.soonest(self._look_again, ripe_at)
        return loads

    def _draining_loads(self) -> list[Load]:
        return [self.loads[version] for version in self.indices.draining]

    def _next_preemption(self) -> float | None:
        """When requests may be preempted for the first claim that no slot is being emptied for."""
        preempting = sum(load.preempting for load in self._draining_loads())
        overdue = self.indices.overdue.leading(preempting + 1)
        if len(overdue) > preempting:
            version: str | None = overdue[-1]
        else:
            blocked = self.is_blocked and not overdue and not preempting
            version = self.indices.for_host.first() if blocked else None
        if version is None:
            return None
        return self._patience_end(version) + self.capacity.preempt_after

    # --- room ----------------------------------------------------------------------------------------

    def _free_slot(self, version: str, victim: Load | None, now: float) -> bool:
        """Whether there is room for ``version``, if need be after ``victim`` has left its slot."""
        load, ranks = self.loads[version], self.capacity.slot_ranks
        if not has_room(self.in_slots, load, ranks) and victim is not None:
            self._deactivate(victim, now)
        return has_room(self.in_slots, load, ranks)

    def _free_entry(self, victim: Load | None, now: float) -> bool:
        """Whether a host entry is free, if need be after ``victim`` has left its own."""
        if len(self.loads) < self.capacity.host_slots:
            return True
        if victim is not None:
            self._evict(victim, now)
        return victim is not None

    # --- transitions ---------------------------------------------------------------------------------

    def _start(self, version: str, now: float) -> Load:
        load = Load(self.next_id, version, used=now)
        self.next_id += 1
        self.loads[version] = self.loads_by_id[load.id] = load
        self._change(load, State.STAGING)
        self._emit(Stage(version, load.id))
        return load

    def _activate(self, load: Load) -> None:
        load.slot = self.in_slots.index(None)
        self.in_slots[load.slot] = load
        self._change(load, State.ACTIVATING)
        self._emit(Activate(load.version, load.id))

    def _deactivate(self, load: Load, now: float) -> None:
        self._restart_patience(load.version, now)
        self._leave_slot(load)
        self._change(load, State.HOST)
        self._emit(Deactivate(load.version, load.id))

    def _evict(self, load: Load, now: float) -> None:
        if load.state is State.ACTIVE:
            self._deactivate(load, now)
        self._vanish(load)
        self._emit(Evict(load.version, load.id))

    def _fail(self, load: Load) -> None:
        self.prefetch.failed(load.version, load.version in self.pins)
        self._vanish(load)

    def _vanish(self, load: Load) -> None:
        self._leave_slot(load)
        del self.loads[load.version], self.loads_by_id[load.id]
        self._change(load, State.DISK)

    def _leave_slot(self, load: Load) -> None:
        if load.slot is not None:
            self.in_slots[load.slot] = None
            load.slot = None
        load.draining = load.preempting = False

    def _set_draining(self, load: Load, draining: bool) -> None:
        load.draining = draining
        load.preempting = False
        self._index(load.version)

    def _restart_patience(self, version: str, now: float) -> None:
        claim = self.claims.get(version)
        if claim is not None:
            claim.since, claim.overdue = now, False

    def _change(self, load: Load, state: State) -> None:
        load.state = state
        self._index(load.version)

    def _index(self, version: str) -> None:
        """Bring every index up to date with one version's load, claim and pin."""
        load, claim, pinned = self.loads.get(version), self.claims.get(version), version in self.pins
        self.indices.update(version, load, claim, pinned)
        state = State.DISK if load is None else load.state
        self.prefetch.index(version, state, pinned=pinned, claimed=claim is not None)
        self._gate(version, state is State.ACTIVE and load is not None and not load.draining)

    def _answered(self, load_id: int, state: State) -> Load:
        load = self.loads_by_id.get(load_id)
        if load is None or load.state is not state:
            raise ValueError(f"an answer for load {load_id}, which is not {state}: {load}")
        return load

    def _patience_end(self, version: str) -> float:
        return self.claims[version].since + self.capacity.slot_patience

    def share(self, version: str) -> tuple[float, float]:
        """The claim's rank among those that wait for a slot; the lowest is next."""
        return self._had(version), self.claims[version].since

    def _had(self, version: str) -> float:
        """What the tenant whose claim it is has had."""
        return self._counter(self.claims[version].tenant)

    # --- what is seen --------------------------------------------------------------------------------

    def state(self, version: str) -> State:
        """Where ``version`` is."""
        load = self.loads.get(version)
        return State.DISK if load is None else load.state

    def known(self) -> set[str]:
        """Every version that a later move may name."""
        return self.loads.keys() | self.claims.keys() | self.pins.keys() | self.prefetch.known()

    def slots(self) -> tuple[Slot, ...]:
        """Every GPU slot in order."""
        return shown_slots(self.in_slots)

    def entries(self) -> tuple[HostEntry, ...]:
        """Every host entry, oldest load first."""
        return shown_entries(self.loads, self.pins)

    def __repr__(self) -> str:
        return text_of(self.in_slots, self.loads, self.claims)
