"""The attacker's bench: what it calls a miss, and that its inputs are bounded."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from tests.bench.attack import GAP, MEMORY, Seen, table, verdict
from tests.bench.hostile import KINDS, Kind, write_adapter
from tests.bench.hostile_time import Long, growth, report
from tests.bench.hostile_wire import head


async def nothing(_: object) -> Counter[str]:
    return Counter()


KIND = Kind("a kind", nothing, frozenset({"400"}))


def seen(gap: float = 0.1, memory: float = 500, answer: str = "yes") -> Seen:
    return Seen(gaps=[0.1] * 99 + [gap], health=[0.01], memory=[500, memory], answers={"why": {answer}})


@pytest.mark.parametrize(
    ("during", "outcomes", "misses"),
    [
        (seen(), {"400": 3}, []),
        (seen(gap=0.1 * GAP), {}, []),
        (seen(gap=0.1 * GAP + 0.01), {}, ["gap"]),
        (seen(memory=500 + MEMORY), {}, []),
        (seen(memory=501 + MEMORY), {}, ["memory"]),
        (seen(answer=""), {}, ["answers differ"]),
        (seen(), {"400": 3, "500": 1, "200": 1}, ["outcomes 200, 500"]),
        (Seen(memory=[500.0]), {}, ["gap"]),
    ],
)
def test_what_is_a_miss(during: Seen, outcomes: dict[str, int], misses: list[str]) -> None:
    assert verdict(KIND, Counter(outcomes), seen(), during).misses == misses


def test_an_answer_to_a_question_of_which_the_quiet_time_knows_nothing_differs() -> None:
    assert verdict(KIND, Counter(), Seen([0.1], [0.1], [500]), seen()).misses == ["answers differ"]


def test_memory_that_came_back_is_shown_and_no_miss() -> None:
    during = seen()
    during.memory = [500, 900, 510]
    found = verdict(KIND, Counter({"400": 2}), seen(), during)
    assert (found.memory, found.peak, found.misses) == (10, 400, [])


def test_the_table_is_markdown() -> None:
    rows = table([verdict(KIND, Counter({"400": 2, "closed": 1}), seen(), seen(gap=0.5))]).splitlines()
    assert len({row.count("|") for row in rows}) == 1
    assert rows[2] == (
        "| a kind | 2 × 400, 1 × closed | equal | 500 / 100 ms = 5.0 × | 10 ms | +0 / +0 MiB "
        "| missed: gap; outcomes closed |"
    )


def test_kinds_have_names_of_their_own() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)


def test_a_head_ends_with_an_empty_line() -> None:
    assert head("/x", "A: b") == b"POST /x HTTP/1.1\r\nHost: a\r\nA: b\r\n\r\n"


def test_a_written_adapter_is_one_of_rank_one(tmp_path: Path) -> None:
    write_adapter(tmp_path, np.ones((1, 8), np.float32), np.ones((4, 1), np.float32), alpha=2)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"]) == (1, 2)
    assert sorted(t.shape for t in load_file(tmp_path / WEIGHTS_FILE).values()) == [(1, 8), (4, 1)]


@pytest.mark.parametrize(
    ("sizes", "grows"),
    [([100, 100, 100], 0), ([100, 150, 200], 66.7), ([200, 100], -66.7), ([100, 102, 100, 102, 100], 0)],
)
def test_the_slope_of_memory_is_that_of_a_line_through_all_of_it(sizes: list[float], grows: float) -> None:
    assert growth([(30 * n, size) for n, size in enumerate(sizes)])[0] == pytest.approx(grows, abs=0.1)


def test_a_slope_has_a_doubt_that_follows_from_what_the_line_leaves() -> None:
    steady = [(30.0 * n, 100.0 + n) for n in range(10)]
    assert growth(steady)[1] == pytest.approx(0, abs=1e-6)
    noisy = [(at, size + (5 if n % 2 else -5)) for n, (at, size) in enumerate(steady)]
    assert growth(noisy)[1] > 5
    often = [(30.0 * n + part, size) for n, (_, size) in enumerate(noisy) for part in range(10)]
    assert growth(often)[1] == pytest.approx(growth(noisy)[1], rel=0.1), "more measurements are no more facts"


def test_a_long_attack_misses_by_growth_answers_and_outcomes() -> None:
    flat, steep = ([(float(at), 500 + at * each) for at in range(100)] for each in (0.0, 1.0))
    assert report(Long(memory=flat), seen(), seen(), 1)[1] == []
    _, misses = report(Long(memory=steep, wrong=["a kind: 500"] * 2), seen(), seen(answer=""), 1)
    assert misses == ["memory grew by 13.2 ± 0.0 %", "answers differ for 1 prompts", "a kind: 500"]


def test_what_is_not_a_refusal_is_noted_by_its_kind() -> None:
    long = Long()
    long.note(KIND, Counter({"400": 2, "500": 1}))
    assert (long.attacks, long.wrong) == (Counter({"a kind": 1}), ["a kind: 500"])
