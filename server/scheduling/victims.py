"""Whose place may be given away. Pure functions of loads, pins and claims, for ``residency``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from server.scheduling.loads import Claim, Load, by_work
from server.scheduling.nouns import State
from server.scheduling.ranking import Ranking

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
