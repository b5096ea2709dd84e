"""Usage that waits for the database, in a file that outlives its process.

    <data_dir>/usage/<id>.jsonl     of one process, which locks it: lines of ``<turn> <record as JSON>``
    <data_dir>/usage/<id>.partial   the same while it is written anew
    <data_dir>/usage/<id>.damaged   left by a process that is gone: not every line could be read

Records are written to the database in turns. A row of ``meta`` has the last turn that is there, and is
changed in the transaction of its records: so whoever finds the file of a process that is gone knows which of
its lines the database lacks, and whoever got no answer to a commit finds out whether it was made.

The calls are synchronous and belong in a thread. No ``fsync`` of what is added: what a killed process wrote
is in the kernel, and what a machine without power loses are seconds of usage. But what takes an older file's
place, or makes its row of ``meta`` needless, is on disk before.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import TypeAdapter

from adapters.files import sync_path, write_all
from server.accounts.usage_records import Usage

logger = logging.getLogger(__name__)

FOLDER = "usage"  # of the data folder
ENDING = ".jsonl"
PARTIAL = ".partial"
DAMAGED = ".damaged"
# The lock of a file is its process's own: a second one within it would be granted.
_mine: set[Path] = set()

Line = tuple[int, Usage]  # a turn, and a record of it
_RECORD = TypeAdapter(Usage)
_BEGIN = re.compile(rb"[0-9]+ \{")
_BEGINNINGS = 8  # looked at in a damaged line, which may be as long as the file


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
        partial = self._path.with_suffix(PARTIAL)
        _mine.add(self._path)
        made = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(made, fcntl.LOCK_EX)
            size = _written(made, lines)
            os.fsync(made)
            partial.replace(self._path)
        except BaseException:
            os.close(made)
            partial.unlink(missing_ok=True)
            raise
        self._close()
        self._file, self.size = made, size

    def remove(self) -> None:
        """All of it is in the database. Raises OSError where the file may be found again."""
        if self._file is not None:
            _remove(self._path)
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
    """The file of a process that is gone, locked; ``id`` is its journal's, ``changed`` seconds since 1970."""

    def __init__(self, path: Path, file: int) -> None:
        self.id = path.stem
        self.changed = os.fstat(file).st_mtime
        self._path = path
        self._file = file
        self._damaged = 0

    def lines(self) -> list[Line]:
        """Those that can be read. The last one of a process that was killed as it wrote may not be whole."""
        found: list[Line] = []
        doubtful: list[tuple[int, Line]] = []  # behind damage, and how many of ``found`` are before it
        self._damaged = 0
        os.lseek(self._file, 0, os.SEEK_SET)
        # By this very descriptor: to close another one of the file would give up the lock.
        with os.fdopen(self._file, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                try:
                    found.append(_read(line))
                except ValueError as error:
                    logger.warning("line %d of %s is no record of usage: %s", number, self._path, error)
                    self._damaged += line.endswith(b"\n")
                    doubtful += [(len(found), one) for one in _behind(line)]
        for at, one in reversed(doubtful):
            if _fits(one[0], found, at):
                found.insert(at, one)
        return found

    def remove(self) -> None:
        """What ``lines`` found is in the database. A file with damaged lines stays, under another name.

        Raises OSError where the file may be found again.
        """
        if self._damaged:
            aside = self.set_aside()
            logger.error("%d lines are no records of usage; they are in %s", self._damaged, aside)
        else:
            _remove(self._path)

    def set_aside(self) -> Path:
        """Where it lies from now on, for the operator to look at: no process writes its lines any more."""
        aside = self._path.replace(self._path.with_suffix(DAMAGED))
        sync_path(aside.parent)
        return aside

    def close(self) -> None:
        os.close(self._file)


def set_aside(folder: Path) -> int:
    """How many files in ``folder`` wait for the operator to look at them; 0 where it cannot be read."""
    try:
        return sum(path.suffix == DAMAGED for path in folder.iterdir())
    except OSError:
        return 0


def left_behind(folder: Path) -> Iterator[Left]:
    """The files in ``folder`` that no process has; each is to be closed before the next one is asked for.

    Logs those that cannot be opened. Removes what a process was killed over as it wrote its file anew.
    """
    try:
        paths = sorted(folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        logger.error("usage that an earlier process left cannot be looked for: %s", error)
        return
    for path in paths:
        if path.suffix not in (ENDING, PARTIAL) or path.with_suffix(ENDING) in _mine:
            continue
        try:
            file = _locked(path)
            if file is not None and path.suffix == PARTIAL:
                try:
                    path.unlink(missing_ok=True)
                finally:
                    os.close(file)
                continue
        except OSError as error:
            logger.error("usage that an earlier process left in %s cannot be read: %s", path, error)
            continue
        if file is not None:
            yield Left(path, file)


def _read(line: bytes) -> Line:
    """ValueError for what is no record of usage."""
    turn, _, record = line.partition(b" ")
    return int(turn), _RECORD.validate_json(record)


def _behind(line: bytes) -> list[Line]:
    """The record at the end of a damaged line: damage may have taken the end of the line before."""
    for begin in reversed(deque(_BEGIN.finditer(line, 1), maxlen=_BEGINNINGS)):
        try:
            return [_read(line[begin.start() :])]
        except ValueError:
            continue
    return []


def _fits(turn: int, lines: Sequence[Line], at: int) -> bool:
    """Whether ``turn`` may stand before ``lines[at]``: turns only grow, by one each. Digits that damage left
    before it, or took from it, make another number, by which a record would be written twice, or never."""
    before = lines[at - 1][0] if at else 0
    after = lines[at][0] if at < len(lines) else before + 1
    return before <= turn <= after


def _locked(path: Path) -> int | None:
    """The file, open; None if it is gone, or another process's. Raises OSError where it cannot be opened."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Else another process had it in between, and has written what it holds.
        if os.fstat(file).st_nlink > 0:
            return file
    except (BlockingIOError, PermissionError) as error:
        logger.debug("%s is locked: %s", path, error)
    except OSError:
        os.close(file)
        raise
    os.close(file)
    return None


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    sync_path(path.parent)


def _written(file: int, lines: Sequence[Line]) -> int:
    """How many bytes ``lines`` are, once they are in ``file``."""
    text = b"".join(b"%d %b\n" % (turn, _RECORD.dump_json(record)) for turn, record in lines)
    write_all(file, text)  # a disk that fills up takes a part, and raises at the next
    return len(text)
