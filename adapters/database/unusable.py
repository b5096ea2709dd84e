"""A database that cannot be used at all: which one, and why, instead of the driver's error alone."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError

from adapters.errors import cause_of


class DatabaseUnusable(OSError):
    """It does not answer, refuses, or its file cannot be read or written; the message says which and why."""


@contextmanager
def usable(url: URL) -> Iterator[None]:
    """Raises DatabaseUnusable for what the driver and the system raise."""
    try:
        yield
    except (DBAPIError, OSError) as error:
        shown = url.render_as_string()  # without the password
        raise DatabaseUnusable(f"the database {shown} cannot be used: {cause_of(error)}") from error


def ordinary(path: Path) -> None:
    """OSError where SQLite's file is a folder or a device, which SQLite calls a disk error, or waits for."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "Not an ordinary file", str(path))
