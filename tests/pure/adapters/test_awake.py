"""The clock and the time limit that stand still while their process does."""

from __future__ import annotations

import asyncio
import random

import pytest

from adapters.awake import TICKS_AT_ONCE, AwakeClock, AwakeTimeout
from tests.support.clock import run, stand_still


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


@pytest.mark.parametrize("seconds", [0.2, 3.0, 60.0])
def test_a_limit_ends_what_takes_longer(seconds: float) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(TimeoutError):
            async with AwakeTimeout(seconds) as limit:
                await asyncio.Event().wait()
        assert limit.expired()
        assert loop.time() - began == pytest.approx(seconds, rel=0.2)
        async with AwakeTimeout(seconds) as limit:
            await asyncio.sleep(0.9 * seconds)
        assert not limit.expired()
        await asyncio.sleep(2 * seconds)

    run(scenario())


@pytest.mark.parametrize("before", [0.0, 2.4, 2.9])
def test_a_limit_does_not_count_a_time_in_which_the_process_stood_still(before: float) -> None:
    """What came meanwhile is read, also where it takes a moment to come up through the layers."""

    async def scenario() -> None:
        async with AwakeTimeout(3.0):
            await asyncio.sleep(before)
            stand_still(30.0)
            for _ in range(10):
                await asyncio.sleep(0.005)

    run(scenario())


def test_a_limit_holds_where_the_event_loop_is_always_late() -> None:
    async def scenario() -> None:
        async with AwakeTimeout(3.0):
            for _ in range(100):
                stand_still(2.0)
                await asyncio.sleep(0)

    with pytest.raises(TimeoutError):
        run(scenario())


def test_a_limit_lets_a_cancellation_through() -> None:
    async def wait() -> None:
        async with AwakeTimeout(3.0):
            await asyncio.Event().wait()

    async def scenario() -> None:
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(1.0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run(scenario())
