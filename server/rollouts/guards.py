"""What a new version is held against the live one in, request by request. Pure.

Each guard has a tolerance and one or two tests, of which each gathers evidence of two kinds:
  harm   that the new version is worse: by anything at all where requests fail, else by half the tolerance
  safe   that it is worse by less than the tolerance
All tests together call a version that is not worse harmful with a chance of at most ``error_rate`` (each has
an equal part of it: Bonferroni), and each calls one beyond its tolerance safe with at most that chance. In
between either may be said.

A request of the new version is compared once, with those of the live one that ended since the one before it.
Times and lengths are compared by which is larger (as Mann and Whitney do), so that no single slow request
decides; to be "1.5 times as slow" is that 1.5 times the live version's times would be as often larger as
smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from server.rollouts.evidence import Bets, Rates

# Requests that wait for one of the other version; the oldest go, since times change.
MAX_WAITING = 100
# A test that has compared less than this part of the requests does not apply, as lengths to embeddings.
APPLIES = 0.1

Share = Field(ge=0.001, le=0.5)
Ratio = Field(ge=1.01, le=100)


class Guards(BaseModel):
    """How much worse a new version may be; null takes a guard away.

    ``errors``, ``refusals`` and ``finish`` are parts of the requests (0.02 is two in a hundred more),
    ``first_token``, ``tokens_per_second`` and ``length`` are ratios. ``min_samples`` requests of the new
    version are looked at before each step. ``probes``: whether golden probes must match at each step.

    ``drift`` and ``divergence`` (nats) and ``changed`` (a part of the answers) bound what replayed prompts
    show, see ``REPLAYED``; none of them is set by default.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    error_rate: float = Field(0.05, ge=0.0001, le=0.5)
    min_samples: int = Field(50, ge=1, le=1_000_000)
    errors: float | None = Field(0.02, ge=0.001, le=0.5)
    refusals: float | None = Field(0.02, ge=0.001, le=0.5)
    first_token: float | None = Field(1.5, ge=1.01, le=100)
    tokens_per_second: float | None = Field(1.5, ge=1.01, le=100)
    length: float | None = Field(1.25, ge=1.01, le=100)
    finish: float | None = Field(0.1, ge=0.001, le=0.5)
    drift: float | None = Field(None, ge=0.0001, le=100)
    divergence: float | None = Field(None, ge=0.0001, le=100)
    changed: float | None = Field(None, ge=0.001, le=0.999)
    probes: bool = True

    @property
    def replays(self) -> tuple[str, ...]:
        """The guards that need replayed prompts."""
        return tuple(name for name in REPLAYED if getattr(self, name) is not None)


@dataclass(frozen=True, slots=True)
class Seen:
    """One request that has ended. Times are in seconds; None is what it does not have.

    ``failed`` is the server's fault, ``refused`` what the engine or the version's own template did not take.
    ``first_token`` is without the wait for a turn, ``token`` between two tokens, ``length`` in tokens,
    ``cut`` if it ended because it was as long as it might be. ``unanswered``: it got no turn, or its client
    left, so that it says nothing of the version and is counted alone.
    """

    failed: bool = False
    refused: bool = False
    unanswered: bool = False
    first_token: float | None = None
    token: float | None = None
    length: int | None = None
    cut: bool | None = None


def _log(value: float | None) -> float | None:
    return None if value is None else math.log(max(value, 1e-4))


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


class _Test(Protocol):
    """Gathers evidence from a value of the new version and those of the live one beside it."""

    def see(self, new: float, live: list[float]) -> None: ...
    def harm(self) -> float: ...
    def safe(self) -> float: ...
    def as_json(self) -> dict[str, Any]: ...
    def restore(self, kept: dict[str, Any]) -> None: ...


