"""How far behind an engine is, in seconds, and how hard pressed. Pure."""

from __future__ import annotations

from collections import deque

LOOK_BACK_S = 60.0
REMEMBERED = 8_192
# A backlog of so many seconds is worth one more engine of the same size.
ONE_MORE_S = 10.0


class Pace:
    """When requests ended lately. ``now`` is in seconds of a clock that never goes back."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._ends: deque[float] = deque(maxlen=REMEMBERED)

    def ended(self, now: float) -> None:
        """A request has ended, in any way, and made room for another one."""
        self._ends.append(now)

    def backlog(self, now: float, waiting: int) -> float:
        """Seconds until so many waiting requests have a place, if requests end as in the last minute.

        Where none has ended, as if one would in the time that was looked at.
        """
        while self._ends and now - self._ends[0] > LOOK_BACK_S:
            self._ends.popleft()
        full = len(self._ends) == REMEMBERED
        since = self._ends[0] if full else max(self._since, now - LOOK_BACK_S)
        return waiting * max(1.0, now - since) / max(1, len(self._ends))


def pressure_of(*, running: int, most: int, busy_slots: int, slots: int, backlog: float) -> float:
    """0 for an idle engine, 1 for a full one, and 1 more for every ``ONE_MORE_S`` seconds of backlog.

    Full is one that runs as many sequences as it can, or one with something running in every slot.
    """
    full = max(min(running, most) / max(1, most), busy_slots / max(1, slots))
    return full + backlog / ONE_MORE_S
