"""The blob store against crashes at every step, cancellation at every await, and races."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import shutil
import stat
import threading
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import AdapterRejected, StorageFailed, StorageFull, UploadIncomplete, UploadTooLarge
from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from adapters.store.blobs import BlobStore
from adapters.store.digests import digest_slowly

CONFIG = b'{"r": 8}'
WEIGHTS = bytes(range(256)) * 10_000  # 2.4 MiB: three writes
MAX_BYTES = len(CONFIG) + len(WEIGHTS)


@pytest.fixture
async def store(tmp_path: Path) -> BlobStore:
    store = BlobStore(tmp_path / "data", max_bytes=MAX_BYTES)
    await store.open()
    return store


def digest_of(config: bytes = CONFIG, weights: bytes = WEIGHTS) -> str:
    lines = "".join(
        f"{name} {len(data)} {hashlib.sha256(data).hexdigest()}\n"
        for name, data in ((CONFIG_FILE, config), (WEIGHTS_FILE, weights))
    )
    return hashlib.sha256(lines.encode()).hexdigest()


async def upload(store: BlobStore, config: bytes = CONFIG, weights: bytes = WEIGHTS) -> Path:
    async with store.receive() as incoming:
        await incoming.write(CONFIG_FILE, config)
        for at in range(0, len(weights), 300_000):
            await incoming.write(WEIGHTS_FILE, weights[at : at + 300_000])
        await incoming.finish()
        return await incoming.commit()


def quarantined(store: BlobStore) -> list[str]:
    return os.listdir(store.quarantine)


def committed(store: BlobStore) -> list[str]:
    return os.listdir(store.blobs)


def open_files(store: BlobStore) -> list[str]:
    """Descriptors of this process that lead into the store."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        if target.startswith(str(store.root)):
            found.append(target)
    return found


def assert_whole(path: Path, config: bytes = CONFIG, weights: bytes = WEIGHTS) -> None:
    assert sorted(os.listdir(path)) == [CONFIG_FILE, WEIGHTS_FILE]
    assert (path / CONFIG_FILE).read_bytes() == config
    assert (path / WEIGHTS_FILE).read_bytes() == weights


def assert_consistent(store: BlobStore) -> None:
    """Nothing in quarantine, nothing open; what is committed is whole."""
    assert quarantined(store) == []
    assert open_files(store) == []
    for name in committed(store):
        assert name == digest_of()
        assert_whole(store.blobs / name)


# --- the good path --------------------------------------------------------------------------------------


async def test_an_upload_ends_under_its_digest_read_only(store: BlobStore) -> None:
    path = await upload(store)
    assert path == store.path(digest_of()) == store.root / "blobs" / digest_of()
    assert path.is_absolute()
    assert_whole(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o555
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o444}
    assert store.path(digest_of()).is_dir()
    assert_consistent(store)


async def test_incoming_tells_where_it_stands(store: BlobStore) -> None:
    async with store.receive() as incoming:
        assert incoming.path.parent == store.quarantine
        assert incoming.digest is None
        await incoming.write(WEIGHTS_FILE, b"ab")
        await incoming.write(CONFIG_FILE, b"{}")
        assert "receiving, 4 bytes" in repr(incoming)
        assert await incoming.finish() == incoming.digest == digest_of(b"{}", b"ab")
        assert_whole(incoming.path, b"{}", b"ab")
        assert "finished" in repr(incoming)
        path = await incoming.commit()
        assert incoming.path == path == await incoming.commit()
        assert "committed" in repr(incoming)
    assert incoming.size_bytes == 4


async def test_the_digest_is_of_the_contents_not_of_the_chunks(store: BlobStore) -> None:
    digests = set()
    for size in (1, 7, 1000):
        async with store.receive() as incoming:
            for name, data in ((WEIGHTS_FILE, b"w" * 1001), (CONFIG_FILE, b"c" * 10)):
                for at in range(0, len(data), size):
                    await incoming.write(name, data[at : at + size])
            digests.add(await incoming.finish())
    assert digests == {digest_of(b"c" * 10, b"w" * 1001)}
    assert digest_of(b"a", b"b") != digest_of(b"b", b"a")


