"""What Prometheus sees: the only file that imports prometheus_client.

Counters and histograms are written where things happen; gauges are read from the dispatcher's state at
scrape time, so they can never drift from it. vLLM's own metrics live in the default registry and are
served from the same page.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
)
from prometheus_client import generate_latest as _generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

# A creation time beside every counter says nothing here and makes the page a third longer.
disable_created_metrics()  # type: ignore[no-untyped-call]

Outcome = Literal["completed", "disconnected", "rejected", "refused", "unavailable", "failed", "cut"]

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_GAP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Gauges:
    """The server's state at one moment. ``adapters`` counts versions by tier, disk meaning on disk alone."""

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
    replicas: Sequence[ReplicaGauges] = ()


@dataclass(frozen=True, slots=True)
class ReplicaGauges:
    """A replica as a gateway knows it; ``up`` if it may be sent something."""

    id: str
    up: bool
    running: int
    queued: int
    slots_used: int


@dataclass(frozen=True, slots=True)
class TokenTimes:
    """Where one stream tells its times, in seconds: ``first`` from arrival, ``gap`` between two tokens."""

    first: Callable[[float], None]
    gap: Callable[[float], None]


class Recent:
    """How fast the server is now, for people who look: nothing is computed while nobody does.

    ``output`` counts output tokens ever produced. Tokens per second are those since a look at most
    ``WINDOW_S`` ago: the first look has none. First-token times are of streams in the last ``FIRSTS_S``.
    """

    WINDOW_S, FIRSTS_S, APART_S, FIRSTS = 10.0, 60.0, 0.5, 512

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.output = 0
        self._clock = clock
        self._looks: deque[tuple[float, int]] = deque()
        self._firsts: deque[tuple[float, float]] = deque(maxlen=self.FIRSTS)

    def first(self, seconds: float) -> None:
        """A stream had its first token ``seconds`` after its arrival."""
        self._firsts.append((self._clock(), seconds))

    def rates(self) -> dict[str, float | int | None]:
        """Tokens per second over ``seconds``, and percentiles of the time to the first token, in seconds."""
        now = self._clock()
        while self._looks and now - self._looks[0][0] > self.WINDOW_S:
            self._looks.popleft()
        began, before = self._looks[0] if self._looks else (now, self.output)
        if not self._looks or now - self._looks[-1][0] >= self.APART_S:
            self._looks.append((now, self.output))
        passed = now - began
        firsts = sorted(seconds for at, seconds in self._firsts if now - at <= self.FIRSTS_S)
        return {
            "seconds": round(passed, 3),
            "output_tokens_per_second": round((self.output - before) / passed, 2) if passed > 0 else None,
            "first_tokens": len(firsts),
            "first_token_p50": _percentile(firsts, 0.5),
            "first_token_p99": _percentile(firsts, 0.99),
        }


def _percentile(ordered: list[float], share: float) -> float | None:
    """The smallest value that at least ``share`` of them do not exceed; None of none."""
    return round(ordered[math.ceil(share * len(ordered)) - 1], 4) if ordered else None


