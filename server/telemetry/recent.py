"""How fast the server is now, for people who look."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable


class Recent:
    """How fast the server is now, for people who look: nothing is computed while nobody does.

    ``output`` counts output tokens ever produced. Tokens per second are those since a look at most
    ``WINDOW_S`` ago: the first look has none. First-token times are of streams in the last ``FIRSTS_S``.
    """

    WINDOW_S, FIRSTS_S, APART_S, FIRSTS = 10.0, 60.0, 0.5, 512

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.output = 0
        self._clock = clock
        self._looks: deque[tuple[float, int]] = deque()
        self._firsts: deque[tuple[float, float]] = deque(maxlen=self.FIRSTS)

    def first(self, seconds: float) -> None:
        """A stream had its first token ``seconds`` after its arrival."""
        self._firsts.append((self._clock(), seconds))

    def rates(self) -> dict[str, float | int | None]:
        """Tokens per second over ``seconds``, and percentiles of the time to the first token, in seconds."""
        now = self._clock()
        while self._looks and now - self._looks[0][0] > self.WINDOW_S:
            self._looks.popleft()
        began, before = self._looks[0] if self._looks else (now, self.output)
        if not self._looks or now - self._looks[-1][0] >= self.APART_S:
            self._looks.append((now, self.output))
        passed = now - began
        firsts = sorted(seconds for at, seconds in self._firsts if now - at <= self.FIRSTS_S)
        return {
            "seconds": round(passed, 3),
            "output_tokens_per_second": round((self.output - before) / passed, 2) if passed > 0 else None,
            "first_tokens": len(firsts),
            "first_token_p50": _percentile(firsts, 0.5),
            "first_token_p99": _percentile(firsts, 0.99),
        }


def _percentile(ordered: list[float], share: float) -> float | None:
    """The smallest value that at least ``share`` of them do not exceed; None of none."""
    return round(ordered[math.ceil(share * len(ordered)) - 1], 4) if ordered else None
