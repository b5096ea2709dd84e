"""How much a stream of comparisons says against a hypothesis, looked at as often as one likes. Pure.

An e-process starts at 1 and is expected not to grow while its hypothesis is true, so the chance that it
*ever* reaches 1/a is at most a (Ville's inequality). It may be looked at after every request, and a decision
taken at the first moment that it suffices; a fixed-sample test that is looked at again and again has no such
bound.

``Bets`` is for bounded comparisons: the money of gamblers who each stake a fixed part of theirs on every one
(Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86(1), 2024; the
mean over stakes is Cover's universal portfolio). ``Rates`` is for failures that are rare, where such bets
grow slowly: the likelihood ratio of Turner, Ly and Grünwald, "Generic E-variables for exact sequential
k-sample tests that allow for optional stopping", J. Stat. Planning and Inference 230, 2024, with the failure
rates known so far in the place of a prior. Both hold what they say while the rates themselves drift, since
only what came in the same block is compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

# Parts of what may be staked at most; the money is the mean over them, so that none has to be chosen.
STAKES = (0.9, 0.45, 0.225, 0.1125, 0.05625)
# How much more often the new version might fail.
RATIOS = (2.0, 6.0, 20.0)
# The live version's failures before any was seen: as if 1 of 100 had been.
PRIOR_FAILURES, PRIOR_REQUESTS = 1.0, 100.0
MOST_RATE = 0.9


def _mean(logs: Sequence[float]) -> float:
    """The logarithm of the mean of what ``logs`` are the logarithms of."""
    most = max(logs)
    return most + math.log(sum(math.exp(one - most) for one in logs) / len(logs))


@dataclass(slots=True)
class Bets:
    """Evidence against "the mean of x, given all before, is at most 0"; ``money`` are logarithms."""

    money: list[float] = field(default_factory=lambda: [0.0] * len(STAKES))

    def see(self, x: float, least: float) -> None:
        """Takes the next comparison, never less than ``least``, which is negative."""
        for number, stake in enumerate(STAKES):
            self.money[number] += math.log1p(stake * x / -least)

    @property
    def log_e(self) -> float:
        return _mean(self.money)


@dataclass(slots=True)
class Rates:
    """Evidence against "the new version fails no more often than the live one"; ``money`` are logarithms.

    ``failures`` of ``requests`` are the live version's so far.
    """

    money: list[float] = field(default_factory=lambda: [0.0] * len(RATIOS))
    failures: int = 0
    requests: int = 0

    def see(self, new: bool, live: Sequence[bool]) -> None:
        """Takes a request of the new version with those of the live one beside it: whether each failed.

        What is bet was known before them.
        """
        usual = (self.failures + PRIOR_FAILURES) / (self.requests + PRIOR_REQUESTS)
        others, failed = len(live), sum(live)
        for number, ratio in enumerate(RATIOS):
            worse = max(usual, min(usual * ratio, MOST_RATE))
            # The mean of both: under it, and under whatever is better for the new version, no bet gains.
            same = (worse + others * usual) / (1 + others)
            self.money[number] += _gain(new, 1, worse, same) + _gain(failed, others, usual, same)
        self.failures += failed
        self.requests += others

    @property
    def log_e(self) -> float:
        return _mean(self.money)


def _gain(failed: int, many: int, rate: float, other: float) -> float:
    """log of how much likelier so many failures are with ``rate`` than with ``other``."""
    return failed * math.log(rate / other) + (many - failed) * math.log((1 - rate) / (1 - other))