class Metrics:
    """One server's metrics. ``tenants`` bounds the label values; tenants beyond it share ``other``."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, *, tenants: int = 100) -> None:
        self._limit = tenants
        self._labels: set[str] = set()
        self.recent = Recent()
        self._registry = CollectorRegistry()
        r = self._registry
        self._requests = Counter(
            "loraplex_requests", "Inference requests, by how they ended.", ["tenant", "outcome"], registry=r
        )
        self._prompt_tokens = Counter(
            "loraplex_prompt_tokens", "Prompt tokens of requests that ran.", ["tenant"], registry=r
        )
        self._cached_tokens = Counter(
            "loraplex_cached_tokens", "Prompt tokens found in the prefix cache.", ["tenant"], registry=r
        )
        self._output_tokens = Counter(
            "loraplex_output_tokens",
            "Output tokens produced, also for clients that left.",
            ["tenant"],
            registry=r,
        )
        self._ttft = Histogram(
            "loraplex_time_to_first_token_seconds",
            "From arrival to the first token of a streamed answer.",
            ["tenant"],
            buckets=_LATENCY,
            registry=r,
        )
        self._itl = Histogram(
            "loraplex_inter_token_latency_seconds",
            "Between two tokens of a streamed answer.",
            ["tenant"],
            buckets=_TOKEN_GAP,
            registry=r,
        )
        self._queue = Histogram(
            "loraplex_queue_seconds",
            "From arrival until the engine took the request.",
            ["tenant"],
            buckets=_LATENCY,
            registry=r,
        )
        self._stage = Histogram(
            "loraplex_stage_seconds", "Disk to host memory.", buckets=_LATENCY, registry=r
        )
        self._fetch = Histogram(
            "loraplex_fetch_seconds",
            "Object store to the data folder, by outcome.",
            ["outcome"],
            buckets=_LATENCY,
            registry=r,
        )
        self._activate = Histogram(
            "loraplex_activation_seconds", "Host memory to a slot.", buckets=_LATENCY, registry=r
        )
        self._evictions = Counter("loraplex_evictions", "Adapters moved out of a tier.", ["tier"], registry=r)
        self._preemptions = Counter(
            "loraplex_preemptions", "Answers put aside for another adapter.", ["tenant"], registry=r
        )
        self._failures = Counter(
            "loraplex_load_failures", "Loads that failed, by step.", ["step"], registry=r
        )

        self._restarts = Counter(
            "loraplex_engine_restarts",
            "Times the engine was lost and started again.",
            ["reason"],
            registry=r,
        )
        self._plan_checks = Counter(
            "loraplex_plan_check_failures", "Times the scheduler's check of itself failed.", registry=r
        )
        self._verified = Counter(
            "loraplex_verified_versions",
            "Versions held against their probes.json because the engine, its dtype or the base had changed.",
            ["result"],
            registry=r,
        )
        self._wrong_keys = Counter("loraplex_wrong_keys", "Requests with a key that is nobody's.", registry=r)
        self._local_limits = Counter(
            "loraplex_limited_locally", "Requests whose limits were counted without Redis.", registry=r
        )
        self._budgets = Counter(
            "loraplex_budget_requests",
            "Requests beyond a soft budget (warned) or a hard one (refused).",
            ["tenant", "kind"],
            registry=r,
        )

        self._placements = Counter(
            "loraplex_placements",
            "Requests sent to a replica, by the tier of their adapter there; gpu for the base.",
            ["tier"],
            registry=r,
        )
        self._adapter_moves = Counter(
            "loraplex_adapter_moves",
            "Adapters loaded at a replica for what a gateway will send there.",
            registry=r,
        )
        self._moves = Counter(
            "loraplex_moved_answers",
            "Answers that left their replica, which was lost or drained, or failed with it.",
            ["reason"],
            registry=r,
        )

        self._state = _State(self.label)
        r.register(self._state)

    def label(self, tenant: str) -> str:
        """``tenant``, or ``other`` once there are as many labels as there may be."""
        if tenant in self._labels:
            return tenant
        if len(self._labels) < self._limit:
            self._labels.add(tenant)
            return tenant
        return OTHER

    def queued(self, tenant: str, seconds: float) -> None:
        """A request left the queue after ``seconds``."""
        self._queue.labels(self.label(tenant)).observe(seconds)

    def token_times(self, tenant: str) -> TokenTimes:
        """For one stream of ``tenant``: finding a label for every token costs as much as counting it."""
        label = self.label(tenant)
        observe = self._ttft.labels(label).observe

        def first(seconds: float) -> None:
            observe(seconds)
            self.recent.first(seconds)

        return TokenTimes(first, self._itl.labels(label).observe)

    def ended(self, tenant: str, outcome: Outcome) -> None:
        """A request of ``tenant`` had its outcome."""
        self._requests.labels(self.label(tenant), outcome).inc()
        self.consumed(tenant, 0, 0, 0)  # a series of its own, also of those who were only refused

    def consumed(self, tenant: str, prompt: int, cached: int, output: int) -> None:
        """Tokens since the last call, of a request that may still run."""
        self.recent.output += output
        label = self.label(tenant)
        self._prompt_tokens.labels(label).inc(prompt)
        self._cached_tokens.labels(label).inc(cached)
        self._output_tokens.labels(label).inc(output)

    def staged(self, seconds: float) -> None:
        """A load from disk into host memory took ``seconds``."""
        self._stage.observe(seconds)

    def fetched(self, fetched: bool, seconds: float) -> None:
        """A fetch of a version's files took ``seconds``, and came to be or failed."""
        self._fetch.labels("fetched" if fetched else "failed").observe(seconds)

    def activated(self, seconds: float) -> None:
        """A copy into a slot took ``seconds``."""
        self._activate.observe(seconds)

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
        self._local_limits.inc()

    def wrong_key(self) -> None:
        """Counts a request with a key that is nobody's."""
        self._wrong_keys.inc()

    def verified(self, result: Literal["matches", "differs", "not_possible"]) -> None:
        """Golden probes were held against this engine."""
        self._verified.labels(result).inc()

    def load_failed(self, step: Literal["stage", "activate"]) -> None:
        """A load failed at ``step``."""
        self._failures.labels(step).inc()

    def placed(self, tier: str) -> None:
        """A gateway sent a request to a replica that had its adapter in ``tier``."""
        self._placements.labels(tier).inc()

    def moved_adapter(self) -> None:
        """A gateway had an adapter loaded at one more replica, without a request."""
        self._adapter_moves.inc()

    def moved(self, reason: Literal["lost", "drained", "failed"]) -> None:
        """An answer left its replica."""
        self._moves.labels(reason).inc()

    def engine_restarted(self, reason: str) -> None:
        """The engine was lost (``reason``: "death" or "hang"), and is back."""
        self._restarts.labels(reason).inc()

    def plan_check_failed(self) -> None:
        """The scheduler found itself in a state that cannot be."""
        self._plan_checks.inc()

    def render(self, now: Gauges | None = None) -> bytes:
        """The text exposition: ours with the gauges ``now``, then what vLLM keeps in the default registry."""
        self._state.now = now
        return _generate_latest(self._registry) + _generate_latest(REGISTRY)


