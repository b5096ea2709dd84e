"""What it takes for bytes to be on disk."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any


def sync_path(path: Path) -> None:
    """Waits until the disk has the contents of a file, or a folder's list of names. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def time_in(folder: Path) -> float:
    """Seconds since 1970 by the clock that the times of files in ``folder`` are of.

    A shared folder may be another machine's. This machine's clock where nothing can be written there.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def write_all(descriptor: int, data: Any, offset: int | None = None) -> None:
    """Writes all of ``data``, any buffer of bytes: a single write may end early. Raises OSError.

    ``offset`` is the byte of the file to begin at; None writes on from the descriptor's own place.
    """
    rest = memoryview(data)
    while rest:
        if offset is None:
            written = os.write(descriptor, rest)
        else:
            written = os.pwrite(descriptor, rest, offset)
            offset += written
        rest = rest[written:]
