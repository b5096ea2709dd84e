"""The bench of faults: what it calls a miss, and how it reckons the time without service."""

from __future__ import annotations

import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest

from tests.bench.chaos.order import in_order
from tests.bench.chaos.report import Row, longest_pause, table


def row(pause: float = 1.0, said: str = "", wrong: tuple[str, ...] = (), ends: tuple[int, ...] = ()) -> Row:
    outcomes = Counter({"200": 5, "503 engine_restarting": 2})
    return Row("a fault", pause, 2.0, outcomes, said, wrong, ends)


@pytest.mark.parametrize(
    ("made", "misses"),
    [
        (row(), []),
        (row(ends=(1,)), []),
        (row(said="it ended with status 3"), []),
        (row(math.inf), ["no service again"]),
        (row(wrong=("500 x", "500 y")), ["2 × such as: 500 x"]),
        (row(math.inf, wrong=("500 x",)), ["no service again", "1 × such as: 500 x"]),
    ],
)
def test_what_is_a_miss(made: Row, misses: list[str]) -> None:
    assert made.misses == misses


@pytest.mark.parametrize(
    ("served", "pause"),
    [
        ([1, 2, 3, 9, 10], 6),
        ([-5, 9, 10, 11], 9),
        ([1, 2, 3], 7),
        ([3, 1, 6, 9], 3),
        ([10], 10),
        ([], 10),
    ],
)
def test_the_longest_time_without_an_answer(served: list[float], pause: float) -> None:
    assert longest_pause(served, 0, 10) == pause


def test_the_table_has_a_line_for_each_kind() -> None:
    made = [row(ends=(1,)), row(3.0, wrong=("a | b",)), Row("another", 1.0, 1.0)]
    rows = table(made).splitlines()
    assert len({line.count("|") for line in rows}) == 1
    assert rows[2] == (
        "| a fault | 2 | 3.0 / 3.0 s | 2.0 s | 0.0 s | 0.0 s | exit statuses 1 "
        "| 10 × 200, 4 × 503 engine_restarting | missed: 1 × such as: a ¦ b |"
    )
    assert len(rows) == 4


def test_in_a_hurry_what_is_like_another_comes_last() -> None:
    faults = [SimpleNamespace(name=name, like_another=name in "bd") for name in "abcd"]
    hurried = in_order(faults, 2, random.Random(1), hurry=True)
    assert "".join(fault.name for fault in hurried) == "acbdacbd"
    orders = {
        "".join(fault.name for fault in in_order(faults, 2, random.Random(seed), hurry=False))
        for seed in range(20)
    }
    assert all(sorted(order[:4]) == sorted(order[4:]) == list("abcd") for order in orders)
    assert len(orders) > 10
