"""Several adapters in one slot of vLLM's stacked tensors, each on a range of its ranks. Pure.

A slot is as wide as the largest rank that is served, R, and an adapter of rank 8 leaves seven eighths of one
of 64 unused. Here a load gets a range of R's ranks, as wide as its own rank rounded up to a power of two, and
aligned to its width. Such ranges pack without waste: whatever has come and gone, a load fits if and only if
so many ranks are free, all slots together. Where no gap is wide enough, a few narrower ranges move first.

    add(load, rank)    Moves, then Put
    remove(load)       nothing has to be done; the range is free
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Ranks ``start`` to ``stop`` of ``slot``."""

    slot: int
    start: int
    width: int

    @property
    def stop(self) -> int:
        return self.start + self.width

    def holds(self, other: Range) -> bool:
        return self.slot == other.slot and self.start <= other.start and other.stop <= self.stop


@dataclass(frozen=True, slots=True)
class Put:
    """Write ``load`` into ``place``, which is free."""

    load: int
    place: Range


@dataclass(frozen=True, slots=True)
class Move(Put):
    """The same for a load that is elsewhere now; tokens of later steps find it in ``place``."""

    left: Range


def width_of(rank: int) -> int:
    """The ranks that an adapter of ``rank`` takes. ValueError for a rank below 1."""
    if rank < 1:
        raise ValueError(f"an adapter has no rank {rank}")
    return 1 << (rank - 1).bit_length()


class RankRanges:
    """Owner of the ranges of ``slots`` slots of ``rank`` ranks, a power of two."""

    def __init__(self, slots: int, rank: int) -> None:
        if width_of(rank) != rank:
            raise ValueError(f"slots of {rank} ranks cannot be divided: it is no power of two")
        self._slots = slots
        self._rank = rank
        self._places: dict[int, Range] = {}

    def __repr__(self) -> str:
        shown = (f"{p.slot}[{p.start}:{p.stop}] {load}" for load, p in self._in_order())
        return f"RankRanges({', '.join(shown) or 'empty'}; {self.free} of {self._slots * self._rank} free)"

    @property
    def free(self) -> int:
        """Ranks that no load has, of all slots."""
        return self._slots * self._rank - sum(place.width for place in self._places.values())

    def place(self, load: int) -> Range | None:
        return self._places.get(load)

    def fits(self, rank: int) -> bool:
        return rank <= self._rank and width_of(rank) <= self.free

    def add(self, load: int, rank: int) -> list[Put]:
        """Gives ``load`` a range. To be carried out in order. ValueError if it has one or does not fit."""
        if load in self._places:
            raise ValueError(f"load {load} has a place already")
        if not self.fits(rank):
            raise ValueError(f"{width_of(rank)} ranks are not free: {self!r}")
        effects: list[Put] = []
        place = self._make_room(width_of(rank), [], effects)
        self._places[load] = place
        return [*effects, Put(load, place)]

    def remove(self, load: int) -> None:
        """Gives its range back. Safe to call for a load that has none."""
        self._places.pop(load, None)

    def check(self) -> None:
        """Raises AssertionError unless ranges are aligned, inside their slots and apart."""
        end = (-1, 0)
        for load, place in self._in_order():
            assert place.start % place.width == 0, (load, place)
            assert place.stop <= self._rank, (load, place)
            assert (place.slot, place.start) >= end, f"load {load} overlaps: {self!r}"
            end = (place.slot, place.stop)
        assert self.free >= 0, self

    def _make_room(self, width: int, spared: list[Range], effects: list[Put]) -> Range:
        """A free range outside of ``spared``, where so many ranks are free; moves what is in its way.

        The candidate with the least in it that leaves the fewest neighbours free: a gap is filled before a
        wider one is broken. What has to move is narrower than ``width``, so this ends.
        """
        best = min(self._candidates(width, spared), key=lambda one: (*self._cost(one), one))
        for load, place in sorted(self._in_order(), key=lambda pair: -pair[1].width):
            if best.holds(place):
                to = self._make_room(place.width, [*spared, best], effects)
                self._places[load] = to
                effects.append(Move(load, to, place))
        return best

    def _candidates(self, width: int, spared: list[Range]) -> Iterator[Range]:
        """Aligned ranges of ``width`` that are not part of a wider load, nor of ``spared``."""
        taken = [*self._places.values(), *spared]
        for slot in range(self._slots):
            for start in range(0, self._rank, width):
                one = Range(slot, start, width)
                if not any(other.holds(one) or (other in spared and one.holds(other)) for other in taken):
                    yield one

    def _cost(self, one: Range) -> tuple[int, int]:
        """(ranks that must move away, free ranks around it that a wider load could have had)."""
        inside = sum(p.width for p in self._places.values() if one.holds(p))
        around = width = one.width
        while width < self._rank:
            width *= 2
            wider = Range(one.slot, one.start // width * width, width)
            if any(wider.holds(p) or p.holds(wider) for p in self._places.values()):
                break
            around = width
        return inside, around

    def _in_order(self) -> list[tuple[int, Range]]:
        return sorted(self._places.items(), key=lambda pair: pair[1])
