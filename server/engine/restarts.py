"""Whether an engine that was lost is started again. Pure: no clock, no processes."""

from __future__ import annotations

from collections import deque

WINDOW_S = 600.0


class Restarts:
    """Counts losses of the engine: at most ``most`` restarts within ``WINDOW_S`` seconds."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._losses: deque[float] = deque()

    def lost(self, now: float) -> float | None:
        """The engine was lost, or did not start: seconds to wait before the next start, or None to give up.

        The wait doubles with every loss in the window: 1, 2, 4 … seconds.
        """
        self._losses.append(now)
        while self._losses[0] <= now - WINDOW_S:
            self._losses.popleft()
        if len(self._losses) > self._most:
            return None
        return float(2 ** (len(self._losses) - 1))