class _Failures:
    """Of things that should not happen at all."""

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._harm, self._safe = Rates(), Bets()

    def see(self, new: float, live: list[float]) -> None:
        self._harm.see(bool(new), [bool(one) for one in live])
        more = new - sum(live) / len(live)
        self._safe.see(self._tolerance - more, self._tolerance - 1)

    def harm(self) -> float:
        return self._harm.log_e

    def safe(self) -> float:
        return self._safe.log_e

    def as_json(self) -> dict[str, Any]:
        known = [self._harm.failures, self._harm.requests]
        return {"harm": self._harm.money, "safe": self._safe.money, "known": known}

    def restore(self, kept: dict[str, Any]) -> None:
        self._harm = Rates(list(kept["harm"]), *kept["known"])
        self._safe = Bets(list(kept["safe"]))


class _Betting:
    """A bet on harm and one on its absence."""

    def __init__(self) -> None:
        self._harm, self._safe = Bets(), Bets()

    def harm(self) -> float:
        return self._harm.log_e

    def safe(self) -> float:
        return self._safe.log_e

    def as_json(self) -> dict[str, Any]:
        return {"harm": self._harm.money, "safe": self._safe.money}

    def restore(self, kept: dict[str, Any]) -> None:
        self._harm, self._safe = Bets(list(kept["harm"])), Bets(list(kept["safe"]))


class _Bounded(_Betting):
    """Of what may differ a little. ``more`` (new, live, by) is from -1, less than ``by`` more, to 1."""

    def __init__(self, tolerance: float) -> None:
        super().__init__()
        self._tolerance = tolerance

    def _more(self, new: float, live: list[float], by: float) -> tuple[float, float]:
        """How much more the new one is than ``by``, and the least that this could have been."""
        raise NotImplementedError

    def see(self, new: float, live: list[float]) -> None:
        self._harm.see(*self._more(new, live, self._tolerance / 2))
        more, _ = self._more(new, live, self._tolerance)
        self._safe.see(-more, self._least_safe())

    def _least_safe(self) -> float:
        return -1.0


class _Shares(_Bounded):
    """Of a part of the requests: values are 0 or 1, or 0 or -1 where fewer is what matters."""

    def _more(self, new: float, live: list[float], by: float) -> tuple[float, float]:
        return new - sum(live) / len(live) - by, -1 - by

    def _least_safe(self) -> float:
        return self._tolerance - 1


class _Ratios(_Bounded):
    """Of times and lengths, as logarithms: a ratio becomes a difference."""

    def _more(self, new: float, live: list[float], by: float) -> tuple[float, float]:
        return sum((new > one + by) - (new < one + by) for one in live) / len(live), -1.0


class _Often(_Betting):
    """How often something happens, beside a share of the cases: 1 for each case in which it does, else 0."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share

    def see(self, new: float, live: list[float]) -> None:
        self._harm.see(new - self._share, -self._share)
        self._safe.see(self._share - new, self._share - 1)


# Guards of what replayed prompts show, and what the new version does where they say harm. `changed` is the
# share of the answers that differ; of the others the bound is on the median prompt, whose share is a half.
REPLAYED = {
    "drift": "gives its tokens other probabilities",
    "divergence": "expects other tokens",
    "changed": "changes too many answers",
}
_HALF = 0.5


@dataclass(frozen=True, slots=True)
class Kind:
    """One test of a guard: what of a request it takes, and what it gathers evidence with."""

    guard: str
    worse: str  # what the new version does where this test says harm
    value: Callable[[Seen], float | None]
    make: Callable[[float], _Test]
    logarithmic: bool = False


KINDS: dict[str, Kind] = {
    "errors": Kind("errors", "fails more often", lambda seen: float(seen.failed), _Failures),
    "refusals": Kind("refusals", "refuses more often", lambda seen: float(seen.refused), _Failures),
    "first_token": Kind(
        "first_token", "begins later", lambda seen: _log(seen.first_token), _Ratios, logarithmic=True
    ),
    "tokens_per_second": Kind(
        "tokens_per_second", "is slower", lambda seen: _log(seen.token), _Ratios, logarithmic=True
    ),
    "longer": Kind("length", "gives longer answers", lambda seen: _log(seen.length), _Ratios, True),
    "shorter": Kind("length", "is briefer", lambda seen: _negative(_log(seen.length)), _Ratios, True),
    "cut_more": Kind("finish", "more often runs into the limit of tokens", lambda seen: seen.cut, _Shares),
    "cut_less": Kind(
        "finish", "less often runs into the limit of tokens", lambda seen: _negative(seen.cut), _Shares
    ),
}  # fmt: skip

Verdict = Literal["harm", "safe", "open"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one test says now: ``harm`` and ``safe`` are logarithms of evidence, ``enough_…`` what decides.

    ``leans`` if the new version looks worse than the tolerance, though that is not proven.
    """

    test: str
    guard: str
    worse: str
    compared: int
    harm: float
    safe: float
    enough_harm: float
    enough_safe: float
    applies: bool

    @property
    def verdict(self) -> Verdict:
        if self.harm >= self.enough_harm:
            return "harm"
        return "safe" if self.safe >= self.enough_safe else "open"

    @property
    def leans(self) -> bool:
        """Half of the evidence of harm is there, in logarithms."""
        return self.verdict != "safe" and self.harm >= self.enough_harm / 2

    def as_json(self) -> dict[str, Any]:
        """Evidence as parts of what decides: 1 is enough."""
        return {
            "test": self.test,
            "guard": self.guard,
            "verdict": self.verdict,
            "compared": self.compared,
            "harm": round(max(0.0, self.harm / self.enough_harm), 3),
            "safe": round(max(0.0, self.safe / self.enough_safe), 3),
            "applies": self.applies,
        }


