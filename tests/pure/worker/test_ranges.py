"""Ranges of ranks: what fits, what moves, and that nobody ever shares a rank with another."""

from __future__ import annotations

import random

import pytest

from adapters.worker.ranges import Move, Put, Range, RankRanges, width_of
from tests.support.calls import calls_of


@pytest.mark.parametrize(("rank", "width"), [(1, 1), (2, 2), (3, 4), (8, 8), (24, 32), (64, 64)])
def test_a_range_is_as_wide_as_the_next_power_of_two(rank: int, width: int) -> None:
    assert width_of(rank) == width


def test_eight_of_rank_8_take_the_room_of_one_of_64() -> None:
    ranges = RankRanges(1, 64)
    for load in range(8):
        assert ranges.fits(8)
        assert ranges.add(load, 8) == [Put(load, Range(0, 8 * load, 8))]
    assert not ranges.fits(1)
    with pytest.raises(ValueError, match="1 ranks are not free"):
        ranges.add(9, 1)


def test_a_gap_is_filled_before_a_wider_one_is_broken() -> None:
    ranges = RankRanges(2, 64)
    ranges.add(1, 8)
    ranges.add(2, 8)
    assert ranges.place(2) == Range(0, 8, 8), "not in the other slot, nor in the middle of this one"
    assert ranges.add(3, 64) == [Put(3, Range(1, 0, 64))]


def test_what_is_in_the_way_moves_and_no_more() -> None:
    ranges = RankRanges(2, 16)
    for load in range(4):
        ranges.add(load, 8)
    ranges.remove(0)
    ranges.remove(2)
    moved, put = ranges.add(9, 16)
    assert moved == Move(3, Range(0, 0, 8), left=Range(1, 8, 8)) or moved == Move(
        1, Range(1, 0, 8), left=Range(0, 8, 8)
    )
    assert (put.load, put.place.width) == (9, 16)
    assert repr(ranges).endswith("; 0 of 32 free)")


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="no power of two"):
        RankRanges(2, 320)
    ranges = RankRanges(2, 16)
    assert not ranges.fits(32), "no slot is so wide, though so many ranks are free"
    ranges.add(1, 16)
    with pytest.raises(ValueError, match="load 1 has a place already"):
        ranges.add(1, 8)
    ranges.remove(1)
    ranges.remove(1)
    assert ranges.free == 32


@pytest.mark.parametrize("seed", range(60))
def test_walks(seed: int) -> None:
    """The effects, carried out one after the other, never write where somebody is."""
    rng = random.Random(seed)
    slots, rank = rng.randint(1, 6), rng.choice([8, 16, 64])
    ranges = RankRanges(slots, rank)
    owner: dict[tuple[int, int], int] = {}  # rank of a slot -> load
    ranks: dict[int, int] = {}
    for load in range(250):
        if ranks and rng.random() < 0.5:
            gone = rng.choice(list(ranks))
            del ranks[gone]
            ranges.remove(gone)
            owner = {at: who for at, who in owner.items() if who != gone}
        asked = rng.randint(1, rank) if rng.random() < 0.3 else rng.choice([1, 2, 4, 8, 8, 16, 64])
        room = slots * rank - sum(map(width_of, ranks.values()))
        assert ranges.free == room
        if asked > rank or width_of(asked) > room:
            assert not ranges.fits(asked)
            continue
        assert ranges.fits(asked), "free ranks are always enough"
        effects = ranges.add(load, asked)
        ranks[load] = asked
        for effect in effects:
            place = {(effect.place.slot, at) for at in range(effect.place.start, effect.place.stop)}
            assert place.isdisjoint(owner), f"{effect} writes where somebody is"
            if isinstance(effect, Move):
                assert effect.place.width < width_of(asked), "only narrower ones move"
                owner = {at: who for at, who in owner.items() if who != effect.load}
            owner |= dict.fromkeys(place, effect.load)
        assert type(effects[-1]) is Put
        assert effects[-1].load == load
        ranges.check()
        for one in ranks:
            held = ranges.place(one)
            assert held is not None
            assert held.width == width_of(ranks[one])
            assert {at for at, who in owner.items() if who == one} == {
                (held.slot, at) for at in range(held.start, held.stop)
            }
        # Each level moves less than the width above it.
        assert sum(e.place.width for e in effects[:-1]) <= width_of(asked) * rank.bit_length()


def test_a_load_costs_the_engine_little_however_many_there_are() -> None:
    """It is decided between two steps: with 128 loads on 16 slots, where none, one or many have to move."""
    ranges = RankRanges(16, 64)
    for load in range(128):
        ranges.add(load, 8)
    ranges.remove(5)
    assert calls_of(lambda: ranges.add(5, 1)) < 60
    ranges.remove(5)
    for load in range(3, 128, 8):
        ranges.remove(load)
    moves: list[Put] = []
    assert calls_of(lambda: moves.extend(ranges.add(200, 64))) < 3000
    assert len(moves) == 7, "six went elsewhere"
    ranges.check()