async def test_chunks_are_collected_before_the_disk_is_asked(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: sizes.append(len(data)) or write(fd, data))
    async with store.receive() as incoming:
        await incoming.write(CONFIG_FILE, CONFIG)
        for at in range(0, len(WEIGHTS), 4000):
            await incoming.write(WEIGHTS_FILE, WEIGHTS[at : at + 4000])
        sent = list(sizes)
        await incoming.finish()
    assert len(sent) == len(WEIGHTS) >> 20
    assert all(1 << 20 <= size < (1 << 20) + 4000 for size in sent)


async def test_short_writes_are_continued(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: max(1, len(data) // 3)]))
    assert_whole(await upload(store))


async def test_the_disk_is_asked_in_threads_only(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("write", "fsync", "rename", "open", "mkdir", "chmod", "close"):
        real = getattr(os, name)

        def guarded(*args: Any, real: Callable[..., Any] = real, **kwargs: Any) -> Any:
            calls.append(threading.current_thread())
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, guarded)
    await upload(store)
    await store.remove(digest_of())
    monkeypatch.undo()
    assert len(calls) > 20
    assert threading.main_thread() not in calls


async def test_what_is_acknowledged_is_on_disk(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files and their folder before the rename, the folder that holds the new name after it."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def traced_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))

    def traced_rename(source: Path, target: Path) -> None:
        rename(source, target)
        events.append(("rename", Path(target).name))

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "rename", traced_rename)
    async with store.receive() as incoming:
        await incoming.write(CONFIG_FILE, CONFIG)
        await incoming.write(WEIGHTS_FILE, WEIGHTS)
        digest = await incoming.finish()
        folder = incoming.path.name
        await incoming.commit()
    assert events == [
        ("fsync", CONFIG_FILE),
        ("fsync", WEIGHTS_FILE),
        ("fsync", folder),
        ("rename", digest),
        ("fsync", digest),
        ("fsync", "blobs"),
    ]
    events.clear()
    await upload(store)
    assert events[-2:] == [("fsync", digest), ("fsync", "blobs")]


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("adapter_model.bin", "weights_not_safetensors"),
        ("pytorch_model.pt", "weights_not_safetensors"),
        ("training_args.json", "unexpected_file"),
        ("../adapter_config.json", "unexpected_file"),
        ("/etc/passwd", "unexpected_file"),
        ("", "unexpected_file"),
        ("x" * 5000, "unexpected_file"),
    ],
)
async def test_only_the_two_files_are_received(name: str, code: str, store: BlobStore) -> None:
    async with store.receive() as incoming:
        with pytest.raises(AdapterRejected) as caught:
            await incoming.write(name, b"x")
        assert caught.value.code == code
        assert name[:120] in caught.value.message
        assert len(caught.value.message) < 400
        assert os.listdir(incoming.path) == []
    assert_consistent(store)


async def test_an_upload_of_the_largest_size_passes_and_one_byte_more_does_not(store: BlobStore) -> None:
    assert_whole(await upload(store))
    with pytest.raises(UploadTooLarge, match=str(MAX_BYTES)):
        await upload(store, CONFIG + b" ")
    assert_consistent(store)


@pytest.mark.parametrize("sent", [(), (CONFIG_FILE,), (WEIGHTS_FILE,)])
async def test_both_files_must_come(sent: tuple[str, ...], store: BlobStore) -> None:
    async with store.receive() as incoming:
        for name in sent:
            await incoming.write(name, b"x")
        with pytest.raises(UploadIncomplete) as caught:
            await incoming.finish()
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            assert (name in caught.value.message) == (name not in sent)
    assert_consistent(store)


async def test_an_upload_that_is_not_committed_is_discarded(store: BlobStore) -> None:
    async with store.receive() as incoming:
        await incoming.write(CONFIG_FILE, CONFIG)
        await incoming.write(WEIGHTS_FILE, WEIGHTS)
        await incoming.finish()
    assert committed(store) == []
    assert_consistent(store)


