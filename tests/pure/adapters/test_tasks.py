from __future__ import annotations

import asyncio
import threading

import pytest

from adapters.tasks import Awake, run_in_thread, uninterruptible
from tests.support.clock import VirtualLoop, run


async def test_it_returns_what_the_step_returns() -> None:
    async def step() -> int:
        return 3

    assert await uninterruptible(step()) == 3
    assert await run_in_thread(max, 1, 2) == 2


async def test_a_cancelled_caller_waits_for_the_step_however_often() -> None:
    done = asyncio.Event()
    ended = []

    async def step() -> None:
        await done.wait()
        ended.append(True)

    caller = asyncio.create_task(uninterruptible(step()))
    for _ in range(3):
        await asyncio.sleep(0)
        caller.cancel()
    await asyncio.sleep(0)
    assert not caller.done()
    done.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended


async def test_a_cancelled_caller_learns_how_the_step_failed() -> None:
    async def step() -> None:
        await asyncio.sleep(0.01)
        raise ValueError("broken")

    caller = asyncio.create_task(uninterruptible(step()))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await caller
    assert isinstance(caught.value.__cause__, ValueError)


async def test_a_cancelled_caller_waits_for_its_thread() -> None:
    let = threading.Event()
    ended = []

    def work() -> None:
        let.wait(120)
        ended.append(True)

    caller = asyncio.create_task(run_in_thread(work))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.sleep(0)
    assert not caller.done()
    let.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended


def stand_still(seconds: float) -> None:
    """The clock goes on, and nothing else."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop._virtual_now += seconds


@pytest.mark.parametrize("seconds", [0.2, 3.0, 60.0])
def test_a_limit_ends_what_takes_longer(seconds: float) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(TimeoutError):
            async with Awake(seconds) as limit:
                await asyncio.Event().wait()
        assert limit.expired()
        assert loop.time() - began == pytest.approx(seconds, rel=0.2)
        async with Awake(seconds) as limit:
            await asyncio.sleep(0.9 * seconds)
        assert not limit.expired()
        await asyncio.sleep(2 * seconds)

    run(scenario())


@pytest.mark.parametrize("before", [0.0, 2.4, 2.9])
def test_a_limit_does_not_count_a_time_in_which_the_process_stood_still(before: float) -> None:
    """What came meanwhile is read, also where it takes a moment to come up through the layers."""

    async def scenario() -> None:
        async with Awake(3.0):
            await asyncio.sleep(before)
            stand_still(30.0)
            for _ in range(10):
                await asyncio.sleep(0.005)

    run(scenario())


def test_a_limit_holds_where_the_event_loop_is_always_late() -> None:
    async def scenario() -> None:
        async with Awake(3.0):
            for _ in range(100):
                stand_still(2.0)
                await asyncio.sleep(0)

    with pytest.raises(TimeoutError):
        run(scenario())


def test_a_limit_lets_a_cancellation_through() -> None:
    async def wait() -> None:
        async with Awake(3.0):
            await asyncio.Event().wait()

    async def scenario() -> None:
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(1.0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run(scenario())
