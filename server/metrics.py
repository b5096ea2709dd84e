"""What Prometheus sees: the only file that imports prometheus_client.

Counters and histograms are written where things happen; gauges are read from the dispatcher's state at
scrape time, so they can never drift from it. vLLM's own metrics live in the default registry and are
served from the same page.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, disable_created_metrics
from prometheus_client import generate_latest as _as_text
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as _OPENMETRICS
from prometheus_client.openmetrics.exposition import generate_latest as _as_openmetrics

from server.logs import REQUEST
from server.telemetry.by_adapter import ByAdapter, Loaded
from server.telemetry.pace import Pace, pressure_of
from server.telemetry.recent import Recent
from server.telemetry.series import Count, Family, Form, counter, gauge, histogram

# A creation time beside every counter says nothing here and makes the page a third longer.
disable_created_metrics()  # type: ignore[no-untyped-call]

CONTENT_TYPES: dict[Form, str] = {"text": CONTENT_TYPE_LATEST, "openmetrics": _OPENMETRICS}

# How a request ended; ``quarantined``: the version that it asked for is out of service.
Outcome = Literal[
    "completed", "disconnected", "rejected", "refused", "quarantined", "unavailable", "failed", "cut"
]

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_GAP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Gauges:
    """The server's state at one moment. ``adapters`` counts versions by tier, disk meaning on disk alone.

    ``loaded`` are the versions in memory; ``build`` says what runs here, as labels;
    ``disk_free`` are the bytes left for adapters, ``usage_aside`` files of usage not read whole.
    ``most_running`` is how many sequences the engine of this process runs at once, 0 where it has none.
    """

    adapters: Mapping[str, int]
    slots: int
    slots_used: int
    host_slots: int
    queued: Mapping[str, int]
    running: Mapping[str, int]
    in_step_loads: int
    quarantined: int = 0
    unfit: int = 0
    damaged: int = 0
    differing: int = 0
    rollouts: Mapping[str, int] = field(default_factory=dict)
    busy_slots: int = 0
    most_running: int = 0
    replicas: Sequence[ReplicaGauges] = ()
    loaded: Sequence[Loaded] = ()
    build: Mapping[str, str] | None = None
    disk_free: int | None = None
    usage_aside: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaGauges:
    """A replica as a gateway knows it; ``up`` if it may be sent something, ``verifying`` if not yet."""

    id: str
    up: bool
    running: int
    queued: int
    slots_used: int
    backlog: float = 0.0
    verifying: bool = False


@dataclass(frozen=True, slots=True)
class TokenTimes:
    """Where one stream tells its times, in seconds: ``first`` from arrival, ``gap`` between two tokens."""

    first: Callable[[float], None]
    gap: Callable[[float], None]


class Metrics:
    """One server's metrics.

    ``tenants`` bounds the label values; tenants beyond it share ``other``. ``adapters`` bounds versions with
    metrics of their own. Both may be changed; a label that exists stays.
    """

    def __init__(self, *, tenants: int = 100, adapters: int = 100) -> None:
        self.tenants = tenants
        self._labels: set[str] = set()
        self._started: set[str] = set()
        self._consumption: dict[str, tuple[Count, Count, Count]] = {}
        self.recent = Recent()
        self.pace = Pace(time.monotonic())
        self.by_adapter = ByAdapter(adapters)
        self._requests = counter(
            "loraplex_requests", "Inference requests, by how they ended.", "tenant", "outcome"
        )
        self._replays = counter(
            "loraplex_rollout_replays", "Prompts that rollouts have replayed on both versions.", "outcome"
        )
        self._replay_tokens = counter(
            "loraplex_rollout_replay_tokens", "Tokens of such replays, which no customer is billed for."
        )
        self._prompt_tokens = counter(
            "loraplex_prompt_tokens", "Prompt tokens of requests that ran.", "tenant"
        )
        self._cached_tokens = counter(
            "loraplex_cached_tokens", "Prompt tokens found in the prefix cache.", "tenant"
        )
        self._output_tokens = counter(
            "loraplex_output_tokens", "Output tokens produced, also for clients that left.", "tenant"
        )
        self._ttft = histogram(
            "loraplex_time_to_first_token_seconds",
            "From arrival to the first token of a streamed answer.",
            "tenant",
            buckets=_LATENCY,
        )
        self._itl = histogram(
            "loraplex_inter_token_latency_seconds",
            "Between two tokens of a streamed answer.",
            "tenant",
            buckets=_TOKEN_GAP,
        )
        self._queue = histogram(
            "loraplex_queue_seconds",
            "From arrival until the engine took the request.",
            "tenant",
            buckets=_LATENCY,
        )
        self._stage = histogram("loraplex_stage_seconds", "Disk to host memory.", buckets=_LATENCY)
        self._fetch = histogram(
            "loraplex_fetch_seconds",
            "Object store to the data folder, by outcome.",
            "outcome",
            buckets=_LATENCY,
        )
        self._activate = histogram(
            "loraplex_activation_seconds", "Host memory to a slot, with the steps between.", buckets=_LATENCY
        )
        self._evictions = counter("loraplex_evictions", "Adapters moved out of a tier.", "tier")
        self._preemptions = counter(
            "loraplex_preemptions", "Answers put aside for another adapter.", "tenant"
        )
        self._failures = counter("loraplex_load_failures", "Loads that failed, by step.", "step")
        self._restarts = counter(
            "loraplex_engine_restarts", "Times the engine was lost and started again.", "reason"
        )
        self._plan_checks = counter(
            "loraplex_plan_check_failures", "Times the scheduler's check of itself failed."
        )
        self._verified = counter(
            "loraplex_verified_versions",
            "Versions held against their probes.json because the engine, its dtype or the base had changed.",
            "result",
        )
        self._wrong_keys = counter("loraplex_wrong_keys", "Requests with a key that is nobody's.")
        self._local_limits = counter(
            "loraplex_limited_locally", "Requests whose limits were counted without Redis."
        )
        self._budgets = counter(
            "loraplex_budget_requests",
            "Requests beyond a soft budget (warned) or a hard one (refused).",
            "tenant",
            "kind",
        )
        self._placements = counter(
            "loraplex_placements",
            "Requests sent to a replica, by the tier of their adapter there; gpu for the base.",
            "tier",
        )
        self._adapter_moves = counter(
            "loraplex_adapter_moves", "Adapters loaded at a replica for what a gateway will send there."
        )
        self._moves = counter(
            "loraplex_moved_answers",
            "Answers that left their replica, which was lost or drained, or failed with it.",
            "reason",
        )
        # There from the start: an increase from nothing to 1 is none to Prometheus.
        for family, values in (
            (self._restarts, ("death", "hang")),
            (self._failures, ("stage", "activate")),
            (self._verified, ("matches", "differs", "not_possible", "late")),
            (self._fetch, ("fetched", "failed")),
            (self._evictions, ("gpu", "host")),
            (self._moves, ("lost", "drained", "failed")),
            (self._replays, ("compared", "failed")),
        ):
            for value in values:
                family.labels(value)
        self._replay_tokens.labels()

        self._batch_lines = counter(
            "loraplex_batch_lines",
            "Lines of batches that have their result, by what it is.",
            "tenant",
            "result",
        )
        self._batches = counter("loraplex_batches", "Batches that have ended, by how.", "tenant", "state")

    def label(self, tenant: str) -> str:
        """``tenant``, or ``other`` once there are as many labels as there may be."""
        if tenant in self._labels:
            return tenant
        if len(self._labels) < self.tenants:
            self._labels.add(tenant)
            return tenant
        return OTHER

    def queued(self, tenant: str, seconds: float) -> None:
        """A request left the queue after ``seconds``."""
        self._queue.labels(self.label(tenant)).observe(seconds, _trace())

    def token_times(self, tenant: str) -> TokenTimes:
        """For one stream of ``tenant``: finding a label for every token costs as much as counting it."""
        label = self.label(tenant)
        observe = self._ttft.labels(label).observe

        def first(seconds: float) -> None:
            observe(seconds, _trace())
            self.recent.first(seconds)

        return TokenTimes(first, self._itl.labels(label).observe)

    def ended(self, tenant: str, outcome: Outcome) -> None:
        """A request of ``tenant`` had its outcome."""
        self.pace.ended(time.monotonic())
        label = self.label(tenant)
        if label not in self._started:  # all series from the start: a rate needs a 0 to begin with
            self._started.add(label)
            for possible in get_args(Outcome):
                self._requests.labels(label, possible)
            self.consumed(tenant, 0, 0, 0)
        self._requests.labels(label, outcome).inc()

    def consumed(self, tenant: str, prompt: int, cached: int, output: int) -> None:
        """Tokens since the last call, of a request that may still run."""
        self.recent.output += output
        label = self.label(tenant)
        counts = self._consumption.get(label)
        if counts is None:
            families = self._prompt_tokens, self._cached_tokens, self._output_tokens
            counts = families[0].labels(label), families[1].labels(label), families[2].labels(label)
            self._consumption[label] = counts
        for count, tokens in zip(counts, (prompt, cached, output), strict=True):
            count.inc(tokens)

    def staged(self, seconds: float) -> None:
        """A load from disk into host memory took ``seconds``."""
        self._stage.labels().observe(seconds)

    def fetched(self, fetched: bool, seconds: float) -> None:
        """A fetch of a version's files took ``seconds``, and came to be or failed."""
        self._fetch.labels("fetched" if fetched else "failed").observe(seconds)

    def activated(self, seconds: float) -> None:
        """A copy into a slot took ``seconds``."""
        self._activate.labels().observe(seconds)

    def evicted(self, tier: Literal["gpu", "host"]) -> None:
        """An adapter had to leave ``tier``."""
        self._evictions.labels(tier).inc()

    def preempted(self, tenant: str) -> None:
        """An answer of ``tenant`` was put aside for another adapter."""
        self._preemptions.labels(self.label(tenant)).inc()

    def budget(self, tenant: str, kind: str) -> None:
        """A request went beyond a budget: ``kind`` is ``soft`` or ``hard``."""
        self._budgets.labels(self.label(tenant), kind).inc()

    def limited_locally(self) -> None:
        """Counts a request that was admitted while Redis did not answer."""
        self._local_limits.labels().inc()

    def wrong_key(self) -> None:
        """Counts a request with a key that is nobody's."""
        self._wrong_keys.labels().inc()

    def verified(
        self, result: Literal["matches", "differs", "not_possible", "late"], versions: int = 1
    ) -> None:
        """Golden probes were held against this engine; ``late``: not before it took requests."""
        self._verified.labels(result).inc(versions)

    def load_failed(self, step: Literal["stage", "activate"]) -> None:
        """A load failed at ``step``."""
        self._failures.labels(step).inc()

    def placed(self, tier: str) -> None:
        """A gateway sent a request to a replica that had its adapter in ``tier``."""
        self._placements.labels(tier).inc()

    def moved_adapter(self) -> None:
        """A gateway had an adapter loaded at one more replica, without a request."""
        self._adapter_moves.labels().inc()

    def moved(self, reason: Literal["lost", "drained", "failed"]) -> None:
        """An answer left its replica."""
        self._moves.labels(reason).inc()

    def batch_line(self, tenant: str, result: Literal["completed", "failed"]) -> None:
        """A line of a batch has its result."""
        self._batch_lines.labels(self.label(tenant), result).inc()

    def batch_ended(self, tenant: str, state: str) -> None:
        """A batch is ``completed``, ``failed``, ``expired`` or ``cancelled``."""
        self._batches.labels(self.label(tenant), state).inc()

    def replayed(self, outcome: Literal["compared", "failed"], tokens: int) -> None:
        """A rollout's prompt was replayed, for so many tokens."""
        self._replays.labels(outcome).inc()
        self._replay_tokens.labels().inc(tokens)

    def engine_restarted(self, reason: str) -> None:
        """The engine was lost (``reason``: "death" or "hang"), and is back."""
        self._restarts.labels(reason).inc()

    def plan_check_failed(self) -> None:
        """The scheduler found itself in a state that cannot be."""
        self._plan_checks.labels().inc()

    def render(self, now: Gauges | None = None, form: Form = "text") -> bytes:
        """The page: ours with the gauges ``now``, then what vLLM keeps in the default registry.

        OpenMetrics has exemplars: the traces that times were measured in.
        """
        lines = [line for family in self._families() for line in family.page(form)]
        lines += self.by_adapter.page(form, now.loaded if now else ())
        if now is not None:
            lines += self._state(now)
        ours = "".join(lines).encode()
        return ours + (_as_text(REGISTRY) if form == "text" else _as_openmetrics(REGISTRY))  # type: ignore[no-untyped-call]

    def _families(self) -> Iterator[Family[Any]]:
        return (value for value in vars(self).values() if isinstance(value, Family))

    def _state(self, now: Gauges) -> Iterator[str]:
        """The gauges of the state given to ``render``."""
        if now.build is not None:
            yield gauge("loraplex_build_info", "What runs here.", [(now.build, 1)])
        tiers = [({"tier": tier}, count) for tier, count in now.adapters.items()]
        yield gauge("loraplex_adapters", "Adapter versions by tier.", tiers)
        yield gauge("loraplex_gpu_slots", "Slots there are.", [({}, now.slots)])
        yield gauge("loraplex_gpu_slots_used", "Slots that hold an adapter.", [({}, now.slots_used)])
        yield gauge("loraplex_host_slots", "Adapters that fit in host memory.", [({}, now.host_slots)])
        if now.disk_free is not None:
            help_ = "Bytes left on the file system of the data folder."
            yield gauge("loraplex_disk_free_bytes", help_, [({}, now.disk_free)])
        yield gauge(
            "loraplex_in_step_loads",
            "Adapters loaded inside an engine step; anything but 0 is a defect.",
            [({}, now.in_step_loads)],
        )
        yield gauge(
            "loraplex_quarantined_versions",
            "Versions that are out of service until an operator releases them.",
            [({}, now.quarantined)],
        )
        yield gauge(
            "loraplex_unserved_versions",
            "Versions that this engine does not serve (unfit), or whose files are not whole (damaged).",
            [({"reason": "unfit"}, now.unfit), ({"reason": "damaged"}, now.damaged)],
        )
        yield gauge(
            "loraplex_differing_versions",
            "Versions that answer, and differ from the golden probes they came with.",
            [({}, now.differing)],
        )
        yield gauge(
            "loraplex_usage_files_aside",
            "Files of usage of which not every line is in the database, until an operator removes them.",
            [({}, now.usage_aside)],
        )
        states = ("running", "held", "completed", "rolled_back")
        rollouts = [({"state": state}, now.rollouts.get(state, 0)) for state in states]
        yield gauge("loraplex_rollouts", "Rollouts by state.", rollouts)
        if now.most_running:
            yield from self._pressed(now)
        yield from _by_replica(now.replicas)
        yield self._by_tenant("loraplex_queue_depth", "Waiting requests.", now.queued)
        yield self._by_tenant("loraplex_running", "Requests in the engine.", now.running)

    def _pressed(self, now: Gauges) -> Iterator[str]:
        backlog = self.pace.backlog(time.monotonic(), sum(now.queued.values()))
        pressure = pressure_of(
            running=sum(now.running.values()),
            most=now.most_running,
            busy_slots=now.busy_slots,
            slots=now.slots,
            backlog=backlog,
        )
        waits = "Seconds until all that waits has a place, if requests go on to end as they do."
        yield gauge("loraplex_backlog_seconds", waits, [({}, backlog)])
        full = "0 idle, 1 full, and 1 more for every ten seconds of backlog: what to scale by."
        yield gauge("loraplex_pressure", full, [({}, pressure)])

    def _by_tenant(self, name: str, help_: str, counts: Mapping[str, int]) -> str:
        summed: dict[str, int] = {}
        for tenant, count in counts.items():
            label = self.label(tenant)
            summed[label] = summed.get(label, 0) + count
        return gauge(name, help_, (({"tenant": label}, count) for label, count in summed.items()))


