"""How much at once and how much a minute: the arithmetic of limits, without a clock or a loop.

The package ``limits`` was looked at and does not fit. Its moving window keeps one entry for every token, and
none of its windows can give back what was reserved and not used; its sliding window estimates, and its fixed
one lets twice the limit through around the turn of a minute. Here, in any 60 seconds,

    tokens that were used + tokens that requests under way may still use <= the limit

so nothing overshoots, and what a request does not use is free the moment it ends.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from server.accounts.terms import KeyLimits

MINUTE = 60.0
# Events this many seconds apart are kept as one, as if they were all at the end of that time: a window holds
# at most 600 numbers, and at worst what happened counts for a tenth of a second too long.
GRAIN = 0.1


class Window:
    """What happened in the last minute, as a sum: never less than it was."""

    def __init__(self) -> None:
        self._parts: deque[list[float]] = deque()
        self._total = 0.0

    def __repr__(self) -> str:
        return f"Window({int(self._total)} in {len(self._parts)} parts)"

    def add(self, now: float, amount: float) -> None:
        at = (math.floor(now / GRAIN) + 1) * GRAIN
        if self._parts and self._parts[-1][0] >= at:
            self._parts[-1][1] += amount
        else:
            self._parts.append([at, amount])
        self._total += amount

    def used(self, now: float) -> int:
        while self._parts and self._parts[0][0] + MINUTE <= now:
            self._total -= self._parts.popleft()[1]
        return int(self._total)

    def until(self, now: float, gone: float) -> float:
        """Seconds until so much of it is more than a minute ago; a minute if that is not all in it."""
        left = gone
        for at, amount in self._parts:
            left -= amount
            if left <= 0:
                return max(0.0, at + MINUTE - now)
        return MINUTE

    def until_empty(self, now: float) -> float:
        return min(MINUTE, max(0.0, self._parts[-1][0] + MINUTE - now)) if self._parts else 0.0


@dataclass(frozen=True, slots=True)
class Excess:
    """Why a request may not run now. ``never`` if it could not even run alone."""

    limit: str
    allowed: int
    asked: int
    retry_after: float
    never: bool = False


@dataclass(frozen=True, slots=True)
class Left:
    """What a header says of one limit; ``reset`` is in seconds, until all of it is there again."""

    limit: int
    remaining: int
    reset: float


@dataclass(slots=True)
class Meter:
    """One tenant's or one key's use. ``reserved`` are tokens that requests under way may still use."""

    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)
    running: int = 0
    reserved: int = 0

    def excess(self, limits: KeyLimits, tokens: int, now: float) -> Excess | None:
        """What keeps a request of at most so many tokens from running now; None if nothing does."""
        rate = limits.requests_per_minute
        if limits.requests_at_once is not None and self.running >= limits.requests_at_once:
            return Excess("requests_at_once", limits.requests_at_once, self.running + 1, 1.0)
        if rate is not None and (used := self.requests.used(now)) >= rate:
            return Excess("requests_per_minute", rate, 1, self.requests.until(now, used - rate + 1))
        return self.short(limits, tokens, tokens, now)

    def short(self, limits: KeyLimits, tokens: int, more: int, now: float) -> Excess | None:
        """What keeps a request of at most ``tokens`` from reserving ``more``; None if nothing does."""
        most = limits.tokens_per_minute
        if most is None:
            return None
        if tokens > most:
            return Excess("tokens_per_minute", most, tokens, MINUTE, never=True)
        over = self.tokens.used(now) + self.reserved + more - most
        # Without what is reserved it could end at any moment, so the wait is no longer than a window's.
        return Excess("tokens_per_minute", most, tokens, self._wait(now, over)) if over > 0 else None

    def _wait(self, now: float, over: int) -> float:
        return 1.0 if self.reserved >= over else self.tokens.until(now, over - self.reserved)

    def admit(self, tokens: int, now: float) -> None:
        self.requests.add(now, 1)
        self.running += 1
        self.reserved += tokens

    def used(self, tokens: int, of_reserved: int, now: float) -> None:
        """So many tokens were used, and so many of those reserved are now used or not needed."""
        self.reserved -= of_reserved
        if tokens:
            self.tokens.add(now, tokens)

    def end(self) -> None:
        self.running -= 1

    def idle(self, now: float) -> bool:
        return not (self.running or self.requests.used(now) or self.tokens.used(now))

    def left(self, limits: KeyLimits, now: float) -> dict[str, Left]:
        """By what is counted, ``requests`` and ``tokens``, where there is a limit."""
        found = {}
        if (rate := limits.requests_per_minute) is not None:
            rest = max(0, rate - self.requests.used(now))
            found["requests"] = Left(rate, rest, self.requests.until_empty(now))
        if (most := limits.tokens_per_minute) is not None:
            rest = max(0, most - self.tokens.used(now) - self.reserved)
            reset = MINUTE if self.reserved else self.tokens.until_empty(now)
            found["tokens"] = Left(most, rest, reset)
        return found


def duration(seconds: float) -> str:
    """As OpenAI's headers say it: ``120ms``, ``1s``, ``6m0s``."""
    if 0 < seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
