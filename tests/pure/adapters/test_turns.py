"""Writers take turns: nobody is refused while the one before makes headway, and all are once it does not."""

from __future__ import annotations

import asyncio
import random

import pytest

from adapters.database.turns import LONGEST_S, STUCK_S, QueueStuck, QueueTooLong, Turns
from tests.support.clock import run


async def write(turns: Turns, seconds: float, ended: list[int], number: int) -> None:
    """With a statement every two seconds at least."""
    async with turns.mine():
        while seconds > 2:
            await asyncio.sleep(2)
            turns.headway()
            seconds -= 2
        await asyncio.sleep(seconds)
        turns.headway()
        ended.append(number)


@pytest.mark.parametrize(("writes", "seconds"), [(20, 1.0), (3, 20.0)])
def test_a_long_queue_that_moves_is_waited_for_in_order(writes: int, seconds: float) -> None:
    """The last waits four times as long and more as the queue may stand still."""

    async def scenario() -> None:
        turns, ended = Turns(), list[int]()
        async with asyncio.TaskGroup() as group:
            for number in range(writes):
                group.create_task(write(turns, seconds, ended, number))
        assert ended == list(range(writes))
        assert repr(turns) == "Turns(taken=False, waiting=0)"

    run(scenario())


async def hang(turns: Turns) -> None:
    async with turns.mine():
        await asyncio.sleep(1e4)


def test_all_are_refused_once_the_queue_stands_still() -> None:
    """One holds its turn for ever; those behind it that came at different times are told after as long."""

    async def scenario() -> None:
        loop, turns, ended = asyncio.get_running_loop(), Turns(), list[int]()
        for number in range(3):
            await write(turns, 0.5, ended, number)
        hanging = asyncio.create_task(hang(turns))

        async def refused(after: float) -> float:
            await asyncio.sleep(after)
            began = loop.time()
            with pytest.raises(QueueStuck):
                await write(turns, 0.5, ended, 4)
            return loop.time() - began

        waits = await asyncio.gather(*(refused(n / 10) for n in range(10)))
        assert all(STUCK_S <= wait <= STUCK_S + 1 for wait in waits)
        hanging.cancel()
        await asyncio.wait({hanging})
        await write(turns, 0.5, ended, 5)
        assert ended == [0, 1, 2, 5]

    run(scenario())


def test_a_write_that_failed_is_no_headway() -> None:
    """Another process holds SQLite, so that each write fails after seconds: nobody waits for all of them."""

    async def scenario() -> None:
        loop, turns, told = asyncio.get_running_loop(), Turns(), list[str]()
        began = loop.time()

        async def fail() -> None:
            async with turns.mine():
                await asyncio.sleep(3)
                raise ValueError

        for result in await asyncio.gather(*(fail() for _ in range(9)), return_exceptions=True):
            told.append(type(result).__name__)
        assert sorted(told) == ["QueueStuck"] * 7 + ["ValueError"] * 2
        assert loop.time() - began <= 2 * STUCK_S

    run(scenario())


def test_nobody_waits_longer_than_the_longest() -> None:
    async def scenario() -> None:
        turns, ended = Turns(), list[int]()
        results = await asyncio.gather(
            *(write(turns, 1.0, ended, number) for number in range(100)), return_exceptions=True
        )
        late = [number for number, result in enumerate(results) if isinstance(result, QueueTooLong)]
        assert ended == list(range(len(ended)))
        assert late == list(range(len(ended), 100))
        assert LONGEST_S <= len(ended) <= LONGEST_S + 2

    run(scenario())


@pytest.mark.parametrize("seed", range(20))
def test_turns_are_never_lost(seed: int) -> None:
    """Writers that end, fail, are cancelled in the queue and in their turn: it is free afterwards, and one
    at most ever has it."""

    async def scenario() -> None:
        rng, turns, inside = random.Random(seed), Turns(), 0

        async def one(delay: float, seconds: float, fails: bool) -> None:
            nonlocal inside
            await asyncio.sleep(delay)
            async with turns.mine():
                inside += 1
                try:
                    assert inside == 1
                    await asyncio.sleep(seconds)
                    if fails:
                        raise ValueError
                finally:
                    inside -= 1

        tasks = [
            asyncio.create_task(one(rng.uniform(0, 30), rng.choice([0, 0.3, 2, 7]), rng.random() < 0.3))
            for _ in range(40)
        ]
        for task in rng.sample(tasks, 15):
            await asyncio.sleep(rng.uniform(0, 3))
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [r for r in results if isinstance(r, AssertionError)]
        async with turns.last():
            assert inside == 0
        assert repr(turns) == "Turns(taken=False, waiting=0)"

    run(scenario())
