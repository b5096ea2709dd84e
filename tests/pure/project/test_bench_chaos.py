"""The bench of faults: what it calls a miss, and how it reckons the time without service."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from tests.bench.chaos import AGAIN, Row, longest_pause, table


def row(
    said: str = "", again: float = 1.0, wrong: tuple[str, ...] = (), lost: int = 0, ends: tuple[int, ...] = ()
) -> Row:
    return Row("a fault", said, again, Counter({"200": 5, "503 engine_restarting": 2}), wrong, lost, ends)


@pytest.mark.parametrize(
    ("made", "misses"),
    [
        (row(), []),
        (row(ends=(1,)), []),
        (row("it ended with status 3"), []),
        (row("an admin's write: 503 after 5 s"), []),
        (row("an admin's write: 500 after 30 s"), ["an admin's write: 500 after 30 s"]),
        (row("it ran"), ["it ran"]),
        (row("2 processes of the engine were left"), ["2 processes of the engine were left"]),
        (row(again=AGAIN + 1), ["no service again"]),
        (row(again=math.inf), ["no service again"]),
        (row(lost=2), ["2 lost"]),
        (row(wrong=("500 x", "500 y")), ["2 wrong answers, as 500 x"]),
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


def test_the_table_is_markdown() -> None:
    rows = table([row(ends=(1,), lost=1)]).splitlines()
    assert len({line.count("|") for line in rows}) == 1
    assert rows[2] == (
        "| a fault | the server ended with 1 and was started again | 1.0 s "
        "| 5 × 200, 2 × 503 engine_restarting | missed: 1 lost |"
    )
