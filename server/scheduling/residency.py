"""Where every adapter version is, who waits for it, and whose place may be given away.

A version is on disk unless it has a load, and every load has an engine id of its own:

          stage                 activate
    DISK --------> STAGING -> HOST --------> ACTIVATING -> ACTIVE    (draining: what runs goes on,
      ^                       | ^                            |        nothing new starts)
      +-------- evict --------+ +-------- deactivate --------+

STAGING and ACTIVATING last until the engine's answer; deactivating and evicting count as done when
decided. A load in any of the four states has a host entry; from ACTIVATING on it has a slot as well.

A version with waiting requests has a claim. A claim is overdue once it has waited for ``slot_patience``
since its first request, or since it lost its slot. Claims get host entries by turns of their tenants
(``Turns``), and slots by what their tenants have had (``Shares``): the lowest token counter first, but before
all a tenant that has waited for three times ``slot_patience`` since its last one: who is asked for most has
had most, and an endless row of tenants that come once would pass it. What may be taken from whom:

    host entry   1. free   2. an idle one on the host   3. an idle one in a slot
                 4. for an overdue claim: that of the latest claim that is not, or a drained slot's
    slot         1. free   2. an idle one   3. a drained one

Idle ones go least recently used first. One slot drains for every overdue claim on the host; if there is
none, one does for an overdue claim that finds no host entry. The slot with the least work left is chosen,
but not one that a full engine has kept from running anything for less than ``slot_patience``. A slot also
drains for a claim that is not overdue yet if its tenant has had more than the claim's, once it has had the
slot for a while. Pinned versions keep their places, with two exceptions: those of a single tenant do not keep
the last one, and where everything is pinned an overdue claim overrides the pins. What is loaded without a
claim (``Warming``) takes only what is free or idle and not pinned, so pins cannot push each other in circles.

A drained slot is not waited for without end: ``preempt_after`` beyond its patience, an overdue claim has
the requests put aside that run in one (it need not be the one that drains) where all of them can go on later.
Nobody is put aside sooner than ``preempt_after`` after getting the slot, so that everybody gets on.

Why nobody waits forever: claims get entries by turns, so each comes first at some time, and slots at the
latest when their tenant starves. Then a slot drains, and what runs there ends or is put aside. Only an
overdue claim pushes out another, and never one that is overdue itself, so two cannot push each other in
circles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from server.scheduling.fair_queue import Request
from server.scheduling.nouns import (
    Activate,
    Claim,
    Deactivate,
    Evict,
    HostEntry,
    Limits,
    Load,
    Move,
    Refusal,
    Slot,
    Stage,
    State,
    Warmed,
)
from server.scheduling.prefetch import Warming
from server.scheduling.ranking import Ranking, Shares, Turns

# Of ``slot_patience``: how long a version has its slot at least before its tenant's share counts against it.
TURN = 0.25
# Times ``slot_patience``: how long a tenant waits for its next slot before it comes before all others.
STARVING = 3.0


class Residency:
    """Owner of loads, slots and claims.

    ``emit`` gets every move in order. ``gate`` is told whether a version takes requests, after every
    change to it. ``counter`` tells what a tenant has had; ``recount`` is called when that has changed.
    ``grant``, ``stage``, ``drain``, ``preempt`` and ``sweep`` are the decisions: each makes at most one
    and tells whether it did; they are to be called until none does.
    """

    def __init__(
        self,
        limits: Limits,
        first_load_id: int,
        emit: Callable[[Move | Warmed], None],
        gate: Callable[[str, bool], None],
        counter: Callable[[str], float],
    ) -> None:
        self._limits = limits
        self._turn = TURN * limits.slot_patience
        self._starving_after = STARVING * limits.slot_patience
        self._next_id = first_load_id
        self._emit = emit
        self._gate = gate
        self._counter = counter
        self._loads: dict[str, Load] = {}
        self._by_id: dict[int, Load] = {}
        self._slots: list[Load | None] = [None] * limits.gpu_slots
        self._claims: dict[str, Claim] = {}
        self._pins: dict[str, str] = {}  # version -> tenant
        self._retired: set[str] = set()  # only while in memory or wanted
        self._warming = Warming(emit)
        self._blocked = False  # the next to be staged is overdue and finds no host entry
        self._look_again: float | None = None  # when a slot that drain passed over may be taken
        self._preempt_at: float | None = None  # when the next claim may have requests put aside
        self.drains = 0  # slots ever drained
        # Everything below follows from the above, by _index().
        self._for_host: Turns[str] = Turns()
        self._for_slot: Shares[str] = Shares(self._share)
        self._patient: Ranking[str] = Ranking()
        self._overdue: Ranking[str] = Ranking()  # claims on the host that are
        self._young: Ranking[str] = Ranking()  # those on the host that are not, latest first
        self._idle_on_host: Ranking[str] = Ranking()
        self._idle_in_slot: Ranking[str] = Ranking()
        self._staging: set[str] = set()
        self._draining: set[str] = set()

    # --- what happens --------------------------------------------------------------------------------

    def want(self, version: str, tenant: str, now: float) -> None:
        """A request waits for ``version``."""
        if version not in self._claims:
            self._claims[version] = Claim(tenant, now)
            self._warming.retry(version)
            self._index(version)

    def unwant(self, version: str) -> None:
        """No request waits for ``version`` any more."""
        if self._claims.pop(version, None) is not None:
            self._index(version)

    def begin(self, version: str, request: Request, now: float) -> Load:
        """``request`` runs on ``version``, which must be open."""
        load = self._loads[version]
        assert load.state is State.ACTIVE, f"{version} is {load.state}"
        load.running += 1
        load.work += request.tokens_left
        load.fixed += request.fixed
        load.has_run = True
        load.tenant = request.tenant.id
        load.used = now
        self._index(version)
        return load

    def end(self, load: Load, request: Request, now: float) -> None:
        """One of its running requests ended, or was put aside."""
        load.running -= 1
        load.work -= request.tokens_left
        load.fixed -= request.fixed
        load.used = now
        self._index(load.version)

    def fix(self, load: Load) -> None:
        """One of its running requests turned out to be one that cannot be put aside."""
        load.fixed += 1
        load.yielding = False

    def recount(self, tenant: str) -> None:
        self._for_slot.rerank(tenant)

    def progress(self, load: Load, tokens: int) -> None:
        """Its running requests produced ``tokens`` more."""
        load.work -= tokens

    def staged(self, now: float, load_id: int, size_bytes: int) -> None:
        load = self._answered(load_id, State.STAGING)
        load.size_bytes = size_bytes
        load.used = now
        self._change(load, State.HOST)

    def activated(self, now: float, load_id: int) -> None:
        load = self._answered(load_id, State.ACTIVATING)
        load.used = load.active_since = now
        load.has_run = False
        self._change(load, State.ACTIVE)

    def stage_failed(self, load_id: int) -> str:
        """The version that could not be staged."""
        load = self._answered(load_id, State.STAGING)
        self._fail(load)
        return load.version

    def activation_failed(self, load_id: int) -> str:
        """The version that could not be activated; what the engine has of it is evicted."""
        load = self._answered(load_id, State.ACTIVATING)
        self._fail(load)
        self._emit(Evict(load.version, load.id))
        return load.version

    def lost(self, now: float, load_id: int) -> None:
        """The engine has it no more. One under way is left to its own answer."""
        load = self._by_id.get(load_id)
        if load is None or load.state not in (State.HOST, State.ACTIVE):
            return
        if load.state is State.ACTIVE:
            self._restart_patience(load.version, now)
        self._vanish(load)

    def pin(self, version: str, tenant: str | None) -> None:
        """Keep ``version`` in a slot, on account of ``tenant``; None lets it go."""
        self._warming.retry(version)
        if tenant is None:
            self._pins.pop(version, None)
        else:
            self._pins[version] = tenant
            self._retired.discard(version)
        self._index(version)

    def retire(self, version: str) -> None:
        """Evict it as soon as it is idle."""
        self._retired.add(version)
        self._warming.end(version, Refusal.ADAPTER_UNAVAILABLE)
        self.pin(version, None)

    def warm(self, version: str, slot: bool) -> None:
        """Load it when nothing else needs the room."""
        self._retired.discard(version)
        self._warming.ask(version, slot)
        self._index(version)

    def unwarm(self, version: str) -> None:
        self._warming.withdraw(version)
        self._index(version)

    def stop_warming(self) -> None:
        self._warming.stop()

    def expire(self, now: float) -> None:
        """Mark the claims whose patience has ended."""
        while (version := self._patient.first()) is not None and self._patience_end(version) <= now:
            self._claims[version].overdue = True
            self._index(version)

    def next_deadline(self) -> float | None:
        first = self._patient.first()
        ends = [] if first is None else [self._patience_end(first)]
        ends += [at for at in (self._look_again, self._preempt_at) if at is not None]
        return min(ends, default=None)

    # --- decisions -----------------------------------------------------------------------------------

    def grant(self, now: float) -> bool:
        """Give a slot to the next that waits for one on the host."""
        version = self._for_slot.next(now - self._starving_after)
        if version is None:
            return self._grant_warm(now)
        if not self._make_slot(now):
            return False
        self._for_slot.take(version, now)
        self._activate(self._loads[version])
        return True

    def stage(self, now: float) -> bool:
        """Start to load the next that waits on disk."""
        self._blocked = False
        if len(self._staging) >= self._limits.max_staging:
            return False
        version = self._for_host.first()
        if version is None:
            return self._stage_warm(now)
        overdue = self._claims[version].overdue
        if not self._make_entry(now, overdue):
            self._blocked = overdue
            return False
        self._for_host.take(version, now)
        self._start(version, now)
        return True

    def drain(self, now: float, spared: str | None) -> bool:
        """Close a slot for a claim, or open one again that nobody needs; never ``spared``'s."""
        self._look_again = None
        if len(self._draining) > max(len(self._for_slot), int(self._blocked)):
            self._set_draining(max((self._loads[v] for v in self._draining), key=_by_work), False)
            return True
        choice = None
        if len(self._draining) < (len(self._overdue) or int(self._blocked)):
            choice = min(self._drainable(now, spared), key=_by_work, default=None)
        choice = choice or self._ahead(now, spared)
        if choice is None:
            return False
        self.drains += 1
        self._set_draining(choice, True)
        return True

    def preempt(self, now: float, spared: str | None) -> Load | None:
        """The load whose requests are to be put aside for a claim that has waited for too long."""
        self._preempt_at = at = self._next_preemption()
        if at is None or at > now:
            return None
        drained = [self._loads[v] for v in self._draining if not self._loads[v].yielding]
        can_yield = [load for load in drained if load.running and not load.fixed]
        if not can_yield:
            can_yield = [load for load in self._drainable(now, spared) if load.running and not load.fixed]
        ends = {load: load.active_since + self._limits.preempt_after for load in can_yield}
        choice = min((load for load in can_yield if ends[load] <= now), key=_by_work, default=None)
        if choice is None:
            # What cannot yield is looked at whenever something happens.
            self._preempt_at = min(ends.values(), default=None)
            return None
        self._preempt_at = None
        if not choice.draining:
            if drained:
                self._set_draining(max(drained, key=_by_work), False)
            self._set_draining(choice, True)
        choice.yielding = True
        return choice

    def sweep(self, now: float) -> bool:
        """Evict a retired version that is idle."""
        for version in self._retired:
            load = self._loads.get(version)
            if load is None and version not in self._claims:
                self._retired.discard(version)
                return True
            if load is not None and (version in self._idle_on_host or version in self._idle_in_slot):
                self._evict(load, now)
                return True
        return False

    def _grant_warm(self, now: float) -> bool:
        version = self._warming.next_to_activate
        if version is None or not self._make_quiet_slot(now):
            return False
        self._activate(self._loads[version])
        return True

    def _stage_warm(self, now: float) -> bool:
        version = self._warming.next_to_stage
        if version is None or not self._make_quiet_entry(now):
            return False
        self._start(version, now)
        return True

    def _ahead(self, now: float, spared: str | None) -> Load | None:
        """A slot whose tenant has had more than the next that gets none of those draining."""
        if len(self._for_slot) <= len(self._draining):
            return None
        loads = [(self._counter(load.tenant), load) for load in self._drainable(now, spared) if load.has_run]
        waiting = self._for_slot.leading(1)
        if not loads or max(had for had, _ in loads) <= self._had(waiting[0]):
            return None  # most often; then no other claim needs to be looked at
        waiting = self._for_slot.leading(len(self._draining) + 1)
        if len(waiting) <= len(self._draining):
            return None
        level = self._had(waiting[-1])
        best: tuple[float, int] | None = None
        choice = None
        for had, load in loads:
            if had <= level:
                continue
            until = load.active_since + self._turn
            if until > now:
                self._look_again = until if self._look_again is None else min(self._look_again, until)
            elif best is None or (had, -load.work) > best:
                best, choice = (had, -load.work), load
        return choice

    def _next_preemption(self) -> float | None:
        """When the first claim that no slot is yielding to may have one's requests put aside."""
        yielding = sum(self._loads[version].yielding for version in self._draining)
        overdue = self._overdue.leading(yielding + 1)
        if len(overdue) > yielding:
            version: str | None = overdue[-1]
        else:
            version = self._for_host.first() if self._blocked and not overdue and not yielding else None
        if version is None:
            return None
        return self._patience_end(version) + self._limits.preempt_after

    # --- room ----------------------------------------------------------------------------------------

    def _make_slot(self, now: float) -> bool:
        if None in self._slots:
            return True
        victim = self._take(self._idle_in_slot, self._slots) or self._drained()
        if victim is not None:
            self._deactivate(victim, now)
        return victim is not None

    def _make_quiet_slot(self, now: float) -> bool:
        """A slot that nobody waits for and no pin keeps."""
        if None in self._slots:
            return True
        victim = self._unpinned(self._idle_in_slot)
        if victim is not None:
            self._deactivate(victim, now)
        return victim is not None

    def _make_entry(self, now: float, overdue: bool) -> bool:
        if len(self._loads) < self._limits.host_slots:
            return True
        entries = self._loads.values()
        victim = self._take(self._idle_on_host, entries) or self._take(self._idle_in_slot, entries)
        if victim is None and overdue:
            victim = self._push_out()
        if victim is not None:
            self._evict(victim, now)
        return victim is not None

    def _make_quiet_entry(self, now: float) -> bool:
        """A host entry that nobody waits for and no pin keeps."""
        if len(self._loads) < self._limits.host_slots:
            return True
        victim = self._unpinned(self._idle_on_host) or self._unpinned(self._idle_in_slot)
        if victim is not None:
            self._evict(victim, now)
        return victim is not None

    def _push_out(self) -> Load | None:
        """Whose host entry an overdue claim gets when no idle one is free to take."""
        entries = self._loads.values()
        override = all(self._kept(load.version, entries) for load in entries)
        for candidates in (self._idle_on_host, self._idle_in_slot, self._young):
            victim = self._take(candidates, entries, override)
            if victim is not None:
                return victim
        return self._drained()

    def _take(
        self, candidates: Ranking[str], places: Iterable[Load | None], override: bool = False
    ) -> Load | None:
        """The first candidate, unless it keeps its one of ``places``. The unpinned ones rank first."""
        version = candidates.first()
        if version is None or (self._kept(version, places) and not override):
            return None
        return self._loads[version]

    def _unpinned(self, candidates: Ranking[str]) -> Load | None:
        """The first candidate, unless it is pinned: then all of them are."""
        version = candidates.first()
        return None if version is None or version in self._pins else self._loads[version]

    def _drained(self) -> Load | None:
        loads = (self._loads[version] for version in self._draining)
        return next((load for load in loads if not load.running), None)

    def _drainable(self, now: float, spared: str | None) -> Iterable[Load]:
        """Slots that may be drained.

        One that was filled for its requests and has run none, because the engine is full, is left alone
        for ``slot_patience``: else a full engine would turn waiting into swapping.
        """
        override = not self._pins or all(
            load is not None and self._kept(load.version, self._slots) for load in self._slots
        )
        for load in self._slots:
            if load is None or load.state is not State.ACTIVE or load.draining or load.version == spared:
                continue
            if not override and self._kept(load.version, self._slots):
                continue
            ripe = load.active_since + self._limits.slot_patience
            if load.has_run or load.version not in self._claims or ripe <= now:
                yield load
            else:
                self._look_again = ripe if self._look_again is None else min(self._look_again, ripe)

    def _kept(self, version: str, places: Iterable[Load | None]) -> bool:
        """Pinned, and its tenant's pins leave one of ``places`` to others."""
        tenant = self._pins.get(version)
        return tenant is not None and any(
            load is None or self._pins.get(load.version) != tenant for load in places
        )

    # --- transitions ---------------------------------------------------------------------------------

    def _start(self, version: str, now: float) -> Load:
        load = Load(self._next_id, version, used=now)
        self._next_id += 1
        self._loads[version] = self._by_id[load.id] = load
        self._change(load, State.STAGING)
        self._emit(Stage(version, load.id))
        return load

    def _activate(self, load: Load) -> None:
        load.slot = self._slots.index(None)
        self._slots[load.slot] = load
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
        self._warming.failed(load.version, load.version in self._pins)
        self._vanish(load)

    def _vanish(self, load: Load) -> None:
        self._leave_slot(load)
        del self._loads[load.version], self._by_id[load.id]
        self._change(load, State.DISK)

    def _leave_slot(self, load: Load) -> None:
        if load.slot is not None:
            self._slots[load.slot] = None
            load.slot = None
        load.draining = load.yielding = False

    def _set_draining(self, load: Load, draining: bool) -> None:
        load.draining = draining
        load.yielding = False
        self._index(load.version)

    def _restart_patience(self, version: str, now: float) -> None:
        claim = self._claims.get(version)
        if claim is not None:
            claim.since, claim.overdue = now, False

    def _change(self, load: Load, state: State) -> None:
        load.state = state
        self._index(load.version)

    def _index(self, version: str) -> None:
        """Bring every index up to date with one version's load, claim and pin."""
        load, claim = self._loads.get(version), self._claims.get(version)
        state = State.DISK if load is None else load.state
        overdue = claim is not None and claim.overdue

        if claim is not None and state is State.DISK:
            self._for_host.add(version, claim.tenant, claim.since)
        else:
            self._for_host.drop(version)
        if claim is not None and state is State.HOST:
            self._for_slot.add(version, claim.tenant, claim.since)
        else:
            self._for_slot.drop(version)
        if claim is not None and not overdue and state not in (State.ACTIVATING, State.ACTIVE):
            self._patient.set(version, claim.since)
        else:
            self._patient.drop(version)
        if claim is not None and overdue and state is State.HOST:
            self._overdue.set(version, claim.since)
        else:
            self._overdue.drop(version)

        pinned = version in self._pins
        if claim is not None and not overdue and state is State.HOST:
            self._young.set(version, (pinned, -claim.since))
        else:
            self._young.drop(version)
        idle = load is not None and claim is None and not load.running
        rank = (pinned, 0.0 if load is None else load.used)
        for index, where in ((self._idle_on_host, State.HOST), (self._idle_in_slot, State.ACTIVE)):
            if idle and state is where:
                index.set(version, rank)
            else:
                index.drop(version)

        self._warming.index(version, state, pinned=pinned, claimed=claim is not None)
        draining = load is not None and load.draining
        _keep(self._staging, version, state is State.STAGING)
        _keep(self._draining, version, draining)
        self._gate(version, state is State.ACTIVE and not draining)

    def _answered(self, load_id: int, state: State) -> Load:
        load = self._by_id.get(load_id)
        if load is None or load.state is not state:
            raise ValueError(f"an answer for load {load_id}, which is not {state}: {load}")
        return load

    def _patience_end(self, version: str) -> float:
        return self._claims[version].since + self._limits.slot_patience

    def _share(self, version: str) -> tuple[float, float]:
        """Its place among those that wait for a slot; the lowest is next."""
        return self._had(version), self._claims[version].since

    def _had(self, version: str) -> float:
        """What the tenant whose claim it is has had."""
        return self._counter(self._claims[version].tenant)

    # --- what is seen --------------------------------------------------------------------------------

    def state(self, version: str) -> State:
        load = self._loads.get(version)
        return State.DISK if load is None else load.state

    def known(self) -> set[str]:
        """Every version that a later move may name."""
        return self._loads.keys() | self._claims.keys() | self._pins.keys() | self._warming.known()

    def slots(self) -> tuple[Slot, ...]:
        return tuple(
            Slot() if load is None else Slot(load.version, load.id, load.state, load.running, load.draining)
            for load in self._slots
        )

    def entries(self) -> tuple[HostEntry, ...]:
        return tuple(
            HostEntry(v, load.id, load.state, load.state.tier, v in self._pins, load.size_bytes)
            for v, load in self._loads.items()
        )

    def __repr__(self) -> str:
        slots = " ".join("-" if load is None else _in_slot(load) for load in self._slots)
        host = " ".join(
            f"{v}{'+' if load.state is State.STAGING else ''}"
            for v, load in self._loads.items()
            if load.slot is None
        )
        return f"slots[{slots}] host[{host}] claims[{' '.join(map(self._claimed, self._claims))}]"

    def _claimed(self, version: str) -> str:
        return f"{version}{'!' if self._claims[version].overdue else ''}"

    def check(self, running: dict[int, tuple[int, int, int]], waited_for: set[str]) -> None:
        """Assert every invariant, given the versions waited for and what runs by load id: requests, tokens
        left, requests that cannot be put aside.
        """
        limits, loads = self._limits, self._loads
        assert len(loads) <= limits.host_slots, f"{len(loads)} host entries"
        assert set(self._claims) == waited_for, f"claims {self._claims}, waiting {waited_for}"
        assert len(self._staging) <= limits.max_staging, f"staging {self._staging}"
        assert {load.id: load for load in loads.values()} == self._by_id
        for index, load in enumerate(self._slots):
            assert load is None or (load.slot == index and loads[load.version] is load)
        for version, load in loads.items():
            in_slot = load.state in (State.ACTIVATING, State.ACTIVE)
            assert load.id < self._next_id
            assert load.version == version
            assert in_slot == (load.slot is not None), f"{load}"
            assert (load.running, load.work, load.fixed) == running.get(load.id, (0, 0, 0)), f"{load}"
            assert not load.yielding or load.draining, f"{load}"
            assert not load.running or load.state is State.ACTIVE, f"{load}"
            assert not load.draining or load.state is State.ACTIVE, f"{load}"
            self._check_indices(version, load, self._claims.get(version))
        for version, claim in self._claims.items():
            self._check_indices(version, loads.get(version), claim)
        self._check_no_strays()
        self._check_settled()

    def _check_indices(self, version: str, load: Load | None, claim: Claim | None) -> None:
        state = State.DISK if load is None else load.state
        idle = load is not None and claim is None and not load.running
        waits = claim is not None and state in (State.DISK, State.STAGING, State.HOST)
        overdue = claim is not None and claim.overdue
        assert (version in self._for_host) == (waits and state is State.DISK)
        assert (version in self._for_slot) == (waits and state is State.HOST)
        assert (version in self._patient) == (waits and not overdue)
        assert (version in self._overdue) == (overdue and state is State.HOST)
        assert (version in self._young) == (waits and not overdue and state is State.HOST)
        assert (version in self._idle_on_host) == (idle and state is State.HOST)
        assert (version in self._idle_in_slot) == (idle and state is State.ACTIVE)
        assert (version in self._staging) == (state is State.STAGING)
        assert (version in self._draining) == (load is not None and load.draining)

    def _check_no_strays(self) -> None:
        """With the membership of every load and claim checked, equal sizes mean equal sets."""
        states = [load.state for load in self._loads.values()]
        claimed = [self.state(version) for version in self._claims]
        assert len(self._for_host) == claimed.count(State.DISK)
        assert len(self._for_slot) == claimed.count(State.HOST)
        assert self._staging | self._draining <= self._loads.keys()
        on_host = [claim for version, claim in self._claims.items() if self.state(version) is State.HOST]
        assert len(self._overdue) == sum(claim.overdue for claim in on_host)
        for version in self._for_slot.leading(len(self._for_slot)):
            assert self._for_slot.rank(version) == self._share(version)
        assert len(self._idle_on_host) <= states.count(State.HOST)
        assert len(self._idle_in_slot) <= states.count(State.ACTIVE)

    def _check_settled(self) -> None:
        """No decision is left undone."""
        assert not self._for_slot or None not in self._slots, "a free slot and a version for it"
        assert not self._for_slot or self._take(self._idle_in_slot, self._slots) is None
        assert len(self._draining) <= max(len(self._for_slot), self._blocked), "a slot drains for nobody"
        staging_full = len(self._staging) == self._limits.max_staging
        entry_free = len(self._loads) < self._limits.host_slots
        assert staging_full or not (self._for_host and entry_free), "a free host entry and a version for it"
        if self._warming.next_to_activate is not None and not self._for_slot:
            assert None not in self._slots, "a free slot and a version to warm"
            assert self._unpinned(self._idle_in_slot) is None
        if self._warming.next_to_stage is not None and not self._for_host and not staging_full:
            assert not entry_free, "a free host entry and a version to warm"
            assert self._unpinned(self._idle_on_host) is self._unpinned(self._idle_in_slot) is None


def _keep(members: set[str], member: str, wanted: bool) -> None:
    (members.add if wanted else members.discard)(member)


def _by_work(load: Load) -> tuple[int, int]:
    return load.work, load.id


def _in_slot(load: Load) -> str:
    mark = {State.ACTIVATING: "+", State.ACTIVE: "~" if load.draining else ""}[load.state]
    return f"{load.version}{mark}:{load.running}"
