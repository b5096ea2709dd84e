"""Rollouts of made-up versions in virtual time: wrong decisions and requests needed; no server, no model.

A full run writes its table into docs/rollouts.md.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.bench.rollout_simulation import CASES, measure, table
from tests.bench.scenario import Goal, Measure, Round, Simulation, Values

PAGE = Path(__file__).parents[3] / "docs" / "rollouts.md"
RUNS = 1000


def simulate(round_: Round) -> Values:
    runs = round_.count(RUNS, 10)
    values = measure(runs)
    if not round_.quick:
        begins = "<!-- simulation: written by `python -m tests.bench rollouts` -->"
        made = f"{begins}\n{table(values, runs)}\n<!-- /simulation -->"
        old = re.compile(r"<!-- simulation:.*?<!-- /simulation -->", re.DOTALL)
        PAGE.write_text(old.sub(lambda _: made, PAGE.read_text()))
    return values


def _measures() -> tuple[Measure, ...]:
    columns = (
        ("wrong", "wrong decisions", "%", Goal("value", "≤", 5)),
        ("open", "undecided", "%", None),
        ("median", "requests of the new version, median", "", None),
        ("p95", "requests of the new version, 95 %", "", None),
        ("minutes", "minutes, median", "", None),
        ("planned", "requests of a fixed-sample test", "", None),
        ("fixed", "its wrong decisions", "%", None),
        ("peeked", "its wrong decisions, looked at on the way", "%", None),
    )
    return tuple(
        Measure(f"{name}/{key}", f"{name}: {title}", unit, goal)
        for name in CASES
        for key, title, unit, goal in columns
    )


SCENARIO = Simulation("rollouts", _measures(), simulate, settings={"runs": RUNS}, runs=1, longest=3600.0)
