"""Whether a backup can be restored as a whole: its rows, and every byte of the adapters that they name."""

from __future__ import annotations

import re
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from adapters.store.backup import DATABASE_FILE, PARTIAL
from adapters.store.check import Damaged, Found, Unlinked
from adapters.store.digests import digest_of

_DIGEST = re.compile("[0-9a-f]{64}")


class NoBackup(ValueError):
    """The folder holds none, or one whose rows cannot be read; the message says which."""


def check_backup(folder: Path) -> Found:
    """Reads all that is in ``folder``, of a backup by an earlier release too, and changes nothing.

    ``damaged`` are files that a row names, ``unlinked`` those of adapters that have been deleted since. Takes
    as long as reading does: call it in a thread. Raises NoBackup, and OSError where a disk fails.
    """
    began, blobs = time.monotonic(), folder / "blobs"
    linked = _versions(folder / DATABASE_FILE)
    names = {path.name for path in blobs.iterdir()} if blobs.is_dir() else set()
    present = {name for name in names if _DIGEST.fullmatch(name)}
    found = Found(sum(map(len, linked.values())), len(present))
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


def _versions(database: Path) -> dict[str, list[str]]:
    """Which versions have the files of a digest; raises NoBackup where SQLite finds the file damaged."""
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
    except sqlite3.Error as error:
        raise NoBackup(f"{database} is damaged, and cannot be restored: {error}") from error
    return found
