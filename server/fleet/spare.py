"""How many second homes a fleet may spend: the bound on loads that no version needed. Pure.

Each version that is in memory somewhere was loaded once. Everything beyond that, a second home or a change of
home, is a load that serves balance alone, and is spent from here: ``part`` of the versions in memory, or as
many as there are replicas, come back in ``BACK_IN_S`` seconds, and one more for every ``PER_REQUESTS``
requests, so that a fleet whose customers change what they want can follow them.
"""

from __future__ import annotations

from dataclasses import dataclass

BACK_IN_S = 60.0
PER_REQUESTS = 100


@dataclass(slots=True)
class Spare:
    """``now`` is in seconds of a clock that never goes back."""

    part: float
    _left: float = 0.0
    _as_of: float | None = None

    def has(self, now: float, loads: int, *, replicas: int, versions: int) -> bool:
        """Whether so many may be spent, in a fleet of so many replicas with so many versions in memory."""
        most = self._most(replicas, versions)
        if self._as_of is None:  # nothing was spent yet
            self._left, self._as_of = most, now
        passed = now - self._as_of
        if passed > 0:
            self._left, self._as_of = max(-most, min(most, self._left + most * passed / BACK_IN_S)), now
        return self._left >= loads

    def spend(self, loads: int) -> None:
        """Count so many loads as spent, also those for which nobody asked ``may_spend`` first."""
        self._left -= loads

    def earn(self, requests: float = 1) -> None:
        """So many requests have come."""
        self._left += requests / PER_REQUESTS

    def _most(self, replicas: int, versions: int) -> float:
        return max(float(replicas), self.part * versions)
