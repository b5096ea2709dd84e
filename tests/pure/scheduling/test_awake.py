"""The clock that stands still while its process does."""

from __future__ import annotations

import random

import pytest

from server.scheduling.awake import TICKS_AT_ONCE, AwakeClock


class Wall:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def test_it_goes_with_the_wall_while_the_loop_comes_round() -> None:
    wall = Wall()
    clock = AwakeClock(0.1, wall)
    for _ in range(100):
        wall.seconds += 0.15
        clock.look()
    wall.seconds += 0.05
    assert clock.now() == pytest.approx(15.05)


def test_a_pause_counts_as_a_few_ticks() -> None:
    wall = Wall()
    clock = AwakeClock(0.1, wall)
    clock.look()
    wall.seconds += 3600
    assert clock.now() == pytest.approx(TICKS_AT_ONCE * 0.1)
    clock.look()
    wall.seconds += 0.1
    assert clock.now() == pytest.approx(TICKS_AT_ONCE * 0.1 + 0.1)


@pytest.mark.parametrize("seed", range(20))
def test_it_never_goes_back(seed: int) -> None:
    rng, wall = random.Random(seed), Wall()
    clock, before = AwakeClock(0.1, wall), 0.0
    for _ in range(500):
        wall.seconds += rng.choice([0.0, 0.01, 0.1, 0.4, 30.0])
        if rng.random() < 0.5:
            clock.look()
        assert before <= clock.now() <= wall.seconds - 1000
        before = clock.now()
