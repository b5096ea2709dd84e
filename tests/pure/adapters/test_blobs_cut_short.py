"""The blob store against crashes at every step and cancellation at every await."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any

import pytest

from adapters.errors import StorageFailed, StorageFull
from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from adapters.store.blobs import BlobStore
from tests.support.blobs import (
    CONFIG,
    MAX_BYTES,
    WEIGHTS,
    assert_consistent,
    assert_whole,
    committed,
    digest_of,
    flip,
    open_files,
    quarantined,
    store,
    upload,
)

__all__ = ["store"]

# --- crash points ---------------------------------------------------------------------------------------

STEPS = ("mkdir", "open", "write", "fchmod", "fsync", "rename", "chmod", "close")


class Failing:
    """Replaces the functions of ``os`` and lets the ``at``-th call of them all fail."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        at: int,
        error: BaseException,
        steps: tuple[str, ...] = STEPS,
    ) -> None:
        self.calls: list[str] = []
        self.failed = False
        for name in steps:
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name), at, error))

    def _wrap(self, name: str, real: Callable[..., Any], at: int, error: BaseException) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) == at:
                self.failed = True
                if name == "close":
                    real(*args, **kwargs)  # Linux frees the descriptor also when close fails
                raise error
            return real(*args, **kwargs)

        return call


async def crash_at_every_step(
    monkeypatch: pytest.MonkeyPatch,
    error: Callable[[], BaseException],
    act: Callable[[], Awaitable[Any]],
    check: Callable[[BaseException | None], Awaitable[None]],
    steps: tuple[str, ...] = STEPS,
) -> list[str]:
    """Runs ``act`` again and again, failing one call later each time, until none fails; returns its calls."""
    for at in range(1, 200):
        with monkeypatch.context() as patch:
            failing = Failing(patch, at, error(), steps)
            caught: BaseException | None = None
            try:
                await act()
            except (StorageFailed, StorageFull) as raised:
                caught = raised
        await check(caught)
        if not failing.failed:
            assert caught is None
            return failing.calls
    raise AssertionError("it never ended")


