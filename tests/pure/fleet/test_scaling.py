"""How many replicas are wanted."""

from __future__ import annotations

import random
from typing import Any

import pytest

from server.fleet.reports import Report
from server.fleet.scaling import Bounds, Scaler, pressure


def report(name: str = "r", **fields: Any) -> Report:
    values = {"state": "ready", "gpu_slots": 10, "max_running": 100} | fields
    return Report(name, 1, "base", "kind", **values)


def loaded(part: float, count: int) -> list[Report]:
    return [report(str(number), running=round(100 * part)) for number in range(count)]


def test_pressure_is_the_larger_of_sequences_and_slots() -> None:
    assert pressure(report()) == 0.0
    assert pressure(report(running=50, busy_slots=2)) == 0.5
    assert pressure(report(running=30, busy_slots=9)) == 0.9
    assert pressure(report(running=100, queued=200, backlog=20.0)) == 3.0
    assert pressure(report(running=100, queued=200)) == 1.0, "what is gone in a moment needs no replica"


@pytest.mark.parametrize("bounds", [{"least": 0}, {"least": 3, "most": 2}, {"target": 0.0}, {"target": 1.5}])
def test_bounds_that_make_no_sense(bounds: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Bounds(**bounds)


def test_more_at_once_when_it_is_needed() -> None:
    scaler = Scaler(Bounds(most=8))
    assert scaler.wanted(0.0, loaded(0.7, 2), 2) == 2
    assert scaler.wanted(1.0, loaded(1.0, 2), 2) == 3
    assert scaler.wanted(2.0, [report(queued=5_000, backlog=500.0)], 1) == 2, "it doubles at most"
    assert scaler.wanted(3.0, [report(queued=5_000)] * 8, 8) == 8


def test_fewer_only_after_a_calm_time() -> None:
    scaler = Scaler(Bounds(calm=600.0))
    assert scaler.wanted(0.0, loaded(0.7, 4), 4) == 4
    for second in range(10, 590, 10):
        assert scaler.wanted(second, loaded(0.2, 4), 4) == 4
    assert scaler.wanted(601.0, loaded(0.2, 4), 4) == 2
    assert scaler.wanted(1300.0, loaded(0.0, 2), 2) == 2, "what was last known is too long ago"


def test_one_burst_within_the_calm_time_keeps_what_it_needed() -> None:
    scaler = Scaler(Bounds(calm=600.0))
    for second in range(0, 700, 10):
        part = 0.55 if second == 300 else 0.1
        wanted = scaler.wanted(float(second), loaded(part, 4), 4)
    assert wanted == 4


def test_replicas_that_are_not_ready_press_on_nobody() -> None:
    scaler = Scaler(Bounds())
    waiting = report("new", state="restarting", queued=500)
    assert scaler.wanted(0.0, [*loaded(0.7, 2), waiting], 3) == 3


def test_a_fleet_near_its_target_is_left_alone() -> None:
    scaler = Scaler(Bounds(most=20))
    for part in (0.64, 0.7, 0.76):
        assert scaler.wanted(0.0, loaded(part, 10), 10) == 10


@pytest.mark.parametrize("seed", range(20))
def test_never_beyond_the_bounds(seed: int) -> None:
    rng = random.Random(seed)
    bounds = Bounds(least=2, most=6, calm=20.0)
    scaler, now, current = Scaler(bounds), 0.0, 2
    for _ in range(300):
        now += rng.choice([1.0, 5.0, 30.0])
        wanted = scaler.wanted(now, loaded(rng.choice([0.0, 0.3, 0.9, 4.0]), current), current)
        assert bounds.least <= wanted <= bounds.most
        assert wanted <= 2 * current
        current = wanted
