"""A plan for examples, and its first steps."""

from __future__ import annotations

from typing import Any

from server.scheduling.nouns import (
    Activate,
    Ask,
    Capacity,
    Run,
    Stage,
)
from server.scheduling.plan import Plan


def make(gpu: int = 1, host: int = 4, running: int = 8, suspects: str = "", **limits: Any) -> Plan:
    capacity = Capacity(gpu_slots=gpu, host_slots=host, max_running=running, **limits)
    return Plan(capacity, suspects=suspects)


def ask(id_: str, version: str | None = "a", tenant: str | None = None, **changes: Any) -> Ask:
    """A request of a tenant named like its version."""
    values = {"prompt_tokens": 10, "max_tokens": 100, **changes}
    return Ask(id=id_, tenant=tenant or version or "base", version=version, **values)


def load(plan: Plan, now: float, version: str, load_id: int) -> None:
    """Bring ``version`` into a slot, with nothing running."""
    assert plan.submitted(now, ask(f"load-{version}", version)) == [Stage(version, load_id)]
    assert plan.staged(now, load_id) == [Activate(version, load_id)]
    assert plan.activated(now, load_id) == [Run(f"load-{version}")]
    assert plan.finished(now, f"load-{version}") == []


def run(plan: Plan, now: float, id_: str, version: str | None, **changes: Any) -> None:
    """Start a request on a version that is active."""
    assert plan.submitted(now, ask(id_, version, **changes)) == [Run(id_)]
