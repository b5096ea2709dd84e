"""Rows of the table, and which of them miss what was promised."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One fault, made once.

    ``pause`` is the longest time in which a customer got no answer, ``writes`` the longest in which no change
    was acknowledged, both in seconds from the fault until all is well again; inf if that did not come.
    ``unready`` is how long after the fault ``/ready`` said no for the last time, ``start`` what the server's
    last start before it took.
    """

    fault: str
    pause: float
    writes: float
    outcomes: Counter[str] = field(default_factory=Counter)
    said: str = ""
    wrong: Sequence[str] = ()
    ends: Sequence[int] = ()
    unready: float = 0.0
    start: float = 0.0

    @property
    def misses(self) -> list[str]:
        found = ["no service again"] if self.pause == float("inf") else []
        return [*found, f"{len(self.wrong)} × such as: {self.wrong[0]}"] if self.wrong else found


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line for each kind of fault."""
    lines = [
        "| fault | times | longest time without an answer for a customer, median / most | without a change"
        " | ready again, most | starts took | what was seen | clients were told | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- | --- |",
    ]
    for fault in dict.fromkeys(row.fault for row in rows):
        some = [row for row in rows if row.fault == fault]
        told = sum((row.outcomes for row in some), Counter())
        shown = ", ".join(f"{count} × {what}" for what, count in told.most_common())
        seen = list(dict.fromkeys(row.said for row in some if row.said))
        if ends := [end for row in some for end in row.ends]:
            seen.append(f"exit statuses {', '.join(map(str, ends))}")
        misses = list(dict.fromkeys(miss for row in some for miss in row.misses))
        pauses, writes = ([getattr(row, name) for row in some] for name in ("pause", "writes"))
        verdict = f"missed: {'; '.join(misses)}".replace("|", "¦").replace("\n", " ") if misses else "met"
        lines.append(
            f"| {fault} | {len(some)} | {median(pauses):.1f} / {max(pauses):.1f} s | {max(writes):.1f} s"
            f" | {max(row.unready for row in some):.1f} s | {max(row.start for row in some):.1f} s"
            f" | {'; '.join(seen) or '–'} | {shown} | {verdict} |"
        )
    return "\n".join(lines)


def median(numbers: Sequence[float]) -> float:
    """The upper one of an even count."""
    return sorted(numbers)[len(numbers) // 2]


def longest_pause(served: list[float], start: float, end: float) -> float:
    """The longest time without an answer between ``start`` and ``end``, in seconds."""
    times = [start, *sorted(t for t in served if start <= t <= end), end]
    return max(b - a for a, b in itertools.pairwise(times))
