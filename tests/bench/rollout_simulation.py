"""Rollouts in virtual time: the real guards and the real plan on made-up requests, beside fixed-sample tests.

A case says how the new version differs from the live one. A wrong decision is to send an equal version back,
or to complete one that is worse.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from statistics import NormalDist

from server.rollouts.guards import KINDS, Evidence, Guards, Seen
from server.rollouts.plan import Probes, Rollout, looked, probed

RATE = 5.0  # requests a second
MAX_TOKENS = 256
LOOK_S = 2.0
GIVEN_UP = 20_000  # requests of the new version
START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Model:
    """How a version answers: times and lengths are lognormal, with these medians and spreads."""

    errors: float = 0.005
    unanswered: float = 0.0  # got no turn
    first_token: float = 0.15
    token: float = 0.02
    length: float = 80.0
    spread: float = 0.5
    length_spread: float = 0.8

    def request(self, rng: random.Random, slower: float = 1.0) -> Seen:
        """One request; all times are ``slower`` times theirs."""
        if self.unanswered and rng.random() < self.unanswered:
            return Seen(unanswered=True)
        if rng.random() < self.errors:
            return Seen(failed=True)
        wanted = self.length * math.exp(rng.gauss(0, self.length_spread))
        return Seen(
            first_token=slower * self.first_token * math.exp(rng.gauss(0, self.spread)),
            token=slower * self.token * math.exp(rng.gauss(0, self.spread / 2)),
            length=max(1, min(round(wanted), MAX_TOKENS)),
            cut=wanted > MAX_TOKENS,
        )


LIVE = Model()


@dataclass(frozen=True, slots=True)
class Case:
    """``slower`` is by what all times are multiplied, of both versions, at a time in seconds."""

    title: str
    new: Model
    worse: bool
    slower: Callable[[float], float] = lambda _: 1.0


def _day(seconds: float) -> float:
    """Up to three times as slow and back, every 20 minutes."""
    return float(3.0 ** math.sin(seconds / 1200 * 2 * math.pi))


CASES = {
    "equal": Case("an equal version", LIVE, worse=False),
    "drift": Case("an equal version, while the load makes both up to 9 times slower", LIVE, False, _day),
    "cold": Case(
        "an equal version in no slot, of whose requests a full server leaves three in ten without a turn",
        replace(LIVE, unanswered=0.3),
        worse=False,
    ),
    "errors": Case("3 % errors instead of 0.5 %", replace(LIVE, errors=0.03), worse=True),
    "slow": Case("twice as slow", replace(LIVE, first_token=0.3, token=0.04), worse=True),
    "short": Case("30 % shorter answers", replace(LIVE, length=56.0), worse=True),
    "base": Case(
        "answers as the base: of another length, and on to the limit",
        replace(LIVE, length=200.0, length_spread=1.2),
        worse=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """``state`` the rollout came to, None if it was given up; after ``samples`` of the new version."""

    state: str | None
    samples: int
    seconds: float

    def wrong(self, case: Case) -> bool:
        return self.state == ("completed" if case.worse else "rolled_back")


def roll_out(case: Case, seed: int, rollout: Rollout | None = None) -> Outcome:
    """One rollout to its end."""
    rng = random.Random(seed)
    now = 0.0
    rollout = rollout or Rollout(version=2, live=1, since=START)
    evidence = Evidence(rollout.guards)
    samples = 0
    while not rollout.ended and samples < GIVEN_UP:
        at = START + timedelta(seconds=now)
        if rollout.wants_probes:
            rollout = probed(rollout, Probes(matches=True), at)
        new = 0
        for _ in range(round(RATE * LOOK_S)):
            is_new = rng.random() * 100 < rollout.share
            model = case.new if is_new else LIVE
            seen = model.request(rng, case.slower(now))
            new += is_new and not seen.unanswered
            evidence.see(seen, is_new=is_new)
        now += LOOK_S
        samples += new
        rollout = replace(rollout, samples=rollout.samples + new)
        rollout = looked(rollout, evidence, START + timedelta(seconds=now))
    return Outcome(rollout.state if rollout.ended else None, samples, now)


# --- tests with a number of samples that is fixed beforehand ---------------------------------------------

_Normal = NormalDist()
BESIDE = 19  # requests of the live version for each of the new one, as at a share of 5 %


class _Sums:
    """Number, sum and sum of squares of what each test takes."""

    def __init__(self) -> None:
        self.of = {name: [0, 0.0, 0.0] for name in KINDS}

    def see(self, seen: Seen) -> None:
        for name, kind in KINDS.items():
            if not seen.unanswered and (value := kind.value(seen)) is not None:
                sums = self.of[name]
                sums[0] += 1
                sums[1] += value
                sums[2] += value * value

    def mean_and_error(self, name: str) -> tuple[float, float]:
        many, total, squares = self.of[name]
        if many < 2:
            return 0.0, math.inf
        mean = total / many
        return mean, max(squares / many - mean * mean, 1e-9) / many


def _worse(new: _Sums, live: _Sums, guards: Guards) -> bool:
    """Whether any test (Welch's, on means of rates and of logarithms) finds the new version worse."""
    enough = _Normal.inv_cdf(1 - guards.error_rate / len(KINDS))
    for name, kind in KINDS.items():
        (mean, error), (other, other_error) = new.mean_and_error(name), live.mean_and_error(name)
        allowed = 0.0 if kind.guard in ("errors", "refusals") else _half(kind.guard, guards)
        if (mean - other - allowed) > enough * math.sqrt(error + other_error):
            return True
    return False


def _half(guard: str, guards: Guards) -> float:
    tolerance: float = getattr(guards, guard)
    return (tolerance if guard == "finish" else math.log(tolerance)) / 2


def planned(case: Case, guards: Guards) -> int:
    """How many requests of the new version a test needs that finds this difference in 95 of 100 cases.

    Where there is none, as many as show that errors are within their tolerance.
    """
    power = _Normal.inv_cdf(0.95)
    level = _Normal.inv_cdf(1 - guards.error_rate / len(KINDS))
    rng = random.Random(1)
    new, live = _Sums(), _Sums()
    for _ in range(20_000):
        new.see(case.new.request(rng))
        live.see(LIVE.request(rng))
    if not case.worse:
        rate = LIVE.errors * (1 - LIVE.errors) * (1 + 1 / BESIDE)
        assert guards.errors is not None
        return math.ceil((_Normal.inv_cdf(1 - guards.error_rate) + power) ** 2 * rate / guards.errors**2)
    needed = math.inf
    for name, kind in KINDS.items():
        (mean, error), (other, other_error) = new.mean_and_error(name), live.mean_and_error(name)
        allowed = 0.0 if kind.guard in ("errors", "refusals") else _half(kind.guard, guards)
        effect = mean - other - allowed
        if effect > 5 * math.sqrt(error + other_error):
            spread = error * new.of[name][0] + other_error * live.of[name][0] / BESIDE
            needed = min(needed, (level + power) ** 2 * spread / effect**2)
    return math.ceil(needed)


def fixed(case: Case, samples: int, seed: int, *, looks: int = 1) -> tuple[bool, bool]:
    """Whether fixed-sample tests decide wrongly: looked at once, after ``samples``, and ``looks`` times."""
    rng, guards = random.Random(seed), Guards()
    new, live = _Sums(), _Sums()
    objects = ever = False
    for look in range(looks):
        for _ in range(samples * (look + 1) // looks - samples * look // looks):
            new.see(case.new.request(rng))
            for _ in range(BESIDE):
                live.see(LIVE.request(rng))
        objects = _worse(new, live, guards)
        ever = ever or objects
    return objects != case.worse, ever != case.worse


# --- the table ---------------------------------------------------------------------------------------------

Values = dict[str, float]


def measure(runs: int, cases: dict[str, Case] = CASES) -> Values:
    """Everything about each case, as ``case/number``."""
    return dict(_measured(runs, cases))


def _measured(runs: int, cases: dict[str, Case]) -> Iterator[tuple[str, float]]:
    guards = Guards()
    for name, case in cases.items():
        outcomes = [roll_out(case, seed) for seed in range(runs)]
        samples = sorted(outcome.samples for outcome in outcomes)
        yield f"{name}/wrong", 100 * sum(outcome.wrong(case) for outcome in outcomes) / runs
        yield f"{name}/open", 100 * sum(outcome.state is None for outcome in outcomes) / runs
        yield f"{name}/median", samples[runs // 2]
        yield f"{name}/p95", samples[min(runs - 1, runs * 95 // 100)]
        yield f"{name}/minutes", sorted(outcome.seconds for outcome in outcomes)[runs // 2] / 60
        size = planned(case, guards)
        yield f"{name}/planned", size
        often = max(20, size // 20)
        wrong = [fixed(case, size, seed, looks=often) for seed in range(runs)]
        yield f"{name}/fixed", 100 * sum(once for once, _ in wrong) / runs
        yield f"{name}/peeked", 100 * sum(peeked for _, peeked in wrong) / runs


def table(values: Values, runs: int) -> str:
    """As Markdown."""
    rows = [
        f"| of {runs:,} rollouts | wrong | undecided | requests of the new version, median (95 %) | minutes"
        f" | fixed-sample: planned | of {runs:,} wrong | looked at on the way: wrong |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, case in CASES.items():
        if f"{name}/wrong" not in values:
            continue

        def value(key: str, name: str = name) -> float:
            return values[f"{name}/{key}"]

        rows.append(
            f"| {case.title} | {value('wrong'):.1f} % | {value('open'):.1f} % | {value('median'):,.0f}"
            f" ({value('p95'):,.0f}) | {value('minutes'):.0f} | {value('planned'):,.0f}"
            f" | {value('fixed'):.1f} % | {value('peeked'):.1f} % |"
        )
    return "\n".join(rows)
