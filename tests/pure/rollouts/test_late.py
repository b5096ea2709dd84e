"""Rows of usage that are committed after rows of a higher number: each is counted once."""

from __future__ import annotations

import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest

from adapters.store.rollouts import Record
from server.rollouts import stored
from server.rollouts.late import LATE_S, Window
from server.rollouts.stored import MOST, some


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


def test_of_many_requests_some_of_each_version_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many, in their order, of either version, and none more likely than another."""
    draw = random.Random(1)
    monkeypatch.setattr(stored, "random", SimpleNamespace(Random=lambda: draw))

    def record(id_: int) -> Record:
        return Record(id_, 2 if id_ % 20 == 0 else 1, "completed", 0.0, 0.1, 1.0, 5, "stop")

    few = [record(id_) for id_ in range(MOST)]
    assert some(few) is few
    many = [record(id_) for id_ in range(20 * MOST)]
    chosen: Counter[int] = Counter()
    for _ in range(200):
        found = some(many)
        assert sorted(found, key=lambda one: one.id) == list(found)
        assert Counter(one.version for one in found) == {1: MOST, 2: MOST}
        chosen.update(one.id for one in found if one.version == 1)
    assert len(chosen) == 19 * MOST, "each has been chosen at some time"
