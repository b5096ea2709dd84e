"""Whose place may be given away. Pure functions of loads, pins and claims, for ``residency``.

Idle ones go least recently used first. Pinned versions keep their places, with two exceptions: those of a
single tenant do not keep the last one, and where everything is pinned an overdue claim overrides the pins.
Prefetches never do, so pins cannot push each other in circles.

Why nobody waits forever: claims get host entries by turns, so each comes first at some time, and slots at the
latest when their tenant starves. Then a slot drains, and what runs there ends or is preempted. Only an
overdue claim pushes out another, and never one that is overdue itself, so two cannot push each other in
circles.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from server.scheduling.indices import Indices
from server.scheduling.loads import Claim, Load, by_work
from server.scheduling.nouns import State
from server.scheduling.ranking import Ranking

# Of ``slot_patience``: how long a version has its slot at least before its tenant's share counts against it.
TURN_FRACTION = 0.25
# Times ``slot_patience``: how long a tenant waits for its next slot before it comes before all others.
STARVING = 3.0

Pins = Mapping[str, str]  # version -> the tenant on whose account it is pinned


def is_kept(version: str, places: Iterable[Load | None], pins: Pins) -> bool:
    """Whether a pin keeps ``version`` where it is.

    The pins of a single tenant never keep the last of ``places`` (slots or host entries) from others.
    """
    tenant = pins.get(version)
    return tenant is not None and any(load is None or pins.get(load.version) != tenant for load in places)


def first_idle(
    idle: Ranking[str], places: Iterable[Load | None], pins: Pins, override: bool = False
) -> str | None:
    """The first of ``idle`` unless a pin keeps it; ``override`` takes it all the same.

    Versions without a pin rank before the pinned ones, so only the first has to be looked at.
    """
    version = idle.first()
    if version is None or (is_kept(version, places, pins) and not override):
        return None
    return version


def first_unpinned(idle: Ranking[str], pins: Pins) -> str | None:
    """The first of ``idle``, unless it is pinned: then all of them are."""
    version = idle.first()
    return None if version is None or version in pins else version


def drained(draining: Iterable[Load]) -> Load | None:
    """A slot that was closed to new requests and has nothing running any more."""
    return next((load for load in draining if not load.running), None)


def to_push_out(rankings: Iterable[Ranking[str]], entries: Collection[Load], pins: Pins) -> str | None:
    """Whose host entry an overdue claim gets where no idle one is free to take: the first of ``rankings``.

    Pins are overridden only where they keep every entry.
    """
    override = all(is_kept(load.version, entries, pins) for load in entries)
    found = (first_idle(candidates, entries, pins, override) for candidates in rankings)
    return next((version for version in found if version is not None), None)


def for_slot(
    indices: Indices, loads: Mapping[str, Load], slots: Sequence[Load | None], pins: Pins
) -> Load | None:
    """Whose slot a claim gets where none is free: an idle one, else a drained one."""
    version = first_idle(indices.idle_in_slot, slots, pins)
    return drained(loads[v] for v in indices.draining) if version is None else loads[version]


def for_entry(indices: Indices, loads: Mapping[str, Load], pins: Pins, overdue: bool) -> Load | None:
    """Whose host entry a claim gets where none is free: idle on the host, idle in a slot, or pushed out."""
    entries = loads.values()
    version = first_idle(indices.idle_on_host, entries, pins)
    version = version or first_idle(indices.idle_in_slot, entries, pins)
    if version is None and overdue:
        version = to_push_out((indices.idle_on_host, indices.idle_in_slot, indices.young), entries, pins)
        if version is None:
            return drained(loads[v] for v in indices.draining)
    return None if version is None else loads[version]


def quiet(loads: Mapping[str, Load], pins: Pins, *rankings: Ranking[str]) -> Load | None:
    """The first idle load of ``rankings`` that no pin keeps: all that a prefetch may take."""
    found = (first_unpinned(idle, pins) for idle in rankings)
    version = next((version for version in found if version is not None), None)
    return None if version is None else loads[version]


def drainable(
    slots: Sequence[Load | None],
    pins: Pins,
    claims: Mapping[str, Claim],
    now: float,
    spared: str | None,
    slot_patience: float,
) -> tuple[list[Load], float | None]:
    """The slots that may be drained, and when the first of those becomes ripe that are not yet.

    A load that was activated for its requests and has run none, because the engine is full, is left alone for
    ``slot_patience`` seconds: otherwise a full engine would turn waiting into swapping. ``spared`` is a
    version that is left alone in any case. Pins are overridden only where they keep every slot.
    """
    override = not pins or all(load is not None and is_kept(load.version, slots, pins) for load in slots)
    found: list[Load] = []
    ripe_at: float | None = None
    for load in slots:
        if load is None or load.state is not State.ACTIVE or load.draining or load.version == spared:
            continue
        if not override and is_kept(load.version, slots, pins):
            continue
        ripe = load.active_since + slot_patience
        if load.has_run or load.version not in claims or ripe <= now:
            found.append(load)
        else:
            ripe_at = soonest(ripe_at, ripe)
    return found, ripe_at


def of_tenant_with_most(
    loads: Iterable[Load], counter: Callable[[str], float], level: float, now: float, turn: float
) -> tuple[Load | None, float | None]:
    """The slot of the tenant that has had most, if that is more than ``level``; the least work left on a tie.

    A slot that its version has had for less than ``turn`` seconds is left alone; the second value is when the
    first of those may be taken.
    """
    best: tuple[float, int] | None = None
    choice = None
    ripe_at: float | None = None
    for load in loads:
        had = counter(load.tenant)
        if had <= level:
            continue
        until = load.active_since + turn
        if until > now:
            ripe_at = soonest(ripe_at, until)
        elif best is None or (had, -load.work) > best:
            best, choice = (had, -load.work), load
    return choice, ripe_at


def preemptible(loads: Iterable[Load]) -> list[Load]:
    """Those of ``loads`` on which something runs, and all of that can be preempted."""
    return [load for load in loads if load.running and not load.not_preemptible]


def to_preempt(able: Sequence[Load], now: float, preempt_after: float) -> tuple[Load | None, float | None]:
    """The load with the least work left, of those that have had their slot for ``preempt_after`` seconds.

    Where there is none, the second value is when one of ``able`` will be.
    """
    ripe = (load for load in able if load.active_since + preempt_after <= now)
    choice = min(ripe, key=by_work, default=None)
    again = min((load.active_since + preempt_after for load in able), default=None)
    return choice, None if choice is not None else again


def soonest(one: float | None, other: float | None) -> float | None:
    """The earlier of two times, either of which may be None for never."""
    return other if one is None else one if other is None else min(one, other)
