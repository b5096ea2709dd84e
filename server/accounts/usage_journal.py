"""Usage that waits for the database, in a file that outlives its process.

    <data_dir>/usage/<id>.jsonl     of one process, which locks it: lines of ``<turn> <record as JSON>``

Records are written to the database in turns. A row of ``meta`` has the last turn that is there, and is
changed in the transaction of its records: so whoever finds the file of a process that is gone knows which of
its lines the database lacks, and whoever got no answer to a commit finds out whether it was made.

The calls are synchronous and belong in a thread. No ``fsync``: what a killed process wrote is in the kernel,
and what a machine without power loses are seconds of usage.
"""

from __future__ import annotations

import fcntl
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from server.accounts.usage_records import Usage

logger = logging.getLogger(__name__)

FOLDER = "usage"  # of the data folder
ENDING = ".jsonl"
# The lock of a file is its process's own: a second one within it would be granted.
_mine: set[Path] = set()

Line = tuple[int, Usage]  # a turn, and a record of it
_RECORD = TypeAdapter(Usage)


class Journal:
    """``size`` is in bytes. ``append`` and ``rewrite`` raise OSError where the disk fails; then ``rewrite``
    is due, since the end of the file is not known."""

    def __init__(self, folder: Path) -> None:
        self.id = uuid.uuid4().hex
        self.size = 0
        self._path = folder / f"{self.id}{ENDING}"
        self._file: int | None = None

    def append(self, lines: Sequence[Line]) -> None:
        """Adds ``lines``; the first call makes the file."""
        if self._file is None:
            self.rewrite(lines)
        elif lines:
            self.size += _written(self._file, lines)

    def rewrite(self, lines: Sequence[Line]) -> None:
        """Leaves only ``lines``, in one step."""
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        made = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(made, fcntl.LOCK_EX)
            size = _written(made, lines)
            _mine.add(self._path)
            partial.replace(self._path)
        except BaseException:
            os.close(made)
            partial.unlink(missing_ok=True)
            raise
        self._close()
        self._file, self.size = made, size

    def remove(self) -> None:
        """All of it is in the database."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Lets it be found by the next process."""
        self._close()
        _mine.discard(self._path)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Left:
    """The file of a process that is gone, locked; ``id`` is its journal's."""

    def __init__(self, path: Path, file: int) -> None:
        self.id = path.stem
        self._path = path
        self._file = file

    def lines(self) -> list[Line]:
        """Without those that are not whole: the last one of a process that was killed as it wrote."""
        found = []
        with os.fdopen(os.dup(self._file), "rb") as file:
            for number, line in enumerate(file, 1):
                turn, _, record = line.partition(b" ")
                try:
                    found.append((int(turn), _RECORD.validate_json(record)))
                except (ValidationError, ValueError) as error:
                    logger.warning("line %d of %s is no record of usage: %s", number, self._path, error)
        return found

    def remove(self) -> None:
        """All of it is in the database."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._file)


def left_behind(folder: Path) -> Iterator[Left]:
    """The files in ``folder`` that no process has; each is to be closed before the next one is asked for."""
    for path in sorted(folder.glob(f"*{ENDING}")) if folder.is_dir() else ():
        if path in _mine:
            continue
        with suppress(FileNotFoundError):
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Else another process had it in between, and has written what it holds.
                is_there = os.fstat(file).st_nlink > 0
            except OSError as error:
                logger.debug("%s is locked: %s", path, error)
                is_there = False
            if is_there:
                yield Left(path, file)
            else:
                os.close(file)


def _written(file: int, lines: Sequence[Line]) -> int:
    """How many bytes ``lines`` are, once they are in ``file``."""
    text = b"".join(b"%d %b\n" % (turn, _RECORD.dump_json(record)) for turn, record in lines)
    done = 0
    while done < len(text):  # a disk that fills up takes a part, and raises at the next
        done += os.write(file, text[done:])
    return done