class _State(Collector):
    """The gauges ``now``, which ``render`` sets; none without them."""

    def __init__(self, label: Callable[[str], str]) -> None:
        self.now: Gauges | None = None
        self._label = label

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Empty: there are no gauges yet when this is registered."""
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges of the state given to ``render``."""
        now = self.now
        if now is None:
            return
        adapters = GaugeMetricFamily("loraplex_adapters", "Adapter versions by tier.", labels=["tier"])
        for tier, count in now.adapters.items():
            adapters.add_metric([tier], count)
        yield adapters
        yield GaugeMetricFamily("loraplex_gpu_slots", "Slots there are.", value=now.slots)
        yield GaugeMetricFamily(
            "loraplex_gpu_slots_used", "Slots that hold an adapter.", value=now.slots_used
        )
        yield GaugeMetricFamily(
            "loraplex_host_slots", "Adapters that fit in host memory.", value=now.host_slots
        )
        yield GaugeMetricFamily(
            "loraplex_in_step_loads",
            "Adapters loaded inside an engine step; anything but 0 is a defect.",
            value=now.in_step_loads,
        )
        yield GaugeMetricFamily(
            "loraplex_quarantined_versions",
            "Versions that are out of service until an operator releases them.",
            value=now.quarantined,
        )
        unserved = GaugeMetricFamily(
            "loraplex_unserved_versions",
            "Versions that this engine does not serve (unfit), or whose files are not whole (damaged).",
            labels=["reason"],
        )
        unserved.add_metric(["unfit"], now.unfit)
        unserved.add_metric(["damaged"], now.damaged)
        yield unserved
        yield from _by_replica(now.replicas)
        yield self._by_tenant("loraplex_queue_depth", "Waiting requests.", now.queued)
        yield self._by_tenant("loraplex_running", "Requests in the engine.", now.running)

    def _by_tenant(self, name: str, help_: str, counts: Mapping[str, int]) -> GaugeMetricFamily:
        summed: dict[str, int] = {}
        for tenant, count in counts.items():
            label = self._label(tenant)
            summed[label] = summed.get(label, 0) + count
        family = GaugeMetricFamily(name, help_, labels=["tenant"])
        for label, count in summed.items():
            family.add_metric([label], count)
        return family


def _by_replica(replicas: Sequence[ReplicaGauges]) -> Iterator[GaugeMetricFamily]:
    """What a gateway knows of each replica; nothing where there are none."""
    shown: dict[str, tuple[str, Callable[[ReplicaGauges], float]]] = {
        "loraplex_replica_up": ("Whether a replica is sent requests.", lambda one: float(one.up)),
        "loraplex_replica_running": ("Sequences in its engine.", lambda one: one.running),
        "loraplex_replica_queued": ("Requests that wait there.", lambda one: one.queued),
        "loraplex_replica_slots_used": ("Slots there that hold an adapter.", lambda one: one.slots_used),
    }
    for name, (help_, value) in shown.items() if replicas else ():
        family = GaugeMetricFamily(name, help_, labels=["replica"])
        for one in replicas:
            family.add_metric([one.id], value(one))
        yield family
