"""The nouns of residency: limits, the moves between tiers, the states of a load, and how they are shown."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from adapters.model import Tier


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_running`` counts sequences; times are in seconds."""

    gpu_slots: int
    host_slots: int
    max_running: int
    max_staging: int = 2
    slot_patience: float = 2.0
    preempt_after: float = 10.0
    queue_timeout: float = 60.0
    max_queued: int = 256

    def __post_init__(self) -> None:
        if min(self.gpu_slots, self.max_running, self.max_staging) < 1 or self.host_slots < self.gpu_slots:
            raise ValueError(f"limits must be at least 1, and host_slots at least gpu_slots: {self}")


@dataclass(frozen=True, slots=True)
class Stage:
    """Read it from disk into host memory; answered by staged or stage_failed."""

    version: str
    load_id: int


@dataclass(frozen=True, slots=True)
class Activate:
    """Copy it into a slot; answered by activated or activation_failed."""

    version: str
    load_id: int


@dataclass(frozen=True, slots=True)
class Deactivate:
    """Take it out of its slot. Counts as done."""

    version: str
    load_id: int


@dataclass(frozen=True, slots=True)
class Evict:
    """Take it out of host memory. Counts as done."""

    version: str
    load_id: int


Move = Stage | Activate | Deactivate | Evict


class Refusal(StrEnum):
    """Why something that was asked for does not happen."""

    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"
    ADAPTER_UNAVAILABLE = "adapter_unavailable"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Warmed:
    """What ``warm`` asked for is there, or why it will not be. The one answer to all who asked."""

    version: str
    refusal: Refusal | None = None


class State(StrEnum):
    DISK = "disk"
    STAGING = "staging"
    HOST = "host"
    ACTIVATING = "activating"
    ACTIVE = "active"

    @property
    def tier(self) -> Tier:
        if self in (State.ACTIVATING, State.ACTIVE):
            return Tier.GPU
        return Tier.HOST if self is State.HOST else Tier.DISK

    @property
    def is_staged(self) -> bool:
        return self.tier is not Tier.DISK


@dataclass(slots=True, eq=False)
class Load:
    """One stay of a version in memory. DISK once it is over, also while requests still run on a lost one.

    ``tenant`` is whose request ran on it last; it is empty until ``has_run``.
    ``running`` counts requests, ``work`` is the most output tokens that they can still produce. ``fixed``
    counts those of them that cannot be put aside; ``yielding`` is set while all of them are being.
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
    fixed: int = 0
    yielding: bool = False
    size_bytes: int = 0


@dataclass(slots=True, eq=False)
class Claim:
    """A version that requests wait for. ``tenant`` is the first one's, whose turn a load takes."""

    tenant: str
    since: float
    overdue: bool = False


@dataclass(frozen=True, slots=True)
class Slot:
    """A GPU slot as it is shown; all None when free. ``running`` counts requests."""

    version: str | None = None
    load_id: int | None = None
    state: State | None = None
    running: int = 0
    draining: bool = False


@dataclass(frozen=True, slots=True)
class HostEntry:
    """A version that takes room in host memory. ``tier`` is DISK until it is staged."""

    version: str
    load_id: int
    state: State
    tier: Tier
    pinned: bool
    size_bytes: int