@dataclass(slots=True)
class _Running:
    test: _Test
    compared: int = 0
    new: list[float] = field(default_factory=list)
    live: list[float] = field(default_factory=list)

    def see(self, value: float, is_new: bool) -> None:
        mine = self.new if is_new else self.live
        mine.append(value)
        if self.new and self.live:
            self.test.see(self.new.pop(0), self.live)
            self.compared += 1
            self.live.clear()
        del mine[:-MAX_WAITING]


NUMBERS = ("requests", "failed", "refused", "cut", "finished", "unanswered")
SUMS = ("first_token", "token", "length")


def _no_numbers() -> dict[str, float]:
    return dict.fromkeys((*NUMBERS, *SUMS, *(f"{name}_of" for name in SUMS)), 0)


def _no_replays() -> dict[str, float]:
    return dict.fromkeys(
        ("prompts", "failed", "tokens", "changed", "drift", "largest_drift", "divergence"), 0
    )


class Evidence:
    """All that was seen of both versions since a rollout began, and what it says."""

    def __init__(self, guards: Guards) -> None:
        self._guards = guards
        self._running = {
            name: _Running(kind.make(_tolerance(kind, tolerance)))
            for name, kind in KINDS.items()
            if (tolerance := getattr(guards, kind.guard)) is not None
        }
        for name in guards.replays:
            self._running[name] = _Running(_Often(guards.changed or _HALF if name == "changed" else _HALF))
        self.new = _no_numbers()
        self.live = _no_numbers()
        self.replays = _no_replays()

    def see(self, seen: Seen, *, is_new: bool) -> None:
        """Takes one request, in the order in which they ended."""
        _count(self.new if is_new else self.live, seen)
        if seen.unanswered:
            return
        for name, kind in KINDS.items():
            value = kind.value(seen) if name in self._running else None
            if value is not None:
                self._running[name].see(float(value), is_new)

    def see_replay(self, found: Mapping[str, Any]) -> None:
        """Takes one replayed prompt, as ``server.rollouts.replay`` has compared its answers."""
        totals = self.replays
        if "failed" in found:
            totals["failed"] += 1
            return
        totals["prompts"] += 1
        totals["largest_drift"] = max(totals["largest_drift"], found["drift"])
        for name in ("tokens", "changed", "drift", "divergence"):
            totals[name] += found[name]
        for name in self._guards.replays:
            bound = getattr(self._guards, name)
            running = self._running[name]
            running.test.see(found[name] if name == "changed" else float(found[name] > bound), [])
            running.compared += 1

    def findings(self) -> list[Finding]:
        """What each test says, those with the most evidence of harm first."""
        most = max((self._running[name].compared for name in KINDS if name in self._running), default=0)
        rate = self._guards.error_rate
        found = [
            Finding(
                test=name,
                guard=name if name in REPLAYED else KINDS[name].guard,
                worse=REPLAYED[name] if name in REPLAYED else KINDS[name].worse,
                compared=running.compared,
                harm=running.test.harm(),
                safe=running.test.safe(),
                enough_harm=math.log(len(self._running) / rate),
                enough_safe=math.log(1 / rate),
                applies=name in REPLAYED or (running.compared > 0 and running.compared >= most * APPLIES),
            )
            for name, running in self._running.items()
        ]
        return sorted(found, key=lambda finding: -finding.harm)

    def as_json(self) -> dict[str, Any]:
        """All of it, for ``from_json``."""
        tests = {
            name: running.test.as_json()
            | {"compared": running.compared, "waiting": running.new, "beside": running.live}
            for name, running in self._running.items()
        }
        return {"tests": tests, "new": self.new, "live": self.live, "replays": self.replays}

    @classmethod
    def from_json(cls, guards: Guards, kept: dict[str, Any] | None) -> Evidence:
        evidence = cls(guards)
        if kept:
            for name, running in evidence._running.items():
                if (one := kept["tests"].get(name)) is None:  # a guard that came with a later release
                    continue
                running.test.restore(one)
                running.compared = one["compared"]
                running.new, running.live = list(one["waiting"]), list(one["beside"])
            evidence.new, evidence.live = _no_numbers() | kept["new"], _no_numbers() | kept["live"]
            evidence.replays = dict(kept.get("replays") or _no_replays())
        return evidence

    def numbers(self) -> dict[str, Any]:
        """For people: rates and means of both versions, and what each test says."""
        return {
            "new": _shown(self.new),
            "live": _shown(self.live),
            "replays": _shown_replays(self.replays),
            "tests": [finding.as_json() for finding in self.findings()],
        }