def form_of(accept: str) -> Form:
    """The form that a scraper asks for; plain text where it does not name OpenMetrics."""
    return "openmetrics" if "application/openmetrics-text" in accept else "text"


def _trace() -> str | None:
    """The trace for an exemplar; none where a look into the store would not find it."""
    ids = REQUEST.get()
    return ids.trace_id if ids is not None and ids.is_kept else None


def _by_replica(replicas: Sequence[ReplicaGauges]) -> Iterator[str]:
    """What a gateway knows of each replica; nothing where there are none."""
    shown: dict[str, tuple[str, Callable[[ReplicaGauges], float]]] = {
        "loraplex_replica_up": ("Whether a replica is sent requests.", lambda one: float(one.up)),
        "loraplex_replica_verifying": (
            "Whether a replica is held against golden probes before it is sent requests.",
            lambda one: float(one.verifying),
        ),
        "loraplex_replica_running": ("Sequences in its engine.", lambda one: one.running),
        "loraplex_replica_queued": ("Requests that wait there.", lambda one: one.queued),
        "loraplex_replica_slots_used": ("Slots there that hold an adapter.", lambda one: one.slots_used),
        "loraplex_replica_backlog_seconds": ("Seconds of work that wait there.", lambda one: one.backlog),
    }
    for name, (help_, value) in shown.items() if replicas else ():
        yield gauge(name, help_, [({"replica": one.id}, value(one)) for one in replicas])
