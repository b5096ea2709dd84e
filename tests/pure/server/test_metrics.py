"""What Prometheus reads is what happened, in a form that it can read."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client import REGISTRY, Gauge
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import OTHER, Gauges, Metrics, Outcome

NOW = Gauges(
    adapters={"disk": 5, "host": 2, "gpu": 1},
    slots=4,
    slots_used=1,
    host_slots=8,
    queued={"acme": 2},
    running={"acme": 1, "zeta": 3},
    in_step_loads=0,
)
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(metrics: Metrics, now: Gauges | None = None) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.render(now).decode())
        for sample in family.samples
    }


def value(of: Samples, name: str, **labels: str) -> float | None:
    return of.get((f"loraplex_{name}", frozenset(labels.items())))


def test_requests_and_tokens() -> None:
    metrics = Metrics()
    metrics.ended("acme", "completed")
    metrics.consumed("acme", 10, 4, 7)
    metrics.ended("acme", "completed")
    metrics.consumed("acme", 1, 0, 2)
    metrics.ended("acme", "cut")
    metrics.consumed("acme", 0, 0, 1)
    metrics.ended("zeta", "refused")
    now = samples(metrics)
    assert value(now, "requests_total", tenant="acme", outcome="completed") == 2
    assert value(now, "requests_total", tenant="acme", outcome="cut") == 1
    assert value(now, "requests_total", tenant="zeta", outcome="refused") == 1
    assert value(now, "prompt_tokens_total", tenant="acme") == 11
    assert value(now, "cached_tokens_total", tenant="acme") == 4
    assert value(now, "output_tokens_total", tenant="acme") == 10
    assert value(now, "output_tokens_total", tenant="zeta") == 0


def test_times_and_loads() -> None:
    metrics = Metrics()
    metrics.queued("acme", 0.2)
    times = metrics.token_times("acme")
    times.first(0.3)
    for _ in range(3):
        times.gap(0.004)
    metrics.staged(0.5)
    metrics.activated(0.006)
    metrics.evicted("gpu")
    metrics.evicted("host")
    metrics.load_failed("stage")
    now = samples(metrics)
    for name, count, total in (
        ("queue_seconds", 1, 0.2),
        ("time_to_first_token_seconds", 1, 0.3),
        ("inter_token_latency_seconds", 3, 0.012),
    ):
        assert value(now, f"{name}_count", tenant="acme") == count
        assert value(now, f"{name}_sum", tenant="acme") == pytest.approx(total)
    assert value(now, "inter_token_latency_seconds_bucket", tenant="acme", le="0.0025") == 0
    assert value(now, "inter_token_latency_seconds_bucket", tenant="acme", le="0.005") == 3
    assert value(now, "stage_seconds_sum") == 0.5
    assert value(now, "activation_seconds_sum") == pytest.approx(0.006)
    assert value(now, "evictions_total", tier="gpu") == value(now, "evictions_total", tier="host") == 1
    assert value(now, "load_failures_total", step="stage") == 1
    assert value(now, "load_failures_total", step="activate") is None


def test_gauges_are_those_of_each_scrape() -> None:
    metrics = Metrics()
    assert value(samples(metrics), "gpu_slots") is None, "nothing is known yet"
    now = samples(metrics, NOW)
    assert [value(now, "adapters", tier=tier) for tier in ("disk", "host", "gpu")] == [5, 2, 1]
    assert (value(now, "gpu_slots"), value(now, "gpu_slots_used"), value(now, "host_slots")) == (4, 1, 8)
    assert (value(now, "queue_depth", tenant="acme"), value(now, "queue_depth", tenant="zeta")) == (2, None)
    assert (value(now, "running", tenant="acme"), value(now, "running", tenant="zeta")) == (1, 3)
    assert value(now, "in_step_loads") == 0
    assert value(samples(metrics, replace(NOW, slots_used=2)), "gpu_slots_used") == 2


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_tenants_beyond_the_limit_share_a_label(limit: int) -> None:
    metrics = Metrics(tenants=limit)
    for tenant in ("acme", "zeta", "more", "acme"):
        metrics.ended(tenant, "completed")
        metrics.queued(tenant, 1)
    now = samples(metrics, NOW)
    counted = {
        dict(labels)["tenant"]: n for (name, labels), n in now.items() if name == "loraplex_requests_total"
    }
    assert counted == [{OTHER: 4}, {"acme": 2, OTHER: 2}, {"acme": 2, "zeta": 1, OTHER: 1}][limit]
    running = {dict(labels)["tenant"]: n for (name, labels), n in now.items() if name == "loraplex_running"}
    assert running == [{OTHER: 4}, {"acme": 1, OTHER: 3}, {"acme": 1, "zeta": 3}][limit]


def test_vllms_own_metrics_are_on_the_same_page() -> None:
    gauge = Gauge("vllm:of_the_tests", "A metric in the default registry.")
    try:
        gauge.set(3)
        assert samples(Metrics())["vllm:of_the_tests", frozenset()] == 3
    finally:
        REGISTRY.unregister(gauge)


def test_two_servers_in_a_process_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.ended("acme", "completed")
    assert value(samples(second), "requests_total", tenant="acme", outcome="completed") is None


def test_the_dashboards_ask_for_what_there_is() -> None:
    metrics = Metrics()
    for outcome in get_args(Outcome):
        metrics.ended("acme", outcome)
    known = set(re.findall(r"^# TYPE (\S+)", metrics.render(NOW).decode(), re.MULTILINE))
    config = Path(__file__).parents[3] / "config"
    for file in [file for kind in ("json", "yaml", "yml") for file in config.rglob(f"*.{kind}")]:
        for name in set(re.findall(r"\bloraplex_[a-z_]+\b", file.read_text())):
            family = re.sub(r"_(bucket|count|sum)$", "", name)
            assert family in known or f"{family}_total" in known, f"{file.name} asks for {name}"
