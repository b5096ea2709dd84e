"""How many lines of batches are in the engine, which others share.

One beside other requests, so that a first token waits for a step with one prompt more in it at most; all of
``most`` once nobody else has asked for anything for ``QUIET_S``. Lines enter in the order in which they came,
so batches take turns.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

QUIET_S = 2.0
LOOK_S = 0.1
IDLE_LOOK_S = 0.5  # while there is no line


class Pace:
    """A context for one line. ``foreground`` counts other requests; ``watch`` has to run beside."""

    def __init__(
        self, most: int, foreground: Callable[[], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.most = most
        self.running = 0
        self._foreground = foreground
        self._clock = clock
        self._busy_at = -QUIET_S + clock()
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def allowed(self) -> int:
        """How many lines may be in the engine now."""
        return self.most if self._clock() - self._busy_at >= QUIET_S else 1

    async def __aenter__(self) -> None:
        self.look()
        if not self._waiting and self.running < self.allowed:
            self.running += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it came at the same moment
                self._leave()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        self.running -= 1
        self.look()

    def look(self) -> None:
        """Notes whether others ask, and lets in what may enter."""
        if self._foreground():
            self._busy_at = self._clock()
        while self._waiting and self.running < self.allowed:
            if not (turn := self._waiting.popleft()).cancelled():
                turn.set_result(None)
                self.running += 1

    async def watch(self) -> None:
        """Never returns. Looks seldom while there is no line: each look wakes a busy process."""
        while True:
            await asyncio.sleep(LOOK_S if self._waiting or self.running else IDLE_LOOK_S)
            self.look()
