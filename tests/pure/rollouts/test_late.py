"""Rows of usage that are committed after rows of a higher number: each is counted once."""

from __future__ import annotations

import json
import random

from server.rollouts.late import LATE_S, Window


def test_every_row_is_counted_once_however_late_it_comes() -> None:
    """Random walks: rows get numbers in order and appear up to ``LATE_S`` later."""
    for seed in range(50):
        draw = random.Random(seed)
        appears = {
            row: row * 0.5 + draw.choice([0.0, 0.0, draw.uniform(0, LATE_S - 3)]) for row in range(1, 200)
        }
        window, newest, counted = Window(0), 0, []
        at = 0.0
        while at < 200:
            at += 2.0
            visible = {row for row, when in appears.items() if when <= at}
            late = [row for row in visible if window.floor < row <= newest and row not in window.counted]
            new = [row for row in visible if row > newest]
            newest = max([newest, *new])
            counted += late + new
            window = window.after(newest, late + new, at)
            window = Window.from_json(json.loads(json.dumps(window.as_json())), newest)
            assert len(window.counted) <= 2 * LATE_S * 2
        assert sorted(counted) == list(appears), seed


def test_a_clock_that_is_put_back_settles_what_was_marked() -> None:
    window = Window(0).after(5, [5], 1000.0)
    assert (window.floor, window.counted) == (0, {5})
    assert window.after(7, [7], 10.0).floor == 5
    assert Window.from_json(None, 9) == Window(9)
