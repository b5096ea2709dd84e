"""The dashboards in ``config/grafana``, made from the queries that a test asks a running Prometheus.

``python -m tests.support.dashboards`` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "config" / "grafana" / "dashboards"
# (title, unit, [(legend, query)]); Grafana's names of units.
Panel = tuple[str, str, list[tuple[str, str]]]
SOURCE = {"type": "prometheus", "uid": "loraplex"}
BY = 'instance=~"$instance"'
OF = f'{BY}, tenant=~"$tenant"'
VERSION = f'{OF}, adapter=~"$adapter"'


def _quantiles(metric: str, where: str) -> list[tuple[str, str]]:
    rate = f"sum by (le) (rate({metric}_bucket{{{where}}}[$__rate_interval]))"
    return [(f"p{int(q * 100)}", f"histogram_quantile({q}, {rate})") for q in (0.5, 0.95, 0.99)]


def _rate(metric: str, where: str, *by: str) -> str:
    grouped = f" by ({', '.join(by)})" if by else ""
    return f"sum{grouped} (rate({metric}{{{where}}}[$__rate_interval]))"


def _requests(where: str) -> list[Panel]:
    """What the first row of every dashboard shows, for what ``where`` selects."""
    cached = (
        f"{_rate('loraplex_cached_tokens_total', where)} / {_rate('loraplex_prompt_tokens_total', where)}"
    )
    return [
        (
            "Requests by outcome", "reqps",
            [("{{outcome}}", _rate("loraplex_requests_total", where, "outcome"))],
        ),
        (
            "Tokens", "short",
            [
                ("output", _rate("loraplex_output_tokens_total", where)),
                ("prompt", _rate("loraplex_prompt_tokens_total", where)),
            ],
        ),
        ("Time to the first token", "s", _quantiles("loraplex_time_to_first_token_seconds", where)),
        ("Time in the queue", "s", _quantiles("loraplex_queue_seconds", where)),
        ("Time between two tokens", "s", _quantiles("loraplex_inter_token_latency_seconds", where)),
        ("Prompt tokens found in the cache", "percentunit", [("cached", cached)]),
        (
            "Waiting and running", "short",
            [
                ("waiting", f"sum(loraplex_queue_depth{{{where}}}) or vector(0)"),
                ("running", f"sum(loraplex_running{{{where}}}) or vector(0)"),
            ],
        ),
    ]  # fmt: skip


def _fleet() -> list[Panel]:
    up = f'up{{job="loraplex", {BY}}}'
    busiest = f"topk(10, {_rate('loraplex_output_tokens_total', BY, 'tenant')})"
    return [
        ("Answers", "short", [("{{instance}}", up)]),
        ("What runs", "short", [("{{version}} {{base}} {{role}}", f"loraplex_build_info{{{BY}}}")]),
        *_requests(BY),
        ("Busiest customers, tokens per second", "short", [("{{tenant}}", busiest)]),
        (
            "Slots", "short",
            [
                ("used", f"sum(loraplex_gpu_slots_used{{{BY}}})"),
                ("there are", f"sum(loraplex_gpu_slots{{{BY}}})"),
            ],
        ),
        ("Adapters by tier", "short", [("{{tier}}", f"sum by (tier) (loraplex_adapters{{{BY}}})")]),
        ("Adapters that leave a tier", "ops", [("{{tier}}", _rate("loraplex_evictions_total", BY, "tier"))]),
        ("Disk to host memory", "s", _quantiles("loraplex_stage_seconds", BY)),
        ("Host memory to a slot", "s", _quantiles("loraplex_activation_seconds", BY)),
        ("Answers put aside", "ops", [("put aside", _rate("loraplex_preemptions_total", BY))]),
        (
            "What needs somebody", "short",
            [
                ("engine restarts", f"sum(increase(loraplex_engine_restarts_total{{{BY}}}[1h]))"),
                ("loads that failed", f"sum(increase(loraplex_load_failures_total{{{BY}}}[1h]))"),
                ("out of service", f"sum(loraplex_quarantined_versions{{{BY}}})"),
                ("not served", f"sum(loraplex_unserved_versions{{{BY}}})"),
                ("usage set aside", f"sum(loraplex_usage_files_aside{{{BY}}})"),
                ("defects", f"sum(increase(loraplex_plan_check_failures_total{{{BY}}}[1h]))"),
            ],
        ),
        ("Wrong keys", "reqps", [("wrong", _rate("loraplex_wrong_keys_total", BY))]),
        ("Room for adapters", "bytes", [("{{instance}}", f"loraplex_disk_free_bytes{{{BY}}}")]),
        ("KV cache in use", "percentunit", [("{{instance}}", f"vllm:kv_cache_usage_perc{{{BY}}}")]),
        (
            "Replicas", "short",
            [
                ("{{replica}} running", f"loraplex_replica_running{{{BY}}}"),
                ("{{replica}} waiting", f"loraplex_replica_queued{{{BY}}}"),
                ("{{replica}} up", f"loraplex_replica_up{{{BY}}}"),
                ("{{replica}} verifying", f"loraplex_replica_verifying{{{BY}}}"),
            ],
        ),
        (
            "Answers that left their replica", "ops",
            [("{{reason}}", _rate("loraplex_moved_answers_total", BY, "reason"))],
        ),
    ]  # fmt: skip


def _customer() -> list[Panel]:
    per_adapter = _rate("loraplex_adapter_output_tokens_total", OF, "adapter", "version")
    return [
        *_requests(OF),
        ("Beyond budgets", "reqps", [("{{kind}}", _rate("loraplex_budget_requests_total", OF, "kind"))]),
        ("Tokens per second by adapter", "short", [("{{adapter}}@{{version}}", per_adapter)]),
        ("Answers put aside", "ops", [("put aside", _rate("loraplex_preemptions_total", OF))]),
    ]


def _adapter() -> list[Panel]:
    by = ("adapter", "version")
    first = [_rate(f"loraplex_adapter_first_token_seconds_{part}", VERSION, *by) for part in ("sum", "count")]
    queue = [_rate(f"loraplex_adapter_queue_seconds_{part}", VERSION, *by) for part in ("sum", "count")]
    requests = _rate("loraplex_adapter_requests_total", VERSION, *by)
    cold = _rate("loraplex_adapter_cold_requests_total", VERSION, *by)
    name, label = "{{adapter}}@{{version}}", "{{adapter}}@{{version}} {{outcome}}"
    outcomes = _rate("loraplex_adapter_requests_total", VERSION, *by, "outcome")
    return [
        ("Requests by version and outcome", "reqps", [(label, outcomes)]),
        ("Output tokens", "short", [(name, _rate("loraplex_adapter_output_tokens_total", VERSION, *by))]),
        ("Prompt tokens", "short", [(name, _rate("loraplex_adapter_prompt_tokens_total", VERSION, *by))]),
        ("Mean time to the first token", "s", [(name, " / ".join(first))]),
        ("Mean time in the queue", "s", [(name, " / ".join(queue))]),
        ("Share that waited for a load", "percentunit", [(name, f"{cold} / {requests}")]),
        ("Where they are", "short", [("{{adapter_name}} {{level}}", f"vllm:lora_adapter_loaded{{{BY}}}")]),
    ]


def _variable(name: str, of: str) -> dict[str, Any]:
    query = f"label_values({of}, {name})"
    return {
        "name": name, "type": "query", "datasource": SOURCE, "query": {"query": query, "refId": name},
        "definition": query, "refresh": 2, "multi": True, "includeAll": True, "allValue": ".*",
        "current": {"text": "All", "value": "$__all"}, "sort": 1,
    }  # fmt: skip


def _panels(panels: list[Panel]) -> Iterator[dict[str, Any]]:
    """Three in a row."""
    for number, (title, unit, queries) in enumerate(panels):
        yield {
            "id": number + 1, "title": title, "type": "timeseries", "datasource": SOURCE,
            "gridPos": {"h": 8, "w": 8, "x": 8 * (number % 3), "y": 8 * (number // 3)},
            "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
            "options": {
                "legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"},
            },
            "targets": [
                {
                    "refId": chr(65 + i), "datasource": SOURCE, "expr": query, "legendFormat": legend,
                    "exemplar": True,
                }
                for i, (legend, query) in enumerate(queries)
            ],
        }  # fmt: skip


def dashboards() -> dict[str, dict[str, Any]]:
    """By file name."""
    instance = _variable("instance", "loraplex_gpu_slots")
    tenant = _variable("tenant", "loraplex_requests_total")
    adapter = _variable("adapter", "loraplex_adapter_requests_total")
    shown = {
        "fleet": ("Loraplex: the fleet", _fleet(), [instance]),
        "customer": ("Loraplex: a customer", _customer(), [instance, tenant]),
        "adapter": ("Loraplex: an adapter", _adapter(), [instance, tenant, adapter]),
    }
    return {
        f"{name}.json": {
            "uid": f"loraplex-{name}", "title": title, "tags": ["loraplex"], "schemaVersion": 39,
            "version": 1, "editable": True, "refresh": "10s", "time": {"from": "now-1h", "to": "now"},
            "timezone": "browser",
            "templating": {"list": variables}, "panels": list(_panels(panels)), "annotations": {"list": []},
        }
        for name, (title, panels, variables) in shown.items()
    }  # fmt: skip


def text(dashboard: dict[str, Any]) -> str:
    return json.dumps(dashboard, indent=1) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, dashboard in dashboards().items():
        (FOLDER / name).write_text(text(dashboard))
