from __future__ import annotations

import asyncio
import threading

import pytest

from adapters.tasks import run_in_thread, uninterruptible


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
