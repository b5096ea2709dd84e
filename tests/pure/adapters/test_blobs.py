"""The blob store: what it keeps, what it refuses, races for the same bytes, removal and sweeps."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import AdapterRejected, UploadIncomplete, UploadTooLarge
from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from adapters.store.blobs import BlobStore
from adapters.store.digests import digest_slowly
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
