"""Requests whose records come later than those of requests that ended after them. Pure.

PostgreSQL numbers a row before it is committed, so a row may appear below rows that were read already. It can
be late by as long as a transaction may take. For so long a rollout remembers which rows it has counted, and
looks below the newest one again. SQLite has one writer, and no late rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Seconds after which no row can come below one that was read: a connection, a statement and a commit, each
# of which may take DATABASE_TIMEOUT, 5 s by default, and something for clocks.
LATE_S = 20.0


@dataclass(frozen=True, slots=True)
class Window:
    """``counted`` are the rows beyond ``floor`` that were counted; ``marks`` are the newest row at each look,
    with its time in seconds."""

    floor: int
    counted: frozenset[int] = frozenset()
    marks: tuple[tuple[float, int], ...] = ()

    def after(self, newest: int, counted: Iterable[int], at: float, late: float = LATE_S) -> Window:
        """After a look ``at`` that has counted these rows; what is older than ``late`` is settled."""
        marks = (*self.marks, (at, newest)) if not self.marks or newest > self.marks[-1][1] else self.marks
        # A clock that was put back must not keep a mark for ever.
        settled = [row for when, row in marks if not at - late < when <= at + late]
        floor = max([self.floor, *settled])
        kept = frozenset(row for row in (*self.counted, *counted) if row > floor)
        return Window(floor, kept, tuple((when, row) for when, row in marks if row > floor))

    def as_json(self) -> dict[str, Any]:
        return {"floor": self.floor, "counted": sorted(self.counted), "marks": [list(m) for m in self.marks]}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any] | None, seen: int) -> Window:
        """``seen`` is the newest row where none was kept yet."""
        if not kept:
            return cls(seen)
        marks = tuple((float(at), int(row)) for at, row in kept["marks"])
        return cls(int(kept["floor"]), frozenset(kept["counted"]), marks)