def _tolerance(kind: Kind, tolerance: float) -> float:
    return math.log(tolerance) if kind.logarithmic else tolerance


def _count(numbers: dict[str, float], seen: Seen) -> None:
    if seen.unanswered:
        numbers["unanswered"] += 1
        return
    numbers["requests"] += 1
    numbers["failed"] += seen.failed
    numbers["refused"] += seen.refused
    if seen.cut is not None:
        numbers["finished"] += 1
        numbers["cut"] += seen.cut
    for name in SUMS:
        if (value := getattr(seen, name)) is not None:
            numbers[name] += value
            numbers[f"{name}_of"] += 1


def _shown(numbers: dict[str, float]) -> dict[str, float | None]:
    def mean(what: str, of: str) -> float | None:
        return round(numbers[what] / numbers[of], 5) if numbers[of] else None

    token = mean("token", "token_of")
    return {
        "requests": int(numbers["requests"]),
        "unanswered": int(numbers["unanswered"]),
        "errors": mean("failed", "requests"),
        "refusals": mean("refused", "requests"),
        "first_token_seconds": mean("first_token", "first_token_of"),
        "tokens_per_second": round(1 / token, 3) if token else None,
        "output_tokens": mean("length", "length_of"),
        "cut_short": mean("cut", "finished"),
    }


def _shown_replays(totals: Mapping[str, float]) -> dict[str, float | None] | None:
    """Means over the prompts; None before the first one."""
    prompts, failed = int(totals["prompts"]), int(totals["failed"])
    if not prompts + failed:
        return None
    means = {
        name: round(totals[name] / prompts, 5) if prompts else None
        for name in ("changed", "drift", "divergence")
    }
    largest = round(totals["largest_drift"], 5)
    return {"prompts": prompts, "failed": failed, "tokens": int(totals["tokens"]), **means} | {
        "largest_drift": largest
    }


def names(findings: Iterable[Finding]) -> str:
    """The guards of these, for a sentence."""
    return ", ".join(dict.fromkeys(finding.guard for finding in findings))