@pytest.mark.parametrize(
    ("before", "code"),
    [
        ("nothing", errno.ENOSPC),
        ("nothing", errno.EDQUOT),
        ("the same", errno.EIO),
        ("the same, damaged", errno.EIO),
        ("the same, damaged", errno.ENOSPC),
    ],
)
async def test_an_upload_that_crashes_at_any_step_can_be_repeated(
    before: str, code: int, store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def prepare() -> None:
        for name in committed(store):
            await store.remove(name)
        if before != "nothing":
            path = await upload(store)
            if before != "the same":
                flip(path)

    damaged = before == "the same, damaged"

    async def check(caught: BaseException | None) -> None:
        assert open_files(store) == []
        if caught is not None:
            full = code in (errno.ENOSPC, errno.EDQUOT)
            assert isinstance(caught, StorageFull if full else StorageFailed)
            assert caught.__cause__.__notes__[0].startswith("while ")
        await store.sweep([digest_of()], older_than=0)
        assert quarantined(store) == []
        assert set(committed(store)) <= {digest_of()}
        if not damaged:
            assert_consistent(store)
        assert_whole(await upload(store))
        assert_consistent(store)
        await prepare()

    await prepare()
    calls = await crash_at_every_step(
        monkeypatch, lambda: OSError(code, os.strerror(code)), lambda: upload(store), check
    )
    # Each of the steps that can fail was made to fail.
    assert {"mkdir", "open", "write", "fchmod", "fsync", "chmod", "close"} <= set(calls)
    assert ("rename" in calls) == (before != "the same")


async def test_an_upload_that_crashes_empties_its_quarantine_at_once(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a sweep. A chmod or an open that fails may be one that the removal itself needs."""

    async def check(caught: BaseException | None) -> None:
        assert_consistent(store)
        await store.sweep([], older_than=0)

    await crash_at_every_step(
        monkeypatch,
        lambda: OSError(errno.ENOSPC, "full"),
        lambda: upload(store),
        check,
        ("mkdir", "write", "fchmod", "fsync", "rename"),
    )


async def test_a_removal_that_crashes_at_any_step_takes_all_or_nothing(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(caught: BaseException | None) -> None:
        if committed(store):
            assert_whole(store.path(digest_of()))
        await store.sweep([], older_than=0)
        assert committed(store) == quarantined(store) == []
        await upload(store)

    await upload(store)
    calls = await crash_at_every_step(
        monkeypatch, lambda: OSError(errno.EIO, "gone"), lambda: store.remove(digest_of()), check
    )
    assert {"chmod", "rename", "fsync"} <= set(calls)


async def test_a_commit_that_failed_can_be_called_again(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(1, 20):
        async with store.receive() as incoming:
            await incoming.write(CONFIG_FILE, CONFIG)
            await incoming.write(WEIGHTS_FILE, WEIGHTS)
            await incoming.finish()
            with monkeypatch.context() as patch:
                failing = Failing(patch, at, OSError(errno.EIO, "once"))
                with contextlib.suppress(StorageFailed):
                    await incoming.commit()
            assert_whole(await incoming.commit())
        await store.remove(digest_of())
        assert_consistent(store)
        if not failing.failed:
            assert at > 5
            return
    raise AssertionError("it never ended")


async def test_a_write_that_failed_half_way_is_not_finished(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller that goes on after StorageFull does not get a digest of other bytes than the file has."""
    write = os.write
    async with store.receive() as incoming:
        await incoming.write(CONFIG_FILE, CONFIG)
        with monkeypatch.context() as patch:
            sizes = iter([1000])

            def full(fd: int, data: bytes) -> int:
                for size in sizes:
                    return write(fd, data[:size])
                raise OSError(errno.ENOSPC, "full")

            patch.setattr(os, "write", full)
            with pytest.raises(StorageFull):
                await incoming.write(WEIGHTS_FILE, WEIGHTS[: 1 << 20])
        with pytest.raises(StorageFailed):
            await incoming.finish()
    assert_consistent(store)


async def test_a_crash_of_the_machine_leaves_work_for_the_sweep_only(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies in any call: nothing after it runs, not even the clean-up."""

    class PowerCut(BaseException):
        pass

    for at in range(1, 100):
        with monkeypatch.context() as patch:
            failing = Failing(patch, at, PowerCut())
            patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
            with contextlib.suppress(PowerCut):
                await upload(store)
        after = BlobStore(store.root, max_bytes=MAX_BYTES)
        await after.open()
        for name in committed(after):
            assert_whole(after.path(name))
        await after.sweep([], older_than=0)
        assert committed(after) == quarantined(after) == []
        if not failing.failed:
            return
    raise AssertionError("it never ended")


# --- cancellation ---------------------------------------------------------------------------------------


@types.coroutine
def cancelled_at(work: Coroutine[Any, Any, Any], at: int, fate: dict[str, Any]) -> Generator[Any, Any, Any]:
    """Runs ``work`` in the current task and cancels that task at its ``at``-th suspension."""
    task = asyncio.current_task()
    assert task is not None
    step: Callable[[Any], Any] = work.send
    value: Any = None
    suspensions = 0
    while True:
        try:
            waiting = step(value)
        except StopIteration as end:
            return end.value
        suspensions += 1
        if suspensions == at:
            fate["cancelled"] = True
            task.cancel()
        try:
            value, step = (yield waiting), work.send
        except BaseException as error:
            value, step = error, work.throw


async def cancel_everywhere(
    act: Callable[[], Coroutine[Any, Any, Any]], check: Callable[[], Awaitable[None]]
) -> int:
    """Cancels ``act`` at its first suspension, its second …, until it ends before; how many there were."""
    for at in range(1, 500):
        fate: dict[str, Any] = {"cancelled": False}

        async def run(at: int = at, fate: dict[str, Any] = fate) -> Any:
            return await cancelled_at(act(), at, fate)

        task = asyncio.create_task(run())
        await asyncio.wait([task])
        assert task.cancelled() == fate["cancelled"]
        await check()
        if not fate["cancelled"]:
            assert task.exception() is None
            return at - 1
    raise AssertionError("it never ended")


@pytest.mark.parametrize("before", ["nothing", "the same", "the same, damaged"])
async def test_an_upload_cancelled_at_any_await_leaves_nothing(before: str, store: BlobStore) -> None:
    async def prepare() -> None:
        await store.remove(digest_of())
        if before != "nothing":
            path = await upload(store)
            if before != "the same":
                flip(path)

    async def check() -> None:
        assert quarantined(store) == []
        assert open_files(store) == []
        if before != "the same, damaged":
            assert_consistent(store)
        assert_whole(await upload(store))
        await prepare()

    await prepare()
    assert await cancel_everywhere(lambda: upload(store), check) >= 8


async def test_a_commit_cancelled_while_it_waits_for_another_leaves_nothing(store: BlobStore) -> None:
    async with store.receive() as incoming:
        await incoming.write(CONFIG_FILE, CONFIG)
        await incoming.write(WEIGHTS_FILE, WEIGHTS)
        digest = await incoming.finish()
        async with store.lock(digest):
            commit = asyncio.create_task(incoming.commit())
            await asyncio.sleep(0)
            assert not commit.done()
            commit.cancel()
            with pytest.raises(asyncio.CancelledError):
                await commit
    assert committed(store) == []
    assert_consistent(store)


async def test_a_removal_cancelled_at_any_await_is_done_or_not(store: BlobStore) -> None:
    async def check() -> None:
        assert_consistent(store)
        await upload(store)

    await upload(store)
    assert await cancel_everywhere(lambda: store.remove(digest_of()), check) >= 1


async def test_a_cancelled_write_waits_for_its_thread(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it is cancelled again and again, as a task group does."""
    loop = asyncio.get_running_loop()
    entered, leave = asyncio.Event(), asyncio.Event()
    write = os.write
    writing = True

    def slow(fd: int, data: bytes) -> int:
        nonlocal writing
        loop.call_soon_threadsafe(entered.set)
        asyncio.run_coroutine_threadsafe(leave.wait(), loop).result()
        written = write(fd, data)
        writing = False
        return written

    monkeypatch.setattr(os, "write", slow)
    task = asyncio.create_task(upload(store))
    await entered.wait()
    for _ in range(5):
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
    assert len(quarantined(store)) == 1
    leave.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not writing
    assert_consistent(store)