async def test_an_upload_that_fails_is_discarded(store: BlobStore) -> None:
    async def inspected_and_refused() -> None:
        async with store.receive() as incoming:
            await incoming.write(WEIGHTS_FILE, WEIGHTS)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await inspected_and_refused()
    assert committed(store) == []
    assert_consistent(store)


@pytest.mark.parametrize("digest", ["", "a" * 63, "A" * 64, "../" + "a" * 61, "a" * 64 + "\n", "g" * 64])
async def test_a_path_is_only_made_of_a_digest(digest: str, store: BlobStore) -> None:
    with pytest.raises(ValueError, match="not a digest"):
        store.path(digest)
    with pytest.raises(ValueError, match="not a digest"):
        await store.remove(digest)
    with pytest.raises(ValueError, match="not a digest"):
        store.path(digest)


# --- the same bytes twice -------------------------------------------------------------------------------


async def test_the_same_bytes_again_keep_the_first_folder(store: BlobStore) -> None:
    path = await upload(store)
    inode = path.stat().st_ino
    assert await upload(store) == path
    assert path.stat().st_ino == inode
    assert_consistent(store)


def flip(path: Path) -> None:
    file = path / WEIGHTS_FILE
    file.chmod(0o644)
    with file.open("r+b") as opened:
        opened.seek(1000)
        opened.write(b"\xff\xfe\xfd")


def lose(path: Path) -> None:
    path.chmod(0o755)
    (path / CONFIG_FILE).unlink()


def add(path: Path) -> None:
    path.chmod(0o755)
    (path / "more").write_text("more")


def become_a_file(path: Path) -> None:
    path.chmod(0o755)
    shutil.rmtree(path)
    path.write_text("no folder")


@pytest.mark.parametrize("damage", [flip, lose, add, become_a_file])
async def test_a_damaged_blob_is_replaced(damage: Callable[[Path], None], store: BlobStore) -> None:
    path = await upload(store)
    damage(path)
    assert await upload(store) == path
    assert_whole(path)
    assert_consistent(store)


@pytest.mark.parametrize("damaged", [False, True])
async def test_uploads_of_the_same_bytes_race_to_one_folder(damaged: bool, store: BlobStore) -> None:
    if damaged:
        flip(await upload(store))
    paths = await asyncio.gather(*(upload(store) for _ in range(8)))
    assert set(paths) == {store.path(digest_of())}
    assert_whole(paths[0])
    assert_consistent(store)


async def test_a_commit_is_never_seen_half_done(store: BlobStore) -> None:
    """A reader that looks all the time sees the whole folder or none."""
    path = store.path(digest_of())
    done = asyncio.Event()
    seen = 0

    async def watch() -> None:
        nonlocal seen
        while not done.is_set():
            if path.exists():
                assert sorted(os.listdir(path)) == [CONFIG_FILE, WEIGHTS_FILE]
                assert (path / WEIGHTS_FILE).stat().st_size == len(WEIGHTS)
                seen += 1
            await asyncio.sleep(0)

    watcher = asyncio.create_task(watch())
    await asyncio.gather(*(upload(store) for _ in range(4)))
    done.set()
    await watcher
    assert seen > 0


# --- removal --------------------------------------------------------------------------------------------


async def test_remove_takes_the_folder_away_and_may_be_repeated(store: BlobStore) -> None:
    await upload(store)
    await store.remove(digest_of())
    assert not store.path(digest_of()).exists()
    await store.remove(digest_of())
    assert_consistent(store)
    assert_whole(await upload(store))


async def test_uploads_and_removals_of_the_same_bytes_race_to_all_or_nothing(store: BlobStore) -> None:
    for _ in range(5):
        await asyncio.gather(*(work for _ in range(4) for work in (upload(store), store.remove(digest_of()))))
        assert_consistent(store)


