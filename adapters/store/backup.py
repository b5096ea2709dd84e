"""A consistent copy of an installation, while its server runs or not, and the way back.

<folder>/loraplex.db         all rows as of one moment, as SQLite; replaced last: the one before stays whole
<folder>/blobs/<digest>/     every adapter that a row of it names; those that are there already are kept. The
                             time of the folder is when its bytes were last held against their digest

The database may be SQLite or PostgreSQL, and a backup of one may be restored into the other. All calls are
synchronous and take as long as copying does: call them in a thread, never on an event loop.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from adapters.database.database import Database, SchemaTooNew, checked_url
from adapters.database.rows import LeaseRow, ReplicaRow
from adapters.errors import BlobMissing, StoreUnavailable
from adapters.files import sync_path
from adapters.store.blobs import ASIDE, discard
from adapters.store.digests import digest_of
from adapters.store.objects import ObjectStore
from adapters.store.ownership import META_KEY
from adapters.store.transfer import NotEmpty, transfer

DATABASE_FILE = "loraplex.db"
# A version may be deleted between the copies of its row and of its files; then the rows are read again.
_TRIES = 5
# Of the adapters that are there already each backup reads this part, those first that were read longest ago.
_READ_AGAIN = 1 / 30
# Folders of the data folder that are the server's; "backups" is for what is made here.
_OWN = ("blobs", "quarantine", ASIDE, "fits", "usage")
# Rows of processes that belong to the original.
_OF_PROCESSES = {ReplicaRow.__tablename__, LeaseRow.__tablename__}
# What a copy that was killed has left; SQLite's own files beside it too.
PARTIAL = re.compile(rf"\.({re.escape(DATABASE_FILE)}|[0-9a-f]{{64}})-[0-9a-f]{{32}}(-journal|-wal|-shm)?")


class BackupFailed(OSError):
    """The message says why; a backup that was there before is as it was."""


class BackupRuns(BackupFailed):
    """Another one is being written to the same folder."""


class BackupFull(BackupFailed):
    """It would leave less free than is to stay so where it is written."""


@dataclass(frozen=True, slots=True)
class Backup:
    """``copied`` and ``present`` count adapters' files. Not whole in the copy are ``broken``, digests whose
    bytes are other ones, and ``missing``, those that rows name and nothing holds. ``verified`` counts those
    of ``present`` that were read again, and ``repaired`` names those of ``copied`` that had rotted there."""

    copied: int
    present: int
    broken: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    verified: int = 0
    repaired: tuple[str, ...] = ()


def back_up(database_url: str, blobs: Path, folder: Path, *, blobs_url: str = "", reserve: int = 0) -> Backup:
    """Copies the database and the blobs that its rows name to ``folder``, from ``blobs_url`` if not here.

    A server may be writing to both meanwhile. Files whose bytes are not those of their name are left out, and
    so are files that are not there; both are named in the result. A part of what is there already is read
    again, and copied anew where it has rotted. Raises BackupFailed, BackupFull where less than ``reserve``
    bytes would be free where ``folder`` is, and OSError where a disk fails. How large a copy of a PostgreSQL
    database is shows as it is written: it ends there.
    """
    url = checked_url(database_url)
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).is_file():
        raise BackupFailed(f"there is no database {url.database}")
    _refuse_source(url, blobs, folder)

    def held(digest: str) -> bool:
        return bool(blobs_url) or (blobs / digest).exists()

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    copied: set[str] = set()
    missing: set[str] = set()
    read: _Read | None = None
    with _alone(folder), _database_errors():
        _sweep(folder, folder / "blobs")
        for _ in range(_TRIES):
            before = missing
            with _partial(folder / DATABASE_FILE) as snapshot:
                _refuse_full(folder, reserve, _database_bytes(url))
                _copy_out(url, snapshot, lambda: _refuse_full(folder, reserve))
                _refuse_full(folder, reserve)
                wanted = _linked(snapshot)
                copy = _within(reserve, _from(blobs, blobs_url), _sizes(snapshot), folder, held)
                if read is None:
                    read = _read_again(wanted, copy, folder / "blobs")
                done, missing, broken = _copy_blobs(wanted - read.rotten, copy, folder / "blobs")
                copied |= done
                # What this snapshot and the one before miss was not deleted between them: it is lost.
                if missing <= before:
                    os.replace(snapshot, folder / DATABASE_FILE)
                    sync_path(folder)
                    return _backup(wanted, copied, broken, missing, read)
    raise BackupFailed("versions are deleted faster than they can be copied; try again")


def restore(folder: Path, database_url: str, blobs: Path, *, blobs_url: str = "") -> Backup:
    """Copies a backup to where a server looks for it: a SQLite file that is not there, or an empty database.
    Blobs go to ``blobs_url`` too, if there is one.

    What is restored is an installation of its own, with an id of its own. Bytes are held against their
    digests; those that differ, and those that the backup lacks, are left out and named in the result: their
    versions are on record and cannot be served until somebody uploads the same files. What lies in ``blobs``
    already is kept if it is whole, and moved to ``aside`` in the data folder if not. Raises BackupFailed, and
    OSError where a disk fails.
    """
    source, url = folder / DATABASE_FILE, checked_url(database_url)
    if not source.is_file():
        raise BackupFailed(f"{folder} holds no backup: there is no {source}")
    if url.get_backend_name() == "sqlite" and Path(str(url.database)).exists():
        raise BackupFailed(f"{url.database} is there already; move it away, or set another LORAPLEX_DATA_DIR")
    blobs.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _database_errors():
        wanted = _linked(source)
        _sweep(blobs.parent, blobs)
        for digest in wanted:
            if (blobs / digest).is_dir() and digest_of(blobs / digest) != digest:
                _set_aside(blobs / digest, blobs.parent / ASIDE)
        copied, missing, broken = _copy_blobs(wanted, _from(folder / "blobs", ""), blobs)
        if blobs_url:
            asyncio.run(_put(ObjectStore(blobs_url), wanted - broken - missing, blobs))
        _copy_in(source, url, blobs.parent)
    return _backup(wanted, copied, broken, missing, _Read())


def _backup(wanted: set[str], copied: set[str], broken: set[str], missing: set[str], read: _Read) -> Backup:
    copied, broken = copied | read.repaired, broken | read.rotten & wanted
    return Backup(
        len(copied),
        len(wanted - copied - broken - missing),
        tuple(sorted(broken)),
        tuple(sorted(missing)),
        read.whole,
        tuple(sorted(read.repaired)),
    )


def _refuse_source(url: URL, blobs: Path, folder: Path) -> None:
    """Raises BackupFailed where a backup would lie on what it is to be a copy of."""
    target, source = folder.resolve(), blobs.resolve()
    if target == source.parent or any(target.is_relative_to(source.parent / name) for name in _OWN):
        raise BackupFailed(f"{folder} is the server's own; give a folder that the data does not lie in")
    if url.get_backend_name() == "sqlite":
        database = Path(str(url.database))
        if (folder / DATABASE_FILE).exists() and database.samefile(folder / DATABASE_FILE):
            raise BackupFailed(f"{database} is the database itself; give a folder that it does not lie in")


def _sweep(*folders: Path) -> None:
    """Removes what a backup or a restore left that was killed."""
    for folder in folders:
        for path in folder.iterdir() if folder.is_dir() else ():
            if PARTIAL.fullmatch(path.name):
                discard(path)


def _set_aside(path: Path, aside: Path) -> None:
    aside.mkdir(exist_ok=True)
    path.chmod(0o755)
    path.rename(aside / f"{path.name}-{uuid.uuid4().hex}")


def _copy_out(url: URL, target: Path, look: Callable[[], None]) -> None:
    if url.get_backend_name() == "sqlite":
        _copy_file(Path(str(url.database)), target)
        return
    asyncio.run(transfer(url, checked_url(f"sqlite:///{target}"), look))
    target.chmod(0o600)
    sync_path(target)


def _copy_in(source: Path, url: URL, beside: Path) -> None:
    """By way of a copy that may be changed: it loses its id, for PostgreSQL gets this program's schema."""
    into = Path(str(url.database)) if url.get_backend_name() == "sqlite" else beside / DATABASE_FILE
    into.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _partial(into) as partial:
        _copy_file(source, partial)
        with closing(sqlite3.connect(partial)) as copy, copy:
            copy.execute("DELETE FROM meta WHERE key = ?", (META_KEY,))
            there = {name for (name,) in copy.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            for table in _OF_PROCESSES & there:
                copy.execute(f"DELETE FROM {table}")  # noqa: S608  (our own names)
        if url.get_backend_name() == "sqlite":
            sync_path(partial)
            os.replace(partial, into)
            sync_path(into.parent)
        else:
            asyncio.run(_upgraded_and_transferred(partial, url))


async def _upgraded_and_transferred(source: Path, url: URL) -> None:
    database = Database(f"sqlite:///{source}")
    try:
        await database.open()
    finally:
        await database.close()
    await transfer(database.url, url)


def _copy_file(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        target.chmod(0o600)
        old.backup(new)
        # One file: a copy of it alone is whole.
        new.execute("PRAGMA journal_mode = DELETE")
    sync_path(target)


def _linked(database: Path) -> set[str]:
    with closing(sqlite3.connect(database)) as connection:
        return {row[0] for row in connection.execute("SELECT DISTINCT digest FROM versions")}


def _sizes(database: Path) -> dict[str, int]:
    """In bytes, of all files of a digest."""
    with closing(sqlite3.connect(database)) as connection:
        return dict(connection.execute("SELECT digest, max(size_bytes) FROM versions GROUP BY digest"))


async def _put(objects: ObjectStore, digests: Iterable[str], blobs: Path) -> None:
    for digest in digests:
        await objects.put(digest, blobs / digest)


# Copies the blob of a digest to a folder that is not there yet; False where there is none.
_Copy = Callable[[str, Path], bool]


def _from(blobs: Path, blobs_url: str) -> _Copy:
    """Out of the folder ``blobs``, or, what is not there, out of the object store."""

    def copy(digest: str, into: Path) -> bool:
        try:
            shutil.copytree(blobs / digest, into)
            return True
        except (FileNotFoundError, shutil.Error) as error:
            if (blobs / digest).exists():  # a full disk, or one that cannot be read
                raise BackupFailed(f"{digest} cannot be copied: {error}") from error
        if not blobs_url:
            return False
        into.mkdir(exist_ok=True)
        try:
            asyncio.run(ObjectStore(blobs_url).get(digest, into))
            return True
        except BlobMissing:
            return False
        except StoreUnavailable as error:
            raise BackupFailed(f"{digest} cannot be fetched: {error.message}") from error

    return copy


def _within(
    reserve: int, copy: _Copy, sizes: Mapping[str, int], folder: Path, held: Callable[[str], bool]
) -> _Copy:
    """``copy``, which raises BackupFull before less than ``reserve`` bytes are free in ``folder``.

    What is not ``held`` anywhere takes no room.
    """

    def within(digest: str, into: Path) -> bool:
        if held(digest):
            _refuse_full(folder, reserve, sizes[digest])
        done = copy(digest, into)
        _refuse_full(folder, reserve)
        return done

    return within


def _refuse_full(folder: Path, reserve: int, more: int = 0) -> None:
    """BackupFull if ``more`` bytes leave less than ``reserve`` where ``folder`` is."""
    if shutil.disk_usage(folder).free < reserve + more:
        raise BackupFull(
            f"{folder} has no room: DISK_RESERVE ({reserve} bytes) stays free there. Free some, or back up to"
            " another disk"
        )


def _database_bytes(url: URL) -> int:
    """How many bytes a copy of a SQLite database takes at most; 0 of PostgreSQL, which does not say."""
    if url.get_backend_name() != "sqlite":
        return 0
    database = Path(str(url.database))
    return _bytes_of(database, database.with_name(f"{database.name}-wal"))


def _bytes_of(*files: Path) -> int:
    """Of those that are there."""
    found = 0
    for file in files:
        with suppress(FileNotFoundError):
            found += file.stat().st_size
    return found


def _copy_blobs(wanted: set[str], copy: _Copy, target: Path) -> tuple[set[str], set[str], set[str]]:
    """Which were copied, which are not there to be copied, and whose bytes there are other ones."""
    target.mkdir(parents=True, exist_ok=True)
    copied: set[str] = set()
    missing: set[str] = set()
    broken: set[str] = set()
    for digest in sorted(wanted):
        if (target / digest).is_dir():
            continue
        with _partial(target / digest) as partial:
            if not copy(digest, partial):
                missing.add(digest)
                continue
            if digest_of(partial) != digest:
                broken.add(digest)
                continue
            _install(partial, target / digest)
            copied.add(digest)
    sync_path(target)
    return copied, missing, broken


@dataclass(slots=True)
class _Read:
    """What came of reading files of a backup again: how many were ``whole``, which had rotted and were copied
    anew (``repaired``), and which stay ``rotten``, since there are no whole ones to be copied."""

    whole: int = 0
    repaired: set[str] = field(default_factory=set)
    rotten: set[str] = field(default_factory=set)


def _read_again(wanted: set[str], copy: _Copy, target: Path) -> _Read:
    """Reads a part of those that are wanted and there, so that rot is found while there is a whole copy."""
    target.mkdir(parents=True, exist_ok=True)
    there = [path for digest in wanted if (path := target / digest).is_dir()]
    there.sort(key=lambda path: (path.stat().st_mtime, path.name))
    read = _Read()
    for path in there:  # those that stay rotten are named each time, and take nobody's turn
        if read.whole + len(read.repaired) >= len(there) * _READ_AGAIN:
            break
        if digest_of(path) == path.name:
            os.utime(path)
            read.whole += 1
            continue
        with _partial(path) as anew, _partial(path) as rotten:
            if copy(path.name, anew) and digest_of(anew) == path.name:
                path.chmod(0o755)
                path.rename(rotten)
                _install(anew, path)
                read.repaired.add(path.name)
            else:
                read.rotten.add(path.name)
    sync_path(target)
    return read


def _install(partial: Path, path: Path) -> None:
    """What was held against its digest just now gets its name; the caller syncs the folder around it."""
    partial.chmod(0o700)
    for file in (*partial.iterdir(), partial):
        sync_path(file)
    os.utime(partial)
    partial.rename(path)
    path.chmod(0o555)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else writes a backup to ``folder`` meanwhile; raises BackupRuns."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BackupRuns(f"another backup is being written to {folder}") from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, SchemaTooNew, NotEmpty, ValueError) as error:
        raise BackupFailed(f"the database: {error}") from error


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A name beside ``path`` for what is not whole yet; what is left there goes."""
    partial = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        yield partial
    finally:
        if partial.is_dir():
            partial.chmod(0o700)
            shutil.rmtree(partial, ignore_errors=True)
        for left in path.parent.glob(f"{partial.name}*"):
            if left.is_file():
                left.unlink(missing_ok=True)
