"""The scheduler's contract on one page: what it is told, what it answers, and within which limits.

    events    what happened: the methods of ``Scheduler``; each returns the effects that follow from it
    effects   what is to be done: ``Stage, Activate, Deactivate, Evict`` for adapters, ``Run, Preempt,
              Refuse`` for requests, ``Warmed`` for whoever asked for a load
    nouns     ``Capacity`` (the limits), ``Ask`` (a request), ``Refusal`` (why not), ``Snapshot`` (what is
    seen)

The scheduler (``plan.Plan``) is pure: it reads no clock and calls nothing. The dispatcher tells it every
event with the time, carries out the effects in the order in which they are returned, and reports what came of
them as further events.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from adapters.model import Tier

# A request that can be asked in parts takes at most one in so many of the engine's places.
_SHARE = 4


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the engine holds, and how long somebody may wait for a part of it.

    ``gpu_slots`` and ``host_slots`` count adapters, ``max_running`` sequences, ``max_staging`` loads from
    disk at the same time, ``max_queued`` waiting requests of one tenant. ``slot_patience``, ``preempt_after``
    and ``queue_timeout`` are in seconds. ``slot_ranks``: what slots share, where they do; see ``has_room``.
    """

    gpu_slots: int
    host_slots: int
    max_running: int
    max_staging: int = 2
    slot_patience: float = 2.0
    preempt_after: float = 10.0
    queue_timeout: float = 60.0
    max_queued: int = 256
    slot_ranks: int = 0

    def __post_init__(self) -> None:
        if min(self.gpu_slots, self.max_running, self.max_staging) < 1 or self.host_slots < self.gpu_slots:
            raise ValueError(f"limits must be at least 1, and host_slots at least gpu_slots: {self}")


