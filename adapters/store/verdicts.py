"""What golden probes showed, on each kind of engine: a fleet may have several, in an update or for good.

golden             the last verdict
golden_elsewhere   the last ones of other kinds, the newest first
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VERDICTS = ("golden", "golden_elsewhere")
# What an answer depends on besides the adapter; see ``server.publishing.probe.Prober.here``.
KIND = ("base", "dtype", "engine")
KINDS_KEPT = 4


def has_verdict(report: Mapping[Any, Any], here: Mapping[str, Any]) -> bool:
    """Whether a version was held against its golden probes ``here``, with whatever result."""
    return any(found.items() >= here.items() for found in _verdicts(report))


def with_verdict(report: Mapping[str, Any], golden: Mapping[str, Any]) -> dict[str, Any]:
    """``report`` with ``golden`` as the last verdict, in place of any other of its kind."""
    others = [found for found in _verdicts(report) if _kind(found) != _kind(golden)][: KINDS_KEPT - 1]
    return {**report, "golden": dict(golden)} | ({"golden_elsewhere": others} if others else {})


def _verdicts(report: Mapping[Any, Any]) -> list[dict[str, Any]]:
    last, others = (report.get(name) for name in VERDICTS)
    return [found for found in (last, *(others or ())) if found]


def _kind(verdict: Mapping[str, Any]) -> list[Any]:
    return [verdict.get(name) for name in KIND]
