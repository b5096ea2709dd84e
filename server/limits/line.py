"""Who waits for places of one scope, at all processes that share a ledger. Pure: no clock, no loop.

A process has a line of its own and asks for the first in it alone, again and again. What is free would go to
whoever asks next, and one that wants many places at once might wait for ever while small ones of another
process take each that is given back. So the ledger knows who waits, since when and for how much, and nobody
takes what those before it still need:

    taken + what those want who came earlier + what this one wants <= the places there are

Whoever passes leaves enough for all before it. One that is not heard of again, as of a process that died, is
forgotten after the time that it gave.
"""

from __future__ import annotations

from dataclasses import dataclass

# One from further ahead than this, in seconds, is from before the clock went back.
FAR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Waits:
    """A request that waits, or would: its ``id``, for how long by now, and how soon it asks again at the
    latest; both in seconds."""

    id: str
    waited: float
    again: float


class Line:
    """Times are in seconds of the ledger's clock."""

    def __init__(self) -> None:
        self._there: dict[str, tuple[float, float, int]] = {}  # since, until, wanted

    def __bool__(self) -> bool:
        return bool(self._there)

    def __repr__(self) -> str:
        return f"<Line {sorted((since, wanted) for since, _, wanted in self._there.values())}>"

    def ahead(self, one: Waits, now: float) -> int:
        """How many places those want who came before ``one``."""
        self._there = {
            id_: kept for id_, kept in self._there.items() if now < kept[1] and kept[0] <= now + FAR_S
        }
        mine = self._since(one, now), one.id
        return sum(
            wanted for id_, (since, _, wanted) in self._there.items() if id_ != one.id and (since, id_) < mine
        )

    def wait(self, one: Waits, wanted: int, now: float) -> None:
        """``one`` has not got its places."""
        self._there[one.id] = self._since(one, now), now + one.again, wanted

    def _since(self, one: Waits, now: float) -> float:
        """As it was said first: measured anew, two that came together would change places at each look."""
        there = self._there.get(one.id)
        return now - one.waited if there is None else there[0]

    def leave(self, id_: str) -> None:
        """It has got them, or waits no more."""
        self._there.pop(id_, None)
