"""What ``loraplex bench`` says of its requests: percentiles, a table, and a page to look at."""

from __future__ import annotations

import html
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from server.cli import tables
from server.cli.bench_load import Shot

_WIDTH, _HEIGHT = 900, 300


def percentile(values: Iterable[float], share: float) -> float | None:
    """The smallest value that at least ``share`` of them do not exceed; None of none, or if it never came."""
    ordered = sorted(values)
    if not ordered:
        return None
    found = ordered[max(0, math.ceil(share * len(ordered)) - 1)]
    return round(found, 4) if math.isfinite(found) else None


def rows(shots: Sequence[Shot]) -> list[dict[str, Any]]:
    """One for all models together, then one for each. Times are in seconds."""
    models = sorted({shot.model for shot in shots})
    named = [("all", list(shots))] if len(models) != 1 else []
    named += [(model, [shot for shot in shots if shot.model == model]) for model in models]
    return [_row(name, some) for name, some in named]


def phase_rows(phases: Mapping[str, Sequence[Shot]]) -> list[dict[str, Any]]:
    """One for each phase of a workload, all its models together."""
    return [{"phase": phase, **_row("all", shots)} for phase, shots in phases.items()]


def _row(name: str, shots: Sequence[Shot]) -> dict[str, Any]:
    good = [shot for shot in shots if shot.error is None]
    gaps = [b - a for shot in good for a, b in itertools.pairwise(shot.chunks)]
    span = max((shot.ended or 0.0 for shot in shots), default=0.0) - min(
        (s.began for s in shots), default=0.0
    )
    errors = Counter(shot.error for shot in shots if shot.error is not None)
    return {
        "model": name,
        "requests": len(shots),
        "good": len(good),
        "errors": ", ".join(f"{count} {code}" for code, count in errors.most_common()) or None,
        "tokens_per_second": round(sum(shot.tokens for shot in good) / span, 1) if span > 0 else None,
        "first_p50": percentile([shot.first for shot in good], 0.5),
        "first_p95": percentile([shot.first for shot in good], 0.95),
        "first_p99": percentile([shot.first for shot in good], 0.99),
        "gap_p50": percentile(gaps, 0.5),
        "gap_p99": percentile(gaps, 0.99),
        "total_p50": percentile([shot.total for shot in good], 0.5),
        "total_p99": percentile([shot.total for shot in good], 0.99),
    }


def show(found: list[dict[str, Any]]) -> None:
    """Prints them as a table."""
    from rich.console import Console

    Console().print(tables.rows(found))


def as_json(shot: Shot) -> dict[str, Any]:
    """One request, for scripts."""
    finite = {name: value for name in ("first", "total") if math.isfinite(value := getattr(shot, name))}
    about = {"model": shot.model, "began": shot.began, "output_tokens": shot.tokens, "error": shot.error}
    return about | {name: finite.get(name) for name in ("first", "total")}


def page(url: str, found: list[dict[str, Any]], shots: Sequence[Shot]) -> str:
    """An HTML page by itself: the table, and each request's time to the first token over its arrival."""
    headings = (
        "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in found[0]) if found else ""
    )
    lines = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape('-' if v is None else str(v))}</td>" for v in row.values())
        + "</tr>"
        for row in found
    )
    return (
        "<!doctype html><meta charset=utf-8><title>loraplex bench</title>"
        "<style>body{font:14px system-ui;margin:2em}td,th{padding:.2em .8em;text-align:right}"
        "circle{fill:#36c;fill-opacity:.6}.bad{fill:#c33}</style>"
        f"<h1>{html.escape(url)}</h1><table><tr>{headings}</tr>{lines}</table>"
        f"<h2>Seconds to the first token, by arrival; failed ones in red at the bottom</h2>{_plot(shots)}"
    )


def _plot(shots: Sequence[Shot]) -> str:
    last = max((shot.began for shot in shots), default=0.0) or 1.0
    slowest = max((shot.first for shot in shots if math.isfinite(shot.first)), default=0.0) or 1.0
    dots = []
    for shot in shots:
        good = shot.error is None and math.isfinite(shot.first)
        x = 50 + (_WIDTH - 60) * shot.began / last
        y = _HEIGHT - 20 - (_HEIGHT - 40) * (shot.first / slowest if good else 0.0)
        about = html.escape(f"{shot.model}: {shot.error or f'{shot.first:.3f} s'}")
        kind = "" if good else ' class="bad"'
        dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"{kind}><title>{about}</title></circle>')
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}">'
        f'<text x="0" y="25">{slowest:.2f} s</text><text x="0" y="{_HEIGHT - 15}">0</text>'
        f'<text x="{_WIDTH - 60}" y="{_HEIGHT - 2}">{last:.0f} s</text>{"".join(dots)}</svg>'
    )
