"""A consistent copy of a data folder, while its server runs or not, and the way back.

<folder>/loraplex.db         SQLite as of one moment; replaced last, so that the one before stays whole
<folder>/blobs/<digest>/     every adapter that a row of it names; those that are there already are kept
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters.files import sync_path
from adapters.store.blobs import digest_of

DATABASE_FILE = "loraplex.db"
# A version may be deleted between the copies of its row and of its files; then the rows are read again.
_TRIES = 5


class BackupFailed(OSError):
    """The message says why; a backup that was there before is as it was."""


@dataclass(frozen=True, slots=True)
class Backup:
    """``copied`` and ``present`` count adapters' files; ``broken`` are digests whose bytes are other ones."""

    copied: int
    present: int
    broken: tuple[str, ...] = ()


def back_up(database: Path, blobs: Path, folder: Path) -> Backup:
    """Copies the SQLite file ``database`` and the blobs that its rows name to ``folder``.

    Synchronous; a server may be writing to both meanwhile. Files whose bytes are not those of their name are
    left out, and named in the result. Raises BackupFailed, OSError or sqlite3.Error.
    """
    if not database.is_file():
        raise BackupFailed(f"there is no database {database}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    copied: set[str] = set()
    for _ in range(_TRIES):
        with _partial(folder / DATABASE_FILE) as snapshot:
            _copy_database(database, snapshot)
            wanted = _linked(snapshot)
            done, missing, broken = _copy_blobs(wanted, blobs, folder / "blobs")
            copied |= done
            if not missing:
                os.replace(snapshot, folder / DATABASE_FILE)
                sync_path(folder)
                return Backup(len(copied), len(wanted - copied - broken), tuple(sorted(broken)))
    raise BackupFailed(
        f"files of {len(missing)} adapters are on record and not there, {min(missing)} for one"
    )


def restore(folder: Path, database: Path, blobs: Path) -> Backup:
    """Copies a backup to where a server looks for it. Raises BackupFailed where a database is there already.

    Bytes are held against their digests; those that differ are left out, and named in the result.
    """
    source = folder / DATABASE_FILE
    if not source.is_file():
        raise BackupFailed(f"{folder} holds no backup: there is no {source}")
    if database.exists():
        raise BackupFailed(f"{database} is there already; move it away, or set another LORAPLEX_DATA_DIR")
    database.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    wanted = _linked(source)
    copied, missing, broken = _copy_blobs(wanted, folder / "blobs", blobs)
    if missing:
        raise BackupFailed(f"the backup lacks files of {len(missing)} adapters, {min(missing)} for one")
    with _partial(database) as partial:
        _copy_database(source, partial)
        os.replace(partial, database)
        sync_path(database.parent)
    return Backup(len(copied), len(wanted - copied - broken), tuple(sorted(broken)))


def _copy_database(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        target.chmod(0o600)
        old.backup(new)
        # One file: a copy of it alone is whole.
        new.execute("PRAGMA journal_mode = DELETE")
    sync_path(target)


def _linked(database: Path) -> set[str]:
    with closing(sqlite3.connect(database)) as connection:
        return {row[0] for row in connection.execute("SELECT DISTINCT digest FROM versions")}


def _copy_blobs(wanted: set[str], source: Path, target: Path) -> tuple[set[str], set[str], set[str]]:
    """Which were copied, which are not in ``source``, and whose bytes there are other ones."""
    target.mkdir(parents=True, exist_ok=True)
    copied: set[str] = set()
    missing: set[str] = set()
    broken: set[str] = set()
    for digest in sorted(wanted):
        if (target / digest).is_dir():
            continue
        with _partial(target / digest) as partial:
            try:
                shutil.copytree(source / digest, partial)
            except (FileNotFoundError, shutil.Error):
                missing.add(digest)
                continue
            if digest_of(partial) != digest:
                broken.add(digest)
                continue
            partial.chmod(0o700)
            for path in (*partial.iterdir(), partial):
                sync_path(path)
            partial.rename(target / digest)
            (target / digest).chmod(0o555)
            copied.add(digest)
    sync_path(target)
    return copied, missing, broken


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
