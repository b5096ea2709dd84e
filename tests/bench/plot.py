"""One picture for each scenario: a panel for each measure, every run as a dot and the median as a bar."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.bench.report import Outcomes, number
from tests.bench.scenario import Measure, Scenario, Simulation
from tests.bench.servers import BareVllm, Loraplex
from tests.bench.stats import median

LABELS = {Loraplex.name: "Loraplex", BareVllm.name: "bare vLLM"}
COLORS = {Loraplex.name: "tab:blue", BareVllm.name: "tab:gray"}
COLUMNS = 4


def write_plot(scenario: Scenario | Simulation, outcomes: Outcomes, folder: Path) -> None:
    """``<scenario>.png``."""
    figure, axes = _panels(len(scenario.measures))
    for axis, measure in zip(axes, scenario.measures, strict=True):
        _panel(axis, measure, scenario, outcomes)
    figure.suptitle(scenario.name)
    figure.savefig(folder / f"{scenario.name}.png", dpi=110)
    plt.close(figure)


def write_samples(scenario: Scenario | Simulation, outcomes: Outcomes, folder: Path) -> None:
    """``<scenario>-samples.png``: a panel for each name that was sampled, a line for each run of a server."""
    lines = [(server, rows) for server, runs in outcomes.samples.items() for rows in runs.values() if rows]
    if not lines:
        return
    names = [name for name in lines[0][1][0] if name != "seconds"]
    figure, axes = _panels(len(names))
    for axis, name in zip(axes, names, strict=True):
        for server, samples in lines:
            minutes = [sample["seconds"] / 60 for sample in samples]
            axis.plot(minutes, [sample[name] for sample in samples], color=COLORS[server], linewidth=1)
        axis.set_title(name, fontsize=8)
        axis.set_xlabel("minutes", fontsize=8)
    figure.suptitle(scenario.name)
    figure.savefig(folder / f"{scenario.name}-samples.png", dpi=110)
    plt.close(figure)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    rows, columns = math.ceil(count / COLUMNS), min(COLUMNS, count)
    size = (3.6 * columns, 3.0 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in list(axes.flat)[count:]:
        axis.axis("off")
    return figure, list(axes.flat)[:count]


def _panel(axis: Axes, measure: Measure, scenario: Scenario | Simulation, outcomes: Outcomes) -> None:
    for x, server in enumerate(scenario.servers):
        values = list(outcomes.of(server, measure.key).values())
        middle = median(values)
        if math.isfinite(middle):
            axis.bar(x, middle, width=0.6, color=COLORS[server], alpha=0.5)
        axis.plot([x] * len(values), values, "o", color=COLORS[server], markersize=4)
        axis.annotate(
            number(middle), (x, middle if math.isfinite(middle) else 0), ha="center", va="bottom", fontsize=8
        )
    if measure.goal is not None and measure.goal.of == "value":
        axis.axhline(measure.goal.bound, color="tab:red", linestyle="--", linewidth=1)
    target = f"\n{measure.goal}" if measure.goal else ""
    axis.set_title(f"{measure.title}{target}", fontsize=8)
    axis.set_ylabel(measure.unit, fontsize=8)
    axis.set_xticks(range(len(scenario.servers)), [LABELS[s] for s in scenario.servers], fontsize=8)
    axis.set_xlim(-0.6, len(scenario.servers) - 0.4)
    axis.margins(y=0.15)
