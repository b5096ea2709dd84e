"""One picture for each scenario: a panel for each measure, every run as a dot and the median as a bar."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from tests.bench.report import Outcomes, number
from tests.bench.scenario import Measure, Scenario, Simulation
from tests.bench.servers import BareVllm, Loraplex
from tests.bench.stats import median

LABELS = {Loraplex.name: "Loraplex", BareVllm.name: "bare vLLM"}
COLORS = {Loraplex.name: "tab:blue", BareVllm.name: "tab:gray"}
COLUMNS = 4


def write_plot(scenario: Scenario | Simulation, outcomes: Outcomes, folder: Path) -> None:
    """``<scenario>.png``."""
    rows = math.ceil(len(scenario.measures) / COLUMNS)
    columns = min(COLUMNS, len(scenario.measures))
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 3.0 * rows), squeeze=False, layout="constrained"
    )
    for axis, measure in zip(axes.flat, scenario.measures, strict=False):
        _panel(axis, measure, scenario, outcomes)
    for axis in list(axes.flat)[len(scenario.measures) :]:
        axis.axis("off")
    figure.suptitle(scenario.name)
    figure.savefig(folder / f"{scenario.name}.png", dpi=110)
    plt.close(figure)


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
