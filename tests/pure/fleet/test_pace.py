"""Seconds of backlog."""

from __future__ import annotations

import pytest

from server.telemetry.pace import LOOK_BACK_S, REMEMBERED, Pace, pressure_of


def test_what_waits_divided_by_what_ends() -> None:
    pace = Pace(0.0)
    for number in range(120):
        pace.ended(number / 2)
    assert pace.backlog(60.0, 0) == 0.0
    assert pace.backlog(60.0, 20) == pytest.approx(10.0)


def test_what_ended_long_ago_says_nothing() -> None:
    pace = Pace(0.0)
    for _ in range(1_000):
        pace.ended(1.0)
    assert pace.backlog(5.0, 100) < 1.0
    assert pace.backlog(1.0 + LOOK_BACK_S + 1, 1) == LOOK_BACK_S, "none has ended: at least as long as that"


def test_a_new_engine_is_measured_by_what_it_had_time_for() -> None:
    pace = Pace(100.0)
    assert pace.backlog(100.0, 4) == 4.0
    for _ in range(10):
        pace.ended(104.0)
    assert pace.backlog(105.0, 10) == pytest.approx(5.0)


def test_more_ends_than_are_remembered() -> None:
    pace = Pace(0.0)
    for number in range(2 * REMEMBERED):
        pace.ended(number / 1_000)
    assert pace.backlog(2 * REMEMBERED / 1_000, 500) == pytest.approx(0.5, rel=0.01)


def test_pressure() -> None:
    idle = {"running": 0, "most": 8, "busy_slots": 0, "slots": 4, "backlog": 0.0}
    assert pressure_of(**idle) == 0.0
    assert pressure_of(**idle | {"running": 2, "busy_slots": 3}) == 0.75
    assert pressure_of(**idle | {"running": 9}) == 1.0
    assert pressure_of(**idle | {"running": 8, "backlog": 15.0}) == 2.5
