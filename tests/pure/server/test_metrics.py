"""What Prometheus reads is what happened, in a form that it can read."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Gauge
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

import server.metrics
from adapters.model import Version
from server.logs import REQUEST, RequestIds, traceparent
from server.metrics import CONTENT_TYPES, OTHER, Gauges, Metrics, Outcome, ReplicaGauges, form_of
from server.scheduling.lease import Lease
from server.telemetry.by_adapter import Loaded
from tests.support.calls import calls_of

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
    assert value(now, "load_failures_total", step="activate") == 0, "there from the start, for rates"


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
        dict(labels)["tenant"]: n
        for (name, labels), n in now.items()
        if name == "loraplex_requests_total" and n
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


def version(tenant: str, adapter: str, number: int) -> Version:
    return Version(tenant, adapter, number, "0" * 64, Path("/nowhere"), 1)


def lease(of: Version | None, **known: float) -> Lease:
    made = Lease(None, "r", "acme", of, 0.0)  # type: ignore[arg-type]
    for name, value in known.items():
        setattr(made, name, value)
    return made


def test_versions_have_metrics_of_their_own() -> None:
    metrics = Metrics(adapters=1)
    of = {"tenant": "acme", "adapter": "support", "version": "3"}
    known = {"prompt_tokens": 5, "output_tokens": 7, "queued_for": 0.5, "first_token_after": 0.75}
    metrics.by_adapter.ended(lease(version("acme", "support", 3), **known, load_seconds=0.25), "completed")
    metrics.by_adapter.ended(lease(version("acme", "support", 3), output_tokens=1), "cut")
    metrics.by_adapter.ended(lease(None, output_tokens=9), "completed")
    now = samples(metrics)
    assert value(now, "adapter_requests_total", **of, outcome="completed") == 1
    assert value(now, "adapter_requests_total", **of, outcome="cut") == 1
    assert value(now, "adapter_output_tokens_total", **of) == 8
    assert value(now, "adapter_prompt_tokens_total", **of) == 5
    assert value(now, "adapter_cold_requests_total", **of) == 1
    assert value(now, "adapter_queue_seconds_sum", **of) == 0.5
    assert value(now, "adapter_first_token_seconds_count", **of) == 1
    metrics.by_adapter.ended(lease(version("acme", "support", 4), output_tokens=2), "completed")
    other = dict.fromkeys(of, OTHER)
    assert value(samples(metrics), "adapter_output_tokens_total", **other) == 2
    assert value(samples(metrics), "adapter_output_tokens_total", **of) == 8


def test_without_room_there_is_nothing_by_adapter() -> None:
    metrics = Metrics(adapters=0)
    metrics.by_adapter.ended(lease(version("acme", "support", 3), output_tokens=1), "completed")
    page = metrics.render(replace(NOW, loaded=[Loaded(version("a", "b", 1), "gpu", True)])).decode()
    assert "loraplex_adapter_requests" not in page
    assert "lora_adapter_loaded" not in page


def test_what_is_loaded_has_vllms_names() -> None:
    loaded = [Loaded(version("acme", "a", 1), "cpu", False), Loaded(version("acme", "b", 2), "gpu", True)]

    def shown(bound: int) -> set[tuple[str, ...]]:
        now = samples(Metrics(adapters=bound), replace(NOW, loaded=loaded))
        return {
            tuple(dict(labels)[name] for name in ("adapter_name", "level", "pinned"))
            for name, labels in now
            if name == "vllm:lora_adapter_loaded"
        }

    assert shown(5) == {("acme/a@1", "cpu", "false"), ("acme/b@2", "gpu", "true")}
    assert shown(1) == {("acme/b@2", "gpu", "true")}, "slots first"


def test_what_runs_here() -> None:
    build = {"version": "1", "base": 'a "b"\\'}
    assert value(samples(Metrics(), replace(NOW, build=build)), "build_info", **build) == 1


def test_openmetrics_has_exemplars() -> None:
    metrics = Metrics()
    ids = RequestIds("r", None, traceparent(None))
    token = REQUEST.set(ids)
    try:
        metrics.token_times("acme").first(0.3)
        metrics.queued("acme", 500.0)
    finally:
        REQUEST.reset(token)
    metrics.consumed("acme", 1, 0, 2)
    page = metrics.render(NOW, "openmetrics").decode()
    found = {
        sample.name: sample for family in openmetrics(page) for sample in family.samples if sample.exemplar
    }
    first = found["loraplex_time_to_first_token_seconds_bucket"]
    assert first.labels == {"tenant": "acme", "le": "0.5"}
    assert first.exemplar.labels == {"trace_id": ids.trace_id}
    assert first.exemplar.value == 0.3
    assert found["loraplex_queue_seconds_bucket"].labels["le"] == "+Inf"
    assert page.endswith("# EOF\n")
    assert "trace_id" not in metrics.render(NOW).decode()


def test_the_form_is_what_is_asked_for() -> None:
    asked = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75"
    assert form_of(asked) == "openmetrics"
    assert form_of("text/plain") == form_of("") == "text"
    assert CONTENT_TYPES["openmetrics"].startswith("application/openmetrics-text")


def fill(metrics: Metrics) -> None:
    """A request each of 1,000 customers and 2,000 versions."""
    for number in range(1000):
        tenant = f"tenant-{number}"
        metrics.ended(tenant, "completed")
        metrics.consumed(tenant, 10, 4, 7)
        metrics.queued(tenant, 0.2)
        times = metrics.token_times(tenant)
        times.first(0.3)
        times.gap(0.01)
        for of in (1, 2):
            metrics.by_adapter.ended(lease(version(tenant, "a", of), output_tokens=7), "completed")


def test_a_page_of_a_thousand_customers_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls a line where all of it has changed since the last page, one where nothing has.

    Without the default registry, which has what was imported so far: vLLM's own, and Python's.
    """
    monkeypatch.setattr(server.metrics, "REGISTRY", CollectorRegistry())
    metrics = Metrics(tenants=1000, adapters=2000)
    busy = {f"tenant-{number}": 1 for number in range(1000)}
    now = replace(NOW, queued=busy, running=busy)
    fill(metrics)
    metrics.render(now)
    fill(metrics)
    changed, same = (calls_of(lambda: metrics.render(now)) for _ in range(2))
    lines = metrics.render(now).count(b"\n")
    assert lines > 60_000
    assert changed < 2.1 * lines
    assert same < 1.2 * lines


def test_the_dashboards_ask_for_what_there_is() -> None:
    metrics = Metrics()
    for outcome in get_args(Outcome):
        metrics.ended("acme", outcome)
    now = replace(NOW, build={}, disk_free=1, most_running=8, replicas=[ReplicaGauges("r", True, 0, 0, 0)])
    known = set(re.findall(r"^# TYPE (\S+)", metrics.render(now).decode(), re.MULTILINE))
    config = Path(__file__).parents[3] / "config"
    for file in [file for kind in ("json", "yaml", "yml") for file in config.rglob(f"*.{kind}")]:
        for name in set(re.findall(r"\bloraplex_[a-z_]+\b", file.read_text())):
            family = re.sub(r"_(bucket|count|sum)$", "", name)
            assert family in known or f"{family}_total" in known, f"{file.name} asks for {name}"
