"""Several adapters in one slot of vLLM's stacked tensors, each on a range of its ranks. Pure.

A slot is as wide as the largest rank that is served, R, and an adapter of rank 8 leaves seven eighths of one
of 64 unused. Here a load gets a range of R's ranks, as wide as its own rank rounded up to a power of two, and
aligned to its width. Such ranges pack without waste: whatever has come and gone, a load fits if and only if
so many ranks are free, all slots together. Where no gap is wide enough, a few narrower ranges move first.

    add(load, rank)    Moves, then Put
    remove(load)       nothing has to be done; the range is free
"""

from __future__ import annotations

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
    """Owner of the ranges of ``slots`` slots of ``rank`` ranks, a power of two.

    What is free is kept as the largest aligned ranges that it can be cut into, by width; two halves that are
    both free become one (the buddy system: Knuth, The Art of Computer Programming, volume 1, section 2.5).
    A load that finds one takes a few steps, whatever else is there; only a load for which others must move
    looks at each of them, once for each that moves at most.
    """

    def __init__(self, slots: int, rank: int) -> None:
        if width_of(rank) != rank:
            raise ValueError(f"slots of {rank} ranks cannot be divided: it is no power of two")
        self._slots = slots
        self._rank = rank
        self._places: dict[int, Range] = {}
        # (slot, first rank) of each, by width
        self._gaps: dict[int, set[tuple[int, int]]] = {1 << i: set() for i in range(rank.bit_length())}
        self._gaps[rank] = {(slot, 0) for slot in range(slots)}

    def __repr__(self) -> str:
        shown = (f"{p.slot}[{p.start}:{p.stop}] {load}" for load, p in self._in_order())
        return f"RankRanges({', '.join(shown) or 'empty'}; {self.free} of {self._slots * self._rank} free)"

    @property
    def free(self) -> int:
        """Ranks that no load has, of all slots."""
        return sum(width * len(gaps) for width, gaps in self._gaps.items())

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
        place = self._places.pop(load, None)
        if place is None:
            return
        start, width = place.start, place.width
        while (place.slot, start ^ width) in self._gaps[width]:  # its other half
            self._gaps[width].remove((place.slot, start ^ width))
            start, width = start & ~width, 2 * width
        self._gaps[width].add((place.slot, start))

    def check(self) -> None:
        """Raises AssertionError unless ranges and gaps are aligned, inside their slots, apart, complete."""
        gaps = [Range(*at, width) for width, found in self._gaps.items() for at in found]
        end = (-1, 0)
        for place in sorted([*self._places.values(), *gaps]):
            assert place.start % place.width == 0, place
            assert place.stop <= self._rank, place
            assert (place.slot, place.start) >= end, f"{place} overlaps: {self!r}"
            end = (place.slot, place.stop)
        for one in gaps:
            assert (one.slot, one.start ^ one.width) not in self._gaps[one.width], f"{one} has its other half"
        assert self.free + sum(place.width for place in self._places.values()) == self._slots * self._rank

    def _make_room(self, width: int, spared: list[Range], effects: list[Put]) -> Range:
        """A range that is nobody's and no gap any more, outside of ``spared``; moves what is in its way.

        So many ranks are free. What has to move is narrower than ``width``, so this ends.
        """
        if (gap := self._take(width)) is not None:
            return gap
        best = self._least_used(width, spared)
        for narrower, gaps in self._gaps.items():
            gaps -= {at for at in gaps if best.holds(Range(*at, narrower))}
        inside = [pair for pair in self._in_order() if best.holds(pair[1])]
        for load, place in sorted(inside, key=lambda pair: -pair[1].width):
            to = self._make_room(place.width, [*spared, best], effects)
            self._places[load] = to
            effects.append(Move(load, to, place))
        return best

    def _take(self, width: int) -> Range | None:
        """The first part of the narrowest gap that is wide enough, so that wider ones stay whole."""
        found = next((wide for wide, gaps in self._gaps.items() if wide >= width and gaps), None)
        if found is None:
            return None
        slot, start = min(self._gaps[found])
        self._gaps[found].remove((slot, start))
        while found > width:
            found //= 2
            self._gaps[found].add((slot, start + found))
        return Range(slot, start, width)

    def _least_used(self, width: int, spared: list[Range]) -> Range:
        """The aligned range with the least in it that is not part of a wider load, nor of ``spared``."""
        used: dict[tuple[int, int], int] = {}
        covered: set[tuple[int, int]] = set()
        for place in (*self._places.values(), *spared):
            if place.width >= width:
                covered.update((place.slot, start) for start in range(place.start, place.stop, width))
            else:
                at = place.slot, place.start // width * width
                used[at] = used.get(at, 0) + place.width
        _, at = min((ranks, at) for at, ranks in used.items() if at not in covered)
        return Range(*at, width)

    def _in_order(self) -> list[tuple[int, Range]]:
        return sorted(self._places.items(), key=lambda pair: pair[1])