async def test_one_digest_is_removed_once_at_a_time(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await upload(store)
    both_inside = threading.Barrier(2)
    remove = store._remove

    def meet(path: Path) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            both_inside.wait(timeout=0.3)
        remove(path)

    monkeypatch.setattr(store, "_remove", meet)
    await asyncio.gather(store.remove(digest_of()), store.remove(digest_of()))
    assert both_inside.broken
    assert committed(store) == []


async def test_a_removal_cut_short_leaves_no_half_blob(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = await upload(store)

    def crash(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, "gone")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", crash)
        await store.remove(digest_of())
    assert not path.exists()
    assert len(quarantined(store)) == 1
    assert await store.sweep([], older_than=0) == []
    assert_consistent(store)


# --- start-up -------------------------------------------------------------------------------------------


async def test_a_sweep_goes_by_the_clock_of_the_folder(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine whose clock is days ahead must not take what another one has just written for old."""
    written = await upload(store)
    ahead = time.time() + 3 * 86400
    monkeypatch.setattr(time, "time", lambda: ahead)
    assert await store.sweep([], shared=True) == []
    assert_whole(written)


async def test_sweep_keeps_what_is_linked_and_tells_what_it_removed(store: BlobStore) -> None:
    kept = await upload(store)
    stale = await upload(store, b"{}", b"other")
    abandoned = store.receive()
    await abandoned.__aenter__()
    await abandoned.write(CONFIG_FILE, CONFIG)
    (store.quarantine / "stray").write_text("a file")
    (store.blobs / ".probe-0").mkdir()
    (store.blobs / "README").write_text("not ours")
    assert await store.sweep([kept.name], older_than=0) == [stale.name]
    assert quarantined(store) == []
    assert sorted(committed(store)) == sorted([kept.name, "README"])
    assert_whole(kept)
    assert await store.sweep([kept.name], older_than=0) == []
    await abandoned.__aexit__(None, None, None)
    assert open_files(store) == []


async def test_open_makes_the_folders_and_may_be_repeated(tmp_path: Path) -> None:
    for _ in range(2):
        store = BlobStore(tmp_path / "a" / "b", max_bytes=1)
        await store.open()
    assert sorted(os.listdir(store.root)) == ["blobs", "quarantine"]
    assert committed(store) == quarantined(store) == []


async def test_a_relative_root_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = BlobStore(Path("data"), max_bytes=MAX_BYTES)
    await store.open()
    assert (await upload(store)).is_absolute()


async def test_open_fails_where_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("no folder")
    with pytest.raises(OSError):
        await BlobStore(tmp_path, max_bytes=1).open()


@pytest.mark.parametrize("call", ["open", "check"])
async def test_two_filesystems_are_told_by_their_rename(
    call: str, store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def across(*args: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", across)
    with pytest.raises(OSError) as caught:
        await getattr(store, call)()
    assert caught.value.errno == errno.EXDEV
    assert caught.value.__notes__ == ["while checking that adapters can be stored"]
    assert_consistent(store)


async def test_check_leaves_nothing_behind(store: BlobStore) -> None:
    await store.check()
    assert committed(store) == quarantined(store) == []


async def test_check_fails_when_the_folder_is_gone(store: BlobStore) -> None:
    shutil.rmtree(store.quarantine)
    with pytest.raises(FileNotFoundError):
        await store.check()


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


@pytest.mark.parametrize("kind", ["link to nothing", "link to itself", "pipe for a file"])
async def test_what_is_no_folder_of_files_is_broken_and_gives_way(store: BlobStore, kind: str) -> None:
    path = await upload(store)
    path.chmod(0o755)
    for _ in range(2):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if kind == "pipe for a file":
            path.mkdir()
            os.mkfifo(path / WEIGHTS_FILE)
        else:
            path.symlink_to(path if kind == "link to itself" else path.with_name("nothing"))
        async with asyncio.timeout(60):
            assert await digest_slowly(path, 1e9) is None
            assert await store.set_aside(path.name) is not None
        assert not os.path.lexists(path)
    path.symlink_to(path)
    assert await upload(store) == path
    assert_whole(path)
