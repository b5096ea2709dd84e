"""The invariants of ``Residency``, apart from its decisions.

Each check is a generator that does a small piece of work between two steps, so that a large state can be
checked without holding the event loop up. The state must not change between the first step and the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set

from server.scheduling import victims
from server.scheduling.loads import has_room
from server.scheduling.nouns import State
from server.scheduling.residency import Residency

# By load id, of what runs on it: requests, tokens left, requests that cannot be preempted.
Running = Mapping[int, tuple[int, int, int]]


def check_steps(residency: Residency, running: Running, waited_for: Set[str]) -> Iterator[None]:
    """Assert every invariant, given what runs on each load and for which versions requests wait."""
    yield from _check_loads(residency, running)
    yield from _check_claims(residency, waited_for)
    yield from _check_no_strays(residency)
    yield from residency.indices.check_shares(residency.share)
    _check_settled(residency)
    _check_prefetch_settled(residency)


def _check_loads(residency: Residency, running: Running) -> Iterator[None]:
    capacity, loads, indices = residency.capacity, residency.loads, residency.indices
    assert len(loads) <= capacity.host_slots, f"{len(loads)} host entries"
    assert len(loads) == len(residency.loads_by_id)
    assert len(indices.staging) <= capacity.max_staging, f"staging {indices.staging}"
    for index, in_slot in enumerate(residency.in_slots):
        assert in_slot is None or (in_slot.slot == index and loads[in_slot.version] is in_slot)
        yield
    ranks = sum(in_slot.ranks for in_slot in residency.in_slots if in_slot is not None)
    assert ranks <= capacity.slot_ranks or not capacity.slot_ranks, f"{ranks} ranks in slots"
    for version, load in loads.items():
        has_slot = load.state in (State.ACTIVATING, State.ACTIVE)
        assert load.id < residency.next_id
        assert residency.loads_by_id[load.id] is load
        assert load.version == version
        assert has_slot == (load.slot is not None), f"{load}"
        counted = (load.running, load.work, load.not_preemptible)
        assert counted == running.get(load.id, (0, 0, 0)), f"{load}"
        assert not load.preempting or load.draining, f"{load}"
        assert not load.running or load.state is State.ACTIVE, f"{load}"
        assert not load.draining or load.state is State.ACTIVE, f"{load}"
        indices.check(version, load, residency.claims.get(version))
        yield


def _check_claims(residency: Residency, waited_for: Set[str]) -> Iterator[None]:
    claims = residency.claims
    assert len(claims) == len(waited_for), f"{len(claims)} claims, {len(waited_for)} waited for"
    of_tenants: dict[str, int] = {}
    for version, claim in claims.items():
        assert version in waited_for, f"a claim of {version}, for which nothing waits"
        residency.indices.check(version, residency.loads.get(version), claim)
        of_tenants[claim.tenant] = of_tenants.get(claim.tenant, 0) + 1
        yield
    assert of_tenants == residency.claims_of, "claims by tenant do not add up"


def _check_no_strays(residency: Residency) -> Iterator[None]:
    """With the membership of every load and claim checked, equal sizes mean equal sets."""
    indices = residency.indices
    states = dict.fromkeys(State, 0)
    for load in residency.loads.values():
        states[load.state] += 1
        yield
    claimed = dict.fromkeys(State, 0)
    overdue = 0
    for version, claim in residency.claims.items():
        state = residency.state(version)
        claimed[state] += 1
        overdue += state is State.HOST and claim.overdue
        yield
    assert len(indices.for_host) == claimed[State.DISK]
    assert len(indices.for_slot) == claimed[State.HOST]
    assert indices.staging | indices.draining <= residency.loads.keys()
    assert len(indices.overdue) == overdue
    assert len(indices.idle_on_host) <= states[State.HOST]
    assert len(indices.idle_in_slot) <= states[State.ACTIVE]


def _check_settled(residency: Residency) -> None:
    """No decision for a claim is left undone."""
    if residency.is_stopped:
        return
    indices, slots = residency.indices, residency.in_slots
    if waiting := indices.for_slot.leading(len(indices.for_slot)):
        # One that is too wide for what is free holds up those behind it, or they would starve it.
        rooms = (has_room(slots, residency.loads[v], residency.capacity.slot_ranks) for v in waiting)
        assert not all(rooms), "a free slot and a version for it"
    assert not indices.for_slot or victims.first_idle(indices.idle_in_slot, slots, residency.pins) is None
    wanted = max(len(indices.for_slot), residency.is_blocked)
    assert len(indices.draining) <= wanted, "a slot drains for nobody"
    staging_full = len(indices.staging) == residency.capacity.max_staging
    entry_free = len(residency.loads) < residency.capacity.host_slots
    assert staging_full or not (indices.for_host and entry_free), "a free host entry and a version for it"


def _check_prefetch_settled(residency: Residency) -> None:
    """No prefetch is left undone."""
    if residency.is_stopped:
        return
    indices, prefetch, pins = residency.indices, residency.prefetch, residency.pins
    if prefetch.next_to_activate is not None and not indices.for_slot:
        load, ranks = residency.loads[prefetch.next_to_activate], residency.capacity.slot_ranks
        assert not has_room(residency.in_slots, load, ranks), "a free slot and a version to warm"
        assert victims.first_unpinned(indices.idle_in_slot, pins) is None
    staging_full = len(indices.staging) == residency.capacity.max_staging
    if prefetch.next_to_stage is not None and not indices.for_host and not staging_full:
        entry_free = len(residency.loads) < residency.capacity.host_slots
        assert not entry_free, "a free host entry and a version to warm"
        assert victims.first_unpinned(indices.idle_on_host, pins) is None
        assert victims.first_unpinned(indices.idle_in_slot, pins) is None
