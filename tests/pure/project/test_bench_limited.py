"""What the scenario ``limited`` computes, on the server's own windows and without an engine."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable

import pytest

from server.accounts.terms import KeyLimits
from server.limits.rate import RateMeter
from tests.bench.client import Record
from tests.bench.scenarios.limited import (
    PHASES,
    SHORT,
    Phase,
    _expected,
    allowed,
    beside_refusals,
    compared,
    half_minutes,
)
from tests.bench.stats import most_within

REQUESTS, TOKENS = PHASES
TAKES = 0.2  # seconds of an answer
RESERVED = SHORT + 2  # tokens: the server's first estimate of a prompt is high
Admits = Callable[[RateMeter, KeyLimits, int, float], bool]


def exact(meter: RateMeter, limits: KeyLimits, tokens: int, now: float) -> bool:
    return meter.check(limits, tokens, now) is None


def scaled(limits: KeyLimits, by: float) -> KeyLimits:
    return KeyLimits(**{name: round(by * n) for name, n in limits.model_dump(exclude_none=True).items()})


def generous(meter: RateMeter, limits: KeyLimits, tokens: int, now: float) -> bool:
    return exact(meter, scaled(limits, 1.02), tokens, now)


def mean(meter: RateMeter, limits: KeyLimits, tokens: int, now: float) -> bool:
    return exact(meter, scaled(limits, 0.98), tokens, now)


def of_the_clock(meter: RateMeter, limits: KeyLimits, tokens: int, now: float) -> bool:
    """Windows that turn with the minute, so that twice as much comes around the turn."""
    minute = RateMeter()
    minute.running, minute.reserved = meter.running, meter.reserved
    for kept, all_of_it in ((minute.requests, meter.requests), (minute.tokens, meter.tokens)):
        for at, amount in all_of_it._parts:
            if at // 60 == now // 60:
                kept.add(at - 0.01, amount)
    return exact(minute, limits, tokens, now)


def asked(phase: Phase, seconds: float, admits: Admits = exact, begin: float = 1000.0) -> list[Record]:
    """At three times the limit on a clock of its own; each answer's tokens count when it ends."""
    meter, limits = RateMeter(), KeyLimits(**{f"{phase.limit}_per_minute": phase.per_minute})
    records: list[Record] = []
    under_way: list[tuple[float, int, int]] = []
    rng = random.Random(9)
    for turn in range(math.ceil(seconds * phase.rate)):
        now = begin + turn / phase.rate + rng.uniform(0, 0.02)
        while under_way and under_way[0][0] <= now:
            end, used, reserved = under_way.pop(0)
            meter.use(used, reserved, end)
            meter.end()
        output = phase.outputs[turn % len(phase.outputs)]
        made = Record("a", phase.limit, now - 0.01, output, status=429, error="{}", retry_after=1.0)
        records.append(made)
        if admits(meter, limits, RESERVED + output, now):
            meter.begin(RESERVED + output, now)
            under_way.append((now + TAKES, SHORT + output, RESERVED + output))
            made.status, made.error = 200, None
            made.chunks, made.end = [now + TAKES / 2], now + TAKES + 0.01
            made.prompt_tokens, made.output_tokens = SHORT, output
    return records


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.limit)
@pytest.mark.parametrize("minutes", [0.5, 1, 1.5, 2, 5])
@pytest.mark.parametrize("begin", [1000.0, 1019.95])
def test_what_is_allowed_is_what_the_servers_windows_let_through(
    phase: Phase, minutes: float, begin: float
) -> None:
    seconds = half_minutes(minutes)
    values = compared(phase, asked(phase, seconds, begin=begin), seconds)
    assert 0.99 <= values["admitted"] <= 1
    assert 0.99 <= values["fullest"] <= 1
    assert values["asked"] == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.limit)
@pytest.mark.parametrize("admits", [generous, of_the_clock])
def test_a_server_that_lets_more_through_is_found_out(phase: Phase, admits: Admits) -> None:
    assert compared(phase, asked(phase, 120, admits), 120)["fullest"] > 1


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.limit)
def test_a_server_that_lets_less_through_is_found_out(phase: Phase) -> None:
    assert compared(phase, asked(phase, 120, mean), 120)["admitted"] < 0.99


def test_times_are_whole_half_minutes() -> None:
    assert [half_minutes(m) for m in (0.01, 0.5, 0.6, 2)] == [30, 30, 60, 120]
    assert [allowed(60, s) for s in (30, 60, 90, 120)] == [60, 60, 120, 120]


def test_the_fullest_window_holds_only_what_surely_was_in_it() -> None:
    assert most_within(60, []) == 0
    assert most_within(60, [(0, 1, 2), (59, 60, 3), (60, 61, 4)]) == 7
    assert most_within(60, [(0, 1, 2), (59, 60, 3), (60, 60.5, 1)]) == 5
    assert most_within(60, [(0, 61, 9), (30, 31, 1)]) == 1, "what takes longer than the window is in none"


def refusal(code: str, retry_after: float | None, status: int = 429) -> Record:
    error = json.dumps({"error": {"message": "Rate limit reached", "code": code}})
    return Record("a", "", 0.0, 1, status=status, error=error, retry_after=retry_after)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (refusal("rate_limit_exceeded", 7), True),
        (refusal("rate_limit_exceeded", None), False),
        (refusal("rate_limit_exceeded", 0), False),
        (refusal("insufficient_quota", 7), False),
        (refusal("rate_limit_exceeded", 7, status=503), False),
        (Record("a", "", 0.0, 1, status=429, error="no JSON", retry_after=7), False),
        (Record("a", "", 0.0, 1, status=200, prompt_tokens=4, output_tokens=1), True),
        (Record("a", "", 0.0, 1, status=200), False),
        (Record("a", "", 0.0, 1, status=200, error="the stream broke off"), False),
        (Record("a", "", 0.0, 1, error="ConnectError"), False),
    ],
)
def test_only_whole_answers_and_refusals_of_the_limit_are_expected(made: Record, expected: bool) -> None:
    assert _expected(made) is expected


def test_who_waits_beside_an_answer_is_not_beside_refusals_only() -> None:
    def record(arrival: float, *chunks: float, status: int = 200) -> Record:
        return Record(
            "a", "", arrival, 1, status=status, chunks=list(chunks), end=chunks[-1] if chunks else arrival
        )

    limited = [record(10, 11, 12), record(13, status=429)]
    before, during, around, after = record(8, 9.9), record(10.5, 11.5), record(9, 14), record(12.1, 13.5)
    assert beside_refusals([before, during, around, after], limited) == [before, after]