def together(count: int, max_running: int) -> int:
    """How many of a request's ``count`` sequences run at once, of ``max_running`` in the engine.

    Until all that it takes are free at once, it may hold up others.
    """
    return min(count, max(1, max_running // _SHARE))


@dataclass(frozen=True, slots=True)
class Ask:
    """A request as the scheduler sees it.

    ``id`` is unique among the requests that have not ended. ``version`` is a ``Version.key``, or None for the
    base model. ``prompt_tokens`` is an estimate: the scheduler charges it when the request runs, and corrects
    it as the request progresses. ``max_tokens`` bounds the output of each of its ``sequences`` (n times the
    number of prompts). ``weight`` divides what the tokens cost its tenant. ``max_queued`` and ``max_running``
    are the tenant's own limits in requests and sequences; None leaves the server's. ``resumable`` says that
    the engine can stop the request once it runs, and continue it later with the same tokens. ``elsewhere`` is
    what the other replicas of a fleet have served the tenant so far, as their ``FairQueue.served`` says.

    Raises ValueError for fewer than one sequence, and for a weight that is not positive.
    """

    id: str
    tenant: str
    version: str | None
    prompt_tokens: int
    max_tokens: int
    sequences: int = 1
    weight: float = 1.0
    max_queued: int | None = None
    max_running: int | None = None
    resumable: bool = False
    elsewhere: float = 0.0

    def __post_init__(self) -> None:
        if self.sequences < 1 or not self.weight > 0:
            raise ValueError(f"a request needs a sequence and a positive weight: {self}")


# --- effects -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stage:
    """Read ``version`` from disk into host memory. Answer with ``staged`` or ``stage_failed``."""

    version: str
    load_id: int


@dataclass(frozen=True, slots=True)
class Activate:
    """Copy a staged load into a GPU slot. Answer with ``activated`` or ``activation_failed``."""

    version: str
    load_id: int


@dataclass(frozen=True, slots=True)
class Deactivate:
    """Take a load out of its slot. The scheduler counts it as done and expects no answer."""

    version: str
    load_id: int


@dataclass(frozen=True, slots=True)
class Evict:
    """Take a load out of host memory. The scheduler counts it as done and expects no answer."""

    version: str
    load_id: int


@dataclass(frozen=True, slots=True)
class Run:
    """Start the request in the engine, or resume it. Answer with ``finished`` or ``cancelled``."""

    id: str


@dataclass(frozen=True, slots=True)
class Preempt:
    """Stop the request in the engine; its next ``Run`` resumes it.

    Answer with ``preempted`` or ``preempt_refused``, unless the request ends first.
    """

    id: str


class Refusal(StrEnum):
    """Why the scheduler does not do what it was asked for."""

    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"
    ADAPTER_UNAVAILABLE = "adapter_unavailable"
    DRAINING = "draining"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class Refuse:
    """The one outcome of a request that does not run, or does not go on.

    ``retry_after`` is in seconds, None if no time can be told. ``detail`` is for the log, and where the
    version is quarantined the reason that the client is told.
    """

    id: str
    reason: Refusal
    retry_after: float | None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Warmed:
    """The one answer to all who asked to ``warm`` this version: it is there, or the reason why it is not."""

    version: str
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Take this version out of service: ``reason`` is a clause, as in "it made NaN"."""

    version: str
    reason: str


@dataclass(frozen=True, slots=True)
class Suspect:
    """These versions, and no others, are suspected of having ended the engine. They outlive the process."""

    versions: frozenset[str]


Move = Stage | Activate | Deactivate | Evict
Effect = Move | Run | Preempt | Refuse | Warmed | Quarantine | Suspect


# --- events ------------------------------------------------------------------------------------------


class Scheduler(Protocol):
    """All that can happen. ``now`` is in seconds of a clock that never goes back.

    Each event returns its effects in the order in which they are to be carried out. An event that cannot have
    happened (an answer nobody waits for, an id that is in use) raises ValueError and changes nothing.
    """

    def submitted(self, now: float, ask: Ask) -> list[Effect]:
        """A new request. It gets exactly one Run or Refuse, now or later, unless it is cancelled before.

        Refused at once while draining, and where its tenant has ``max_queued`` requests waiting.
        """

    def cancelled(self, now: float, id: str) -> list[Effect]:
        """The client left. Of a running request: tell it once the engine has stopped the request.

        Does nothing if the request has ended.
        """

    def progressed(self, now: float, id: str, prompt_tokens: int, output_tokens: int) -> list[Effect]:
        """How many tokens a running request has used so far, in total. Totals never count backwards.

        Every token is charged to the request's tenant once. Does nothing if the request does not run.
        """

    def finished(self, now: float, id: str, completed: bool = True) -> list[Effect]:
        """A running or preempted request ended. Does nothing if it has ended before.

        ``completed`` unless it was cancelled, or failed; that tells for its version, where it is a suspect.
        """

    def preempted(self, now: float, id: str) -> list[Effect]:
        """The engine has stopped the request, which now waits for its next Run without a time limit.

        Does nothing if the request has ended.
        """

    def preempt_refused(self, now: float, id: str) -> list[Effect]:
        """The engine cannot stop the request and resume it. The scheduler will not ask for that again."""

    def staged(self, now: float, load_id: int, size_bytes: int = 0, ranks: int = 0) -> list[Effect]:
        """A load is in host memory and takes ``size_bytes`` there, and ``ranks`` of a slot that is shared."""

    def stage_failed(self, now: float, load_id: int, detail: str) -> list[Effect]:
        """A load could not be read. Refuses the requests that wait for it; the next one starts a new load."""

    def activated(self, now: float, load_id: int) -> list[Effect]:
        """A load is in its slot; requests can run on it."""

    def activation_failed(self, now: float, load_id: int, detail: str) -> list[Effect]:
        """A load could not be copied into its slot. It is evicted, and its requests are refused."""

    def lost(self, now: float, load_id: int) -> list[Effect]:
        """The worker does not hold this load any more. Ignores unknown loads and those under way."""

    def engine_stopped(self, now: float, resumable: Collection[str]) -> list[Effect]:
        """The engine is gone, and every load with it. Nothing is staged, run or preempted until it is back.

        What waits keeps its place and its time limit. Of what runs, ``resumable`` (ids) waits again, as after
        ``preempted``; everything else that runs is still to be ``finished`` or ``cancelled``. The versions of
        what ran are suspects; those that were suspects before are quarantined, and so is one that ran at all
        losses in ten minutes where that can hardly be chance. What waits for them is refused.
        """

    def recall(self, now: float, losses: Sequence[Mapping[str, Any]]) -> list[Effect]:
        """Losses in a process before this one, as ``evidence.Loss.as_json`` with times of this clock."""

    def engine_started(self, now: float) -> list[Effect]:
        """The engine is back, and holds no load. The ids of earlier loads stay burned."""

    def quarantined(self, now: float, version: str, reason: str) -> list[Effect]:
        """``version`` is out of service: refuses what waits for it, also what has run and was put aside."""

    def pin(self, now: float, version: str, pinned: bool, tenant: str) -> list[Effect]:
        """Keep ``version`` in a slot on account of ``tenant``, or stop doing so.

        A pinned version that is not in a slot is loaded as soon as no request waits for that room.
        """

    def retire(self, now: float, version: str) -> list[Effect]:
        """``version`` was deleted: what waits or runs goes on, then it is evicted. Pin and warm undo that."""

    def warm(self, now: float, version: str, slot: bool) -> list[Effect]:
        """Stage ``version``, and with ``slot`` activate it, without a request.

        It takes only room that is free, or held by an idle version that is not pinned. Answered by one
        Warmed, unless ``unwarm`` comes first.
        """

    def unwarm(self, now: float, version: str) -> list[Effect]:
        """Nobody waits for ``version`` to be warm any more."""

    def drain(self, now: float) -> list[Effect]:
        """The server shuts down: refuse all that waits and all that comes. What runs goes on."""

    def tick(self, now: float) -> list[Effect]:
        """Time has passed. Due at ``next_deadline()``."""

    def next_deadline(self) -> float | None:
        """When ``tick`` is due; None if nothing happens by time alone."""


# --- what is seen ------------------------------------------------------------------------------------


class State(StrEnum):
    """Where a load is; see ``residency``."""

    DISK = "disk"
    STAGING = "staging"
    HOST = "host"
    ACTIVATING = "activating"
    ACTIVE = "active"

    @property
    def tier(self) -> Tier:
        """The tier whose room the load takes; DISK until it is staged."""
        if self in (State.ACTIVATING, State.ACTIVE):
            return Tier.GPU
        return Tier.HOST if self is State.HOST else Tier.DISK

    @property
    def is_staged(self) -> bool:
        """Whether host memory holds all of it."""
        return self.tier is not Tier.DISK


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


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state at one moment, for operators and metrics.

    ``queued`` counts requests and ``running`` sequences, of the tenants that have any. ``counters`` are the
    virtual token counters of the tenants that are remembered. ``aside`` counts requests that were preempted
    and wait to go on. ``drains`` counts slots ever drained for another version, ``preemptions`` requests ever
    preempted.
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


def by_tenant(queues: Mapping[str, int]) -> dict[str, int]:
    """What waits in the background counts as its tenant's."""
    found: dict[str, int] = {}
    for queue, number in queues.items():
        tenant = queue.partition("/")[0]
        found[tenant] = found.get(tenant, 0) + number
    return found
