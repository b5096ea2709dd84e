"""The arithmetic of the measures. Seconds everywhere; ``inf`` stands for what never came."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Sequence

from tests.bench.client import Record


def percentile(values: Iterable[float], q: float) -> float:
    """The smallest value that at least ``q`` percent of ``values`` do not exceed (nearest rank).

    Never interpolates, so one request that never ended makes the highest percentiles ``inf``, not ``nan``.
    ``nan`` without values.
    """
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(q / 100 * len(ordered)) - 1)]


def median(values: Iterable[float]) -> float:
    """The middle value, or the mean of the two middle ones; ``nan`` without values."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return low if low == high else (low + high) / 2


def bootstrap(values: Sequence[float], times: int = 4000) -> tuple[float, float]:
    """Between what 95 % of the means of as many values lie, drawn from these again and again."""
    draw = random.Random(1)
    means = [sum(draw.choices(values, k=len(values))) / len(values) for _ in range(times)]
    return percentile(means, 2.5), percentile(means, 97.5)


def middle(values: Iterable[float]) -> list[float]:
    """The middle 80 % of ``values``, in order."""
    ordered = sorted(values)
    edge = len(ordered) // 10
    return ordered[edge : len(ordered) - edge]


def percent_more(logs: Sequence[float]) -> tuple[float, float, float]:
    """What ratios with these logarithms are more than 1, in percent: their mean, and where 95 % of its
    bootstrap begin and end."""
    mean, (low, high) = sum(logs) / len(logs), bootstrap(logs)
    return 100 * math.expm1(mean), 100 * math.expm1(low), 100 * math.expm1(high)


def jain(shares: Sequence[float]) -> float:
    """Jain's fairness index, (Σx)² / (n·Σx²): 1 when all are equal, 1/n when one has everything."""
    squares = sum(x * x for x in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else math.nan


def ratio(ours: float, theirs: float) -> float:
    """``ours / theirs``; 0 where only theirs never came, ``nan`` where neither did or theirs is 0."""
    if theirs == 0:
        return math.nan
    return ours / theirs


def weight_error(tokens: Sequence[float], weights: Sequence[float]) -> float:
    """The largest relative distance of a share of ``tokens`` from its share of ``weights``."""
    total, whole = sum(tokens), sum(weights)
    if not total:
        return math.nan
    return max(abs(t / total * whole / w - 1) for t, w in zip(tokens, weights, strict=True))


def slope(times: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Least squares' change of ``values`` per unit of time, and half of its 95 % confidence interval.

    Memory moves in steps, so what is left of neighbours is alike: the interval is widened as if there were
    only n(1-r)/(1+r) values, r being that likeness (lag-1 autocorrelation) where it is positive. ``nan`` for
    fewer than 3 values.
    """
    n = len(values)
    if n < 3:
        return math.nan, math.nan
    middle, level = sum(times) / n, sum(values) / n
    spread = sum((t - middle) ** 2 for t in times)
    per_time = sum((t - middle) * (v - level) for t, v in zip(times, values, strict=True)) / spread
    left = [v - level - per_time * (t - middle) for t, v in zip(times, values, strict=True)]
    squares = sum(x * x for x in left)
    if squares == 0:
        return per_time, 0.0
    alike = max(0.0, sum(a * b for a, b in itertools.pairwise(left)) / squares)
    free = max(1.0, n * (1 - alike) / (1 + alike) - 2)
    return per_time, 1.96 * math.sqrt(squares / free / spread)


def gaps(times: Sequence[float], start: float = -math.inf, end: float = math.inf) -> list[float]:
    """Time between consecutive tokens, of the gaps that end from ``start`` to ``end``."""
    return [b - a for a, b in itertools.pairwise(times) if start <= b <= end]


def most_within(seconds: float, events: Iterable[tuple[float, float, float]]) -> float:
    """The most that surely happened in one window of so many seconds, both ends in it.

    An event is (not before, not after, amount), and is in a window that holds both times. 0 without events.
    """
    known = list(events)
    sums = (sum(n for a, b, n in known if a >= start and b <= start + seconds) for start, _, _ in known)
    return max(sums, default=0)


def waiting_between(records: Iterable[Record], start: float, end: float) -> list[Record]:
    """Those without a first token at some moment from ``start`` to ``end``, whenever they arrived.

    By arrival alone, who starved through the whole window would not be in it.
    """
    return [r for r in records if r.arrival <= end and r.arrival + r.to_first_token >= start]


def tokens_between(records: Iterable[Record], start: float, end: float) -> float:
    """Output tokens that arrived from ``start`` to ``end``.

    A chunk may carry several tokens; where the server's usage says how many there were in all, each chunk
    counts for its share.
    """
    return sum(r.tokens_per_chunk * sum(start <= t <= end for t in r.chunks) for r in records)
