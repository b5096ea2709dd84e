"""Steps that a cancellation may not leave half done."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def uninterruptible(step: Awaitable[T]) -> T:
    """Waits for ``step`` to end, even if cancelled meanwhile, and returns what it returns.

    Raises what ``step`` raises. A cancellation is raised after ``step`` has ended, with the error of
    ``step``, if any, as its cause. Not ``asyncio.shield``, whose cancelled caller goes on while the step
    still runs.
    """
    task = asyncio.ensure_future(step)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled from task.exception()
    return task.result()


async def run_in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs ``function`` in a worker thread and returns what it returns, or raises what it raises.

    Cancelled, it waits for the thread to end before it raises: what ``asyncio.to_thread`` does not, whose
    cancelled caller goes on while the thread still writes.
    """
    loop = asyncio.get_running_loop()
    return await uninterruptible(loop.run_in_executor(None, functools.partial(function, *args, **kwargs)))
