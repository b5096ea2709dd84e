"""Steps that a cancellation may not leave half done, and limits on time that a pause of the process keeps."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, TypeVar

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


# A look each so often whether the process still runs; a look that comes later than this says that it did not.
LOOK_S = 0.5


class Awake:
    """As ``asyncio.timeout``, in time in which this process ran.

    A process that stood still, as one does whose machine is moved or has too much to do, finds its clock
    far ahead and the answers that came meanwhile unread: by the clock it would give up what needs only to
    be read. A part in which the event loop stood still does not count, unless the one before it did too, or
    a loop that is always late would wait for ever.
    """

    def __init__(self, seconds: float) -> None:
        self._part = min(LOOK_S, seconds / 4)
        self._left = seconds
        self._stood_still = False
        self._limit = asyncio.timeout(None)
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def expired(self) -> bool:
        """Whether it was this limit that raised TimeoutError."""
        return self._limit.expired()

    async def __aenter__(self) -> Awake:
        await self._limit.__aenter__()
        self._wait()
        return self

    async def __aexit__(self, *raised: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await self._limit.__aexit__(*raised)

    def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        self._due = loop.time() + min(self._part, max(0.0, self._left))
        self._timer = loop.call_at(self._due, self._look)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        late = loop.time() - self._due > self._part
        if not late or self._stood_still:
            self._left -= self._part
        self._stood_still = late and not self._stood_still
        if self._left > 1e-9:
            self._wait()
        else:
            self._timer = None
            self._limit.reschedule(loop.time())
