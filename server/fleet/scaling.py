"""How many replicas a fleet needs. Pure: reports in, a number out.

A replica's pressure is the larger of two: sequences that run, as a part of what it can run at once, and slots
with something running, as a part of its slots; and 1 more for every ten seconds of backlog. What the fleet
needs is its whole pressure divided by ``target``. More is wanted as soon as it is needed; fewer only when for
``calm`` seconds less would have done, as a start takes minutes and a stop moves answers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from server.fleet.reports import READY, Report
from server.telemetry.pace import pressure_of


@dataclass(frozen=True, slots=True)
class Bounds:
    """``least`` and ``most`` replicas; ``target`` is the pressure that a replica should have.

    ``calm`` is in seconds. ``band`` is how far a fleet may be from its target without a change, as a part of
    it.
    """

    least: int = 1
    most: int = 8
    target: float = 0.7
    calm: float = 600.0
    band: float = 0.1

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most or not 0 < self.target <= 1:
            raise ValueError(f"a fleet has at least one replica, and a target of 0 to 1: {self}")


def pressure(report: Report) -> float:
    """0 for an idle replica, 1 for a full one, more where requests wait."""
    return pressure_of(
        running=report.running,
        most=report.max_running,
        busy_slots=report.busy_slots,
        slots=report.gpu_slots,
        backlog=report.backlog,
    )


class Scaler:
    """Remembers what was needed lately. ``now`` is in seconds of a clock that never goes back."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._needed: deque[tuple[float, int]] = deque()

    def wanted(self, now: float, reports: Collection[Report], current: int) -> int:
        """How many replicas there should be; ``current`` are there or coming.

        One that is starting or restarting has no pressure, and what waits for it presses on the others: a
        fleet at most doubles at once.
        """
        total = sum(pressure(report) for report in reports if report.state == READY)
        return self.wanted_for(now, total, current)

    def wanted_for(self, now: float, total: float, current: int) -> int:
        """The same, for replicas whose pressures come to ``total``."""
        bounds = self.bounds
        needed = self._need(total, current)
        self._needed.append((now, needed))
        while self._needed and now - self._needed[0][0] > bounds.calm:
            self._needed.popleft()
        if needed >= current:
            return min(needed, max(bounds.least, 2 * current), bounds.most)
        if now - self._needed[0][0] < bounds.calm * 0.9:
            return min(max(current, bounds.least), bounds.most)
        most = max(need for _, need in self._needed)
        return max(bounds.least, min(current, most, bounds.most))

    def _need(self, total: float, current: int) -> int:
        exact = total / self.bounds.target
        if abs(exact - current) <= self.bounds.band * current:
            return current
        return max(1, math.ceil(exact - 1e-9))
