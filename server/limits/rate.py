"""Requests at once, requests per minute and tokens per minute: the arithmetic, without a clock or a loop.

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
from server.limits.line import Line, Waits

# Seconds that a window looks back.
WINDOW_S = 60.0
# Events in the same tenth of a second are kept as one, as if all were at its end. A window then holds at most
# 600 numbers, and what happened counts for at most a tenth of a second too long.
GRAIN_S = 0.1


class Window:
    """The sum of what happened in the last minute; rounded up by at most one grain of time, never down.

    Times are in seconds of any clock that does not go back.
    """

    def __init__(self) -> None:
        self._parts: deque[list[float]] = deque()
        self._total = 0.0

    def __repr__(self) -> str:
        return f"Window({int(self._total)} in {len(self._parts)} parts)"

    def add(self, now: float, amount: float) -> None:
        """Counts ``amount`` from ``now`` on."""
        at = (math.floor(now / GRAIN_S) + 1) * GRAIN_S
        if self._parts and self._parts[-1][0] >= at:
            self._parts[-1][1] += amount
        else:
            self._parts.append([at, amount])
        self._total += amount

    def used(self, now: float) -> int:
        """The sum of the last minute."""
        while self._parts and self._parts[0][0] + WINDOW_S <= now:
            self._total -= self._parts.popleft()[1]
        return int(self._total)

    def until(self, now: float, amount: float) -> float:
        """Seconds until ``amount`` of the sum is older than a minute; a minute if the sum is less."""
        left = amount
        for at, part in self._parts:
            left -= part
            if left <= 0:
                return max(0.0, at + WINDOW_S - now)
        return WINDOW_S

    def until_empty(self, now: float) -> float:
        """Seconds until the sum is 0, if nothing is added."""
        return min(WINDOW_S, max(0.0, self._parts[-1][0] + WINDOW_S - now)) if self._parts else 0.0


@dataclass(frozen=True, slots=True)
class LimitExceeded:
    """The limit that a request would pass: ``allowed`` by it, ``asked`` for.

    ``retry_after`` is in seconds. ``never`` if the request asks for more than the whole limit.
    """

    limit: str
    allowed: int
    asked: int
    retry_after: float
    never: bool = False


@dataclass(frozen=True, slots=True)
class Remaining:
    """What one limit leaves at the moment; in ``reset`` seconds all of it is there again."""

    limit: int
    remaining: int
    reset: float


@dataclass(slots=True)
class RateMeter:
    """What one tenant or one key uses.

    ``running`` counts its requests under way, ``reserved`` the tokens that these may still use. Times are in
    seconds, as for ``Window``.
    """

    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)
    running: int = 0
    reserved: int = 0
    line: Line = field(default_factory=Line)

    def check(
        self, limits: KeyLimits, tokens: int, now: float, waits: Waits | None = None
    ) -> LimitExceeded | None:
        """The limit that forbids a new request of at most ``tokens`` tokens now; None if it may run.

        One that ``waits`` leaves what those before it want, and is in the line if it is refused.
        """
        if waits is not None:
            ahead = self.line.ahead(waits, now)
            if (exceeded := self.check_tokens(limits, tokens, tokens + ahead, now)) is not None:
                self.line.wait(waits, tokens, now)
            return exceeded
        rate = limits.requests_per_minute
        if limits.requests_at_once is not None and self.running >= limits.requests_at_once:
            return LimitExceeded("requests_at_once", limits.requests_at_once, self.running + 1, 1.0)
        if rate is not None and (used := self.requests.used(now)) >= rate:
            wait = self.requests.until(now, used - rate + 1)
            return LimitExceeded("requests_per_minute", rate, 1, wait)
        return self.check_tokens(limits, tokens, tokens, now)

    def check_tokens(self, limits: KeyLimits, tokens: int, more: int, now: float) -> LimitExceeded | None:
        """As ``check``, for a request of ``tokens`` in all that reserves ``more`` than it has until now."""
        most = limits.tokens_per_minute
        if most is None:
            return None
        if tokens > most:
            return LimitExceeded("tokens_per_minute", most, tokens, WINDOW_S, never=True)
        over = self.tokens.used(now) + self.reserved + more - most
        if over <= 0:
            return None
        return LimitExceeded("tokens_per_minute", most, tokens, self._wait(now, over))

    def _wait(self, now: float, over: int) -> float:
        """Seconds after which ``over`` tokens may be free.

        Reservations may be given back at any moment; only for what is beyond them the window has to move on.
        """
        return 1.0 if self.reserved >= over else self.tokens.until(now, over - self.reserved)

    def begin(self, tokens: int, now: float, waits: Waits | None = None) -> None:
        """Counts a new request and reserves ``tokens`` for it; it waits no more."""
        if waits is not None:
            self.line.leave(waits.id)
        self.requests.add(now, 1)
        self.running += 1
        self.reserved += tokens

    def use(self, tokens: int, freed: int, now: float) -> None:
        """Counts ``tokens`` as used, and takes ``freed`` off the reservation (below 0: adds to it)."""
        self.reserved -= freed
        if tokens:
            self.tokens.add(now, tokens)

    def end(self) -> None:
        """One of its requests is over; ``use`` has taken its reservation away."""
        self.running -= 1

    def idle(self, now: float) -> bool:
        """Whether it says the same as a new meter."""
        return not (self.running or self.line or self.requests.used(now) or self.tokens.used(now))

    def remaining(self, limits: KeyLimits, now: float) -> dict[str, Remaining]:
        """What is left of ``requests`` and ``tokens`` a minute, where there is a limit."""
        found = {}
        if (rate := limits.requests_per_minute) is not None:
            rest = max(0, rate - self.requests.used(now))
            found["requests"] = Remaining(rate, rest, self.requests.until_empty(now))
        if (most := limits.tokens_per_minute) is not None:
            rest = max(0, most - self.tokens.used(now) - self.reserved)
            reset = WINDOW_S if self.reserved else self.tokens.until_empty(now)
            found["tokens"] = Remaining(most, rest, reset)
        return found


def duration(seconds: float) -> str:
    """As OpenAI's headers say it: ``120ms``, ``1s``, ``6m0s``."""
    if 0 < seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
