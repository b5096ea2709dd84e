"""Bytes on disk.

    <root>/quarantine/<uuid>/<file>      being received, or on its way out
    <root>/blobs/<digest>/<file>         committed: written once, read-only, named by its contents
    <root>/aside/<name>-<time>/          broken, and moved there by a repair

``digest`` is the SHA-256 over the lines ``name size sha256`` of the files, in the order of their
names. A folder enters ``blobs`` and leaves it by one rename, so it is whole or not there. Whatever a
crash leaves behind is in quarantine, or linked by no row of the catalog: ``sweep`` removes the former, and
the latter once it is a day old.

With an object store (``objects``), this is a copy of a part of it: a commit has put the blob there too, and
what is not here can be fetched (``cache``).

All I/O runs in worker threads. A cancelled call waits for its thread before it raises, so nothing is
written after the folder is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from weakref import WeakValueDictionary

from adapters.errors import (
    StorageFailed,
    StorageFull,
    StoreUnavailable,
    UploadIncomplete,
    UploadTooLarge,
    fault,
)
from adapters.files import sync_path, time_in, write_all
from adapters.inspection.layouts import refuse_foreign
from adapters.model import CHAT_FILES, CONFIG_FILE, INITIAL_FILE, PROBES_FILE, WEIGHTS_FILE
from adapters.store.digests import digest_from, digest_of
from adapters.store.objects import ObjectStore
from adapters.tasks import run_in_thread

logger = logging.getLogger(__name__)

# Where a repair puts what is broken; nothing looks for anything there.
ASIDE = "aside"
FILES = (CONFIG_FILE, WEIGHTS_FILE)
# May be uploaded, but are used up by the conversion, the probe and what is kept of a tokenizer.
_PASSING_FILES = (INITIAL_FILE, PROBES_FILE, *CHAT_FILES)
# A blob without a row stays for so long, in seconds: the row may only be missing because of a mistake.
SWEEP_AGE_S = 86_400.0
_BLOCK = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
_PROBE = ".probe-"
_FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


class BlobStore:
    """The folders under ``root``; ``max_bytes`` bounds one upload, both files together.

    One process owns a root (``ownership``): ``sweep`` takes everything in quarantine for abandoned.
    ``objects`` holds all blobs, if there is one. Without it nothing raises StoreUnavailable.
    """

    def __init__(self, root: Path, *, max_bytes: int, objects: ObjectStore | None = None) -> None:
        self.root = root.absolute()
        self.max_bytes = max_bytes
        self.objects = objects
        self.blobs = self.root / "blobs"
        self.quarantine = self.root / "quarantine"
        # One commit or removal of a digest at a time; other digests do not wait for it.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def __repr__(self) -> str:
        return f"BlobStore({str(self.root)!r}, max_bytes={self.max_bytes})"

    async def open(self) -> None:
        """Makes the folders; raises OSError where they cannot be written or a rename between them fails."""
        await run_in_thread(self._open)

    def receive(self) -> Incoming:
        """An upload, to be entered with ``async with``: what is not committed at the end is discarded."""
        return Incoming(self)

    def path(self, digest: str) -> Path:
        """The absolute folder of ``digest``, there or not; ValueError for anything but a SHA-256."""
        if _DIGEST.fullmatch(digest) is None:
            raise ValueError(f"not a digest: {digest!r}")
        return self.blobs / digest

    async def remove(self, digest: str) -> None:
        """Removes the blob, if it is there. The caller knows that nobody links it or is about to.

        What an object store that does not answer keeps goes with a later sweep.
        """
        path = self.path(digest)
        async with self.lock(digest):
            if self.objects is not None:
                with contextlib.suppress(StoreUnavailable):
                    await self.objects.remove(digest)
            await run_in_thread(self._remove, path)

    async def drop(self, digest: str) -> None:
        """Removes what can be fetched again."""
        assert self.objects is not None, "the only copy"
        async with self.lock(digest):
            await run_in_thread(self._remove, self.path(digest))

    async def digests(self) -> set[str]:
        """The names of all blobs, whole or not."""
        if self.objects is not None:
            return {name for name in await self.objects.ages() if _DIGEST.fullmatch(name)}
        return await run_in_thread(self._digests)

    async def local(self) -> set[str]:
        """The names of the blobs in this folder."""
        return await run_in_thread(self._digests)

    async def strays(self) -> list[str]:
        """Names in the folder of blobs that are no digests."""
        return await run_in_thread(self._strays)

    async def age(self, digest: str) -> int:
        """Seconds since the blob was written; 0 where it is not there."""
        return await run_in_thread(_age, self.path(digest))

    async def set_aside(self, name: str) -> str | None:
        """Moves what has this name in the folder of blobs to ``aside``, and returns its name there.

        None where it is not there, or a whole blob by now.
        """
        async with self.lock(name):
            return await run_in_thread(self._set_aside, name)

    async def sweep(
        self, linked: Collection[str], *, older_than: float = SWEEP_AGE_S, shared: bool = False
    ) -> list[str]:
        """At start-up: empties quarantine, and removes blobs that are not ``linked``. Returns their names.

        Only blobs whose files were written more than ``older_than`` seconds ago. Where the folder is
        ``shared`` by running processes, quarantine too is left to them for so long.
        """
        removed = await run_in_thread(self._sweep, frozenset(linked), older_than, shared)
        if self.objects is not None:
            try:
                removed += await self.objects.sweep(linked, older_than, lambda n: bool(_DIGEST.fullmatch(n)))
            except StoreUnavailable:
                logger.warning("the object store is not swept: it does not answer")
        return sorted(set(removed))

    async def check(self) -> None:
        """Whether an upload could be written now.

        Raises StorageFull, StoreUnavailable, or the OSError that says why not.
        """
        await run_in_thread(self._probe)
        if self.objects is not None:
            await self.objects.check()

    async def take_in(self, folder: Path, digest: str) -> Path:
        """Moves ``folder``, whose files are those of ``digest``, to its place; the caller holds its lock."""
        return await run_in_thread(self._commit, folder, digest)

    def lock(self, digest: str) -> asyncio.Lock:
        return self._locks.setdefault(digest, asyncio.Lock())

    def _open(self) -> None:
        for folder in (self.root, self.quarantine, self.blobs):
            folder.mkdir(parents=True, exist_ok=True)
        sync_path(self.root)
        self._probe()

    def _probe(self) -> None:
        """Does what an upload does. Only a rename tells whether two folders are on one mount."""
        with _full_disk("checking that adapters can be stored"):
            folder = self.quarantine / uuid.uuid4().hex
            folder.mkdir()
            moved = self.blobs / f"{_PROBE}{folder.name}"
            try:
                with (folder / CONFIG_FILE).open("wb") as file:
                    file.write(b"\0")
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(folder, moved)
            finally:
                shutil.rmtree(moved, ignore_errors=True)
                shutil.rmtree(folder, ignore_errors=True)

    def _digests(self) -> set[str]:
        with disk_errors("listing the adapter store"):
            if not self.blobs.exists():
                return set()
            return {path.name for path in self.blobs.iterdir() if _DIGEST.fullmatch(path.name)}

    def _strays(self) -> list[str]:
        with disk_errors("listing the adapter store"):
            names = [path.name for path in self.blobs.iterdir()] if self.blobs.exists() else []
            return sorted(n for n in names if not _DIGEST.fullmatch(n) and not n.startswith(_PROBE))

    def _set_aside(self, name: str) -> str | None:
        path, moved = self.blobs / name, f"{name}-{time.time_ns()}"
        with disk_errors(f"moving {name} aside"):
            if not os.path.lexists(path) or (_DIGEST.fullmatch(name) and digest_of(path) == name):
                return None
            (self.root / ASIDE).mkdir(exist_ok=True)
            _unseal(path)
            os.rename(path, self.root / ASIDE / moved)
            sync_path(self.blobs)
        return f"{ASIDE}/{moved}"

    def _sweep(self, linked: frozenset[str], older_than: float, shared: bool) -> list[str]:
        written_before = time_in(self.quarantine) - older_than
        with disk_errors("sweeping the adapter store"):
            for folder in self.quarantine.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if not shared or folder.stat().st_mtime <= written_before:
                        discard(folder)
            removed = []
            for path in sorted(self.blobs.iterdir()):
                if path.name.startswith(_PROBE):
                    if not shared:
                        discard(path)
                elif (
                    _DIGEST.fullmatch(path.name)
                    and path.name not in linked
                    and path.lstat().st_mtime <= written_before
                ):
                    self._remove(path)
                    removed.append(path.name)
            return removed

    def _remove(self, path: Path) -> None:
        """Out of ``blobs`` by a rename, so that a crash half-way leaves no half blob under its name."""
        with disk_errors(f"removing {path.name}"):
            if not os.path.lexists(path):
                return
            trash = self.quarantine / uuid.uuid4().hex
            _unseal(path)
            os.rename(path, trash)
            sync_path(self.blobs)
            discard(trash)

    def _commit(self, folder: Path, digest: str) -> Path:
        """Moves ``folder`` to its place; where a whole blob is there already, that one is kept."""
        path = self.path(digest)
        with disk_errors(f"committing {digest}"):
            if os.path.lexists(path):
                if digest_of(path) == digest:
                    _seal(path)
                    os.utime(path)  # a sweep that goes by age must not take it before it is linked
                    sync_path(self.blobs)
                    return path
                logger.warning("blob %s is damaged and replaced by a new upload of the same files", digest)
                self._remove(path)
            sync_path(folder)
            os.rename(folder, path)
            _seal(path)
            sync_path(self.blobs)
            return path


@dataclass(slots=True)
class _File:
    """An open file and what went into it. ``waiting`` is not written yet."""

    descriptor: int
    waiting: bytearray = field(default_factory=bytearray)
    size: int = 0
    sha256: Any = field(default_factory=hashlib.sha256)

    def flush(self) -> None:
        if self.waiting:
            write_all(self.descriptor, self.waiting)
            self.sha256.update(self.waiting)
            self.waiting = bytearray()

    def close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class Incoming:
    """An upload in quarantine: ``write`` … ``finish``, then, if it is to stay, ``commit``.

    ``path`` is its folder, first in quarantine, after ``commit`` in ``blobs``. ``digest`` is None until
    ``finish``. One task uses it; the calls do not overlap.
    """

    def __init__(self, store: BlobStore) -> None:
        self.path = store.quarantine / uuid.uuid4().hex
        self.digest: str | None = None
        self.size_bytes = 0
        self._store = store
        self._quarantine = self.path
        self._files: dict[str, _File] = {}

    def __repr__(self) -> str:
        state = "committed" if self.path != self._quarantine else "finished" if self.digest else "receiving"
        return f"Incoming({self.path.name}, {state}, {self.size_bytes} bytes in {sorted(self._files)})"

    async def __aenter__(self) -> Self:
        try:
            await run_in_thread(self._make)
        except BaseException:
            await run_in_thread(self._discard)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await run_in_thread(self._discard)

    async def write(self, filename: str, chunk: bytes) -> None:
        """Appends ``chunk`` to one of the two files; about a megabyte is collected before the disk is asked.

        Raises UploadTooLarge, StorageFull, StorageFailed, AdapterRejected for a file of another name.
        """
        assert self.digest is None, "finished"
        _check_name(filename)
        self.size_bytes += len(chunk)
        if self.size_bytes > self._store.max_bytes:
            raise UploadTooLarge(
                f"The upload is larger than {self._store.max_bytes} bytes. Retrain with a smaller r, or ask"
                " the operator to raise LORAPLEX_MAX_UPLOAD_BYTES."
            )
        if filename not in self._files:
            await run_in_thread(self._create, filename)
        file = self._files[filename]
        file.size += len(chunk)
        file.waiting += chunk
        if len(file.waiting) >= _BLOCK:
            await run_in_thread(self._flush, file)

    async def finish(self) -> str:
        """Writes out, syncs and closes both files; returns the digest.

        Raises UploadIncomplete, StorageFull, StorageFailed.
        """
        assert self.digest is None, "finished"
        missing = [name for name in FILES if name not in self._files]
        if missing:
            raise UploadIncomplete(
                f"The upload lacks {' and '.join(missing)}. Send both files in one request."
            )
        await run_in_thread(self._finish)
        self.digest = digest_from(
            {name: (file.size, file.sha256.hexdigest()) for name, file in self._files.items()}
        )
        return self.digest

    async def examine(self, look: Callable[[Path], T]) -> T:
        """What ``look`` says about the folder, in a worker thread; it may replace files by others.

        ``digest`` and ``size_bytes`` are of what lies there then. Raises StorageFull, StorageFailed, and what
        ``look`` does.
        """
        assert self.digest is not None, "finish comes first"
        return await run_in_thread(self._examine, look)

    async def commit(self) -> Path:
        """Moves the files to their place in ``blobs``, on disk when this returns, and returns the folder.

        So are they in the object store, if there is one. Where the same bytes are there already, those are
        kept. Raises StorageFull, StorageFailed, StoreUnavailable. May be repeated.
        """
        assert self.digest is not None, "finish comes first"
        async with self._store.lock(self.digest):
            self.path = await run_in_thread(self._store._commit, self._quarantine, self.digest)
            if self._store.objects is not None:
                await self._store.objects.put(self.digest, self.path)
        return self.path

    def _make(self) -> None:
        with disk_errors("starting an upload"):
            self._quarantine.mkdir()

    def _create(self, filename: str) -> None:
        with disk_errors(f"writing {filename}"):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._files[filename] = _File(os.open(self._quarantine / filename, flags, 0o600))

    def _flush(self, file: _File) -> None:
        with disk_errors("writing an upload"):
            file.flush()

    def _finish(self) -> None:
        with disk_errors("finishing an upload"):
            for file in self._files.values():
                file.flush()
                if os.fstat(file.descriptor).st_size != file.size:
                    raise OSError(errno.EIO, "a write before this failed half-way")
                os.fchmod(file.descriptor, 0o444)
                os.fsync(file.descriptor)
                file.close()

    def _examine(self, look: Callable[[Path], T]) -> T:
        with disk_errors("examining an upload"):
            before = _marks(self._quarantine)
            seen = look(self._quarantine)
            if _marks(self._quarantine) != before:
                self.digest = digest_of(self._quarantine)
                self.size_bytes = sum(path.stat().st_size for path in self._quarantine.iterdir())
                if self.digest is None:
                    raise OSError(errno.EIO, "what was just written cannot be read")
            return seen

    def _discard(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        discard(self._quarantine)


@contextlib.contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """A full disk or quota becomes StorageFull, any other OSError StorageFailed."""
    try:
        with _full_disk(doing):
            yield
    except OSError as error:
        raise StorageFailed(
            "The disk failed, and nothing was kept. Try again; the operator finds the reason in the log."
        ) from error


@contextlib.contextmanager
def _full_disk(doing: str) -> Iterator[None]:
    """A full disk or quota becomes StorageFull; any other OSError says what was being done."""
    try:
        yield
    except OSError as error:
        error.add_note(f"while {doing}")
        if error.errno not in _FULL:
            raise
        raise StorageFull(
            "There is no room to store adapters. Remove some, or ask the operator to free space in"
            " LORAPLEX_DATA_DIR."
        ) from error


def _check_name(filename: str) -> None:
    if filename in FILES or filename in _PASSING_FILES:
        return
    refuse_foreign([filename])
    if filename.endswith(_PICKLE_SUFFIXES):
        raise fault(
            "weights_not_safetensors", f"The upload holds {filename[:120]!r}, a pickle.", param=filename
        )
    raise fault("unexpected_file", f"The upload holds {filename[:120]!r}.")


def _seal(path: Path) -> None:
    path.chmod(0o555)
    sync_path(path)


def _unseal(path: Path) -> None:
    """Moving a folder rewrites its "..", for which it must be writable."""
    if path.is_dir() and not path.is_symlink():
        path.chmod(0o755)


def _age(path: Path) -> int:
    try:
        return max(0, int(time.time() - path.stat().st_mtime))
    except FileNotFoundError:
        return 0


def _marks(folder: Path) -> set[tuple[str, int]]:
    """Tells a folder's files from others of the same names."""
    return {(path.name, path.stat().st_ino) for path in folder.iterdir()}


def discard(folder: Path) -> None:
    """Best effort: what cannot be removed now is removed by the next sweep."""
    try:
        if folder.is_dir() and not folder.is_symlink():
            folder.chmod(0o700)
            shutil.rmtree(folder)
        else:
            folder.unlink(missing_ok=True)
    except OSError as exc:
        logger.warning("could not remove %s: %s", folder, exc)
