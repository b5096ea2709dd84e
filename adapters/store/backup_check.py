"""Whether a backup can be restored as a whole: its rows, among them customers' files of ``/v1/files``, and
every byte of the adapters that they name.
"""

from __future__ import annotations

import re
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from sqlalchemy.dialects import sqlite

from adapters.database.rows import BatchResultRow, FilePieceRow, FileRow
from adapters.store.backup import DATABASE_FILE, PARTIAL
from adapters.store.check import Damaged, Found, Unlinked
from adapters.store.digests import digest_of
from adapters.store.files import IncompleteFile, incomplete

_FILES = {table.__tablename__ for table in (FileRow, FilePieceRow, BatchResultRow)}
_DIGEST = re.compile("[0-9a-f]{64}")


class NoBackup(ValueError):
    """The folder holds none, or one whose rows cannot be read; the message says which."""


def check_backup(folder: Path) -> Found:
    """Reads all that is in ``folder``, of a backup by an earlier release too, and changes nothing.

    ``damaged`` are files that a row names, ``unlinked`` those of adapters that have been deleted since,
    ``incomplete`` customers' files of ``/v1/files``. Takes as long as reading does: call it in a thread.
    Raises NoBackup, and OSError where a disk fails.
    """
    began, blobs = time.monotonic(), folder / "blobs"
    linked, cut = _rows(folder / DATABASE_FILE)
    names = {path.name for path in blobs.iterdir()} if blobs.is_dir() else set()
    present = {name for name in names if _DIGEST.fullmatch(name)}
    found = Found(sum(map(len, linked.values())), len(present), incomplete=cut)
    found.strays = sorted(name for name in names - present if not PARTIAL.fullmatch(name))
    for digest in sorted(linked.keys() | present):
        whole = digest in present and digest_of(blobs / digest) == digest
        if digest in linked and not whole:
            there = digest in present
            versions = tuple(linked[digest])
            found.damaged.append(Damaged(digest, "changed" if there else "missing", versions))
        elif digest not in linked:
            age = time.time() - (blobs / digest).stat().st_mtime
            found.unlinked.append(Unlinked(digest, whole, int(age)))
    found.seconds = round(time.monotonic() - began, 3)
    return found


def _rows(database: Path) -> tuple[dict[str, list[str]], list[IncompleteFile]]:
    """Which versions have the files of a digest, and customers' files that are not whole; raises NoBackup
    where SQLite finds the database damaged."""
    if not database.is_file():
        raise NoBackup(f"{database.parent} holds no backup: there is no {database}")
    found: dict[str, list[str]] = {}
    try:
        # As a file that nobody changes: a backup may lie on a disk that cannot be written.
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?immutable=1", uri=True)) as rows:
            ((said, *_), *_) = rows.execute("PRAGMA integrity_check(1)")
            if said != "ok":
                raise NoBackup(f"{database} is damaged, and cannot be restored: {said}")
            query = "SELECT tenant, adapter, number, digest FROM versions ORDER BY tenant, adapter, number"
            for tenant, adapter, number, digest in rows.execute(query):
                found.setdefault(digest, []).append(f"{tenant}/{adapter}@{number}")
            tables = {name for (name,) in rows.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            files: list[IncompleteFile] = []
            if tables >= _FILES:  # an earlier release has none
                asked = incomplete().compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True})
                files = [IncompleteFile(*row) for row in rows.execute(str(asked))]
    except sqlite3.Error as error:
        raise NoBackup(f"{database} is damaged, and cannot be restored: {error}") from error
    return found, files
