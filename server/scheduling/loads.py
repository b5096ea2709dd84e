"""What residency keeps of a version: a load while it is in memory, a claim while requests wait."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from server.scheduling.nouns import HostEntry, Slot, State


@dataclass(slots=True, eq=False)
class Load:
    """One stay of a version in memory, under an engine id of its own.

    ``state`` is DISK once the stay is over, also while requests still run on a load that was lost. ``tenant``
    is the tenant whose request ran on it last; empty until ``has_run``. ``used`` and ``active_since`` are
    times of the plan's clock. ``running`` counts requests, ``work`` is the most output tokens that they can
    still produce, and ``not_preemptible`` counts those of them that cannot be preempted. ``preempting`` is
    set while all of them are being preempted. ``ranks`` is what it takes of slots that are shared.
    """

    id: int
    version: str
    used: float
    tenant: str = ""
    state: State = State.STAGING
    slot: int | None = None
    active_since: float = 0.0
    has_run: bool = False
    draining: bool = False
    running: int = 0
    work: int = 0
    not_preemptible: int = 0
    preempting: bool = False
    size_bytes: int = 0
    ranks: int = 0


def has_room(slots: Sequence[Load | None], load: Load, ranks: int) -> bool:
    """Whether one of ``slots`` is free for ``load``, and so many of the ``ranks`` that all of them share.

    Ranges of ranks pack without waste (``adapters.worker.ranges``), so their sum is all that counts. 0 ranks:
    each has a slot of its own.
    """
    if None not in slots:
        return False
    return not ranks or load.ranks + sum(other.ranks for other in slots if other is not None) <= ranks


@dataclass(slots=True, eq=False)
class Claim:
    """A version that requests wait for, since ``since``.

    ``tenant`` is that of the first request: loading the version is that tenant's turn. ``overdue`` once it
    has waited for ``slot_patience``.
    """

    tenant: str
    since: float
    overdue: bool = False


def by_work(load: Load) -> tuple[int, int]:
    """Sorts loads by the work left on them."""
    return load.work, load.id


def shown_slots(slots: Iterable[Load | None]) -> tuple[Slot, ...]:
    """Slots as a snapshot has them."""
    return tuple(
        Slot() if load is None else Slot(load.version, load.id, load.state, load.running, load.draining)
        for load in slots
    )


def shown_entries(loads: Mapping[str, Load], pins: Container[str]) -> tuple[HostEntry, ...]:
    """Host entries as a snapshot has them."""
    return tuple(
        HostEntry(version, load.id, load.state, load.state.tier, version in pins, load.size_bytes)
        for version, load in loads.items()
    )


def text_of(slots: Iterable[Load | None], loads: Mapping[str, Load], claims: Mapping[str, Claim]) -> str:
    """One line for logs and tests; ``Plan.__repr__`` says how to read it."""
    in_slots = " ".join("-" if load is None else _in_slot(load) for load in slots)
    on_host = " ".join(
        f"{version}{'+' if load.state is State.STAGING else ''}"
        for version, load in loads.items()
        if load.slot is None
    )
    claimed = " ".join(f"{version}{'!' if claim.overdue else ''}" for version, claim in claims.items())
    return f"slots[{in_slots}] host[{on_host}] claims[{claimed}]"


def _in_slot(load: Load) -> str:
    mark = {State.ACTIVATING: "+", State.ACTIVE: "~" if load.draining else ""}[load.state]
    return f"{load.version}{mark}:{load.running}"
