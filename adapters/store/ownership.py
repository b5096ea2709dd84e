"""One process owns a data folder, and the folder and its database know each other.

    <root>/.lock                locked by the process that owns the folder, whose id it holds
    <root>/installation.json    {"id", "audit", "kept"}

``id`` is also in the database's ``meta``. ``audit`` is the last entry of the audit that this folder has seen:
a database whose audit ends before it is an older one, restored. Either would have no rows for blobs that are
in use, and a start that took it for the right one would clear away everybody's adapters. ``kept`` are blobs
that had no row when the two were joined; no sweep removes them.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from adapters.database.database import Database
from adapters.database.glance import glance
from adapters.database.rows import AuditRow, MetaRow
from adapters.errors import StoreUnavailable, cause_of
from adapters.files import sync_path
from adapters.store.blobs import BlobStore
from adapters.store.versions import linked_digests
from adapters.tasks import run_in_thread

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
OPENING_FILE = ".opening"  # locked by the process of a fleet that opens folder and database
INSTALLATION_FILE = "installation.json"
META_KEY = "installation"
REMEMBER_INTERVAL_S = 5.0
_ADOPT = (
    "If that is meant, run `loraplex adopt` with the same settings; it joins the two and removes nothing."
)

# The lock of the file is the process's own: a second one on the same folder within it would be granted.
_locked: set[Path] = set()


class FolderInUse(OSError):
    """Another running server owns the data folder."""


class FolderUnusable(OSError):
    """The data folder cannot be made or written; the message says which and why."""


class WrongDatabase(ValueError):
    """The database is not the one that belongs to the data folder, or an older copy of it."""


class FolderLock:
    """``acquire`` before the folder is touched, ``release`` when nothing writes to it any more.

    With ``shared``, the processes of one fleet have the folder together, and no other one; ``alone`` is for
    what one of them does while the others wait.

    The end of the process releases it too. It is two locks. The one of ``.lock`` is POSIX's, which belongs
    to a process, whatever that forks. The one of the folder itself holds where somebody removes ``.lock``; a
    forked child shares it and lets it go at once, so that an engine that survives the server does not keep
    the next server out.
    """

    def __init__(self, root: Path, *, shared: bool = False) -> None:
        self.root = root.absolute()
        self._shared = shared
        self._descriptors: list[int] = []

    def acquire(self) -> Self:
        """Raises FolderInUse if a server runs on the folder, FolderUnusable if it cannot be written."""
        if self._descriptors or (self.root in _locked and not self._shared):
            raise self._in_use(str(os.getpid()))
        _held.add(self)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock_folder()
            self._lock_file()
        except BaseException as error:
            self._let_go()
            if isinstance(error, OSError) and not isinstance(error, FolderInUse):
                raise FolderUnusable(
                    f"the data folder {self.root} (LORAPLEX_DATA_DIR) cannot be used: {cause_of(error)}"
                ) from error
            raise
        _locked.add(self.root)
        return self

    def _lock_folder(self) -> None:
        """Nothing where the file system locks no folders, as some network's do."""
        descriptor = self._opened(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, self._how)
        except BlockingIOError as error:
            raise self._in_use(self._owner()) from error
        except OSError as error:
            logger.debug("the folder %s itself cannot be locked: %s", self.root, error)

    def _lock_file(self) -> None:
        path = self.root / LOCK_FILE
        while True:
            descriptor = self._opened(path, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.lockf(descriptor, self._how)
            except BlockingIOError as error:
                raise self._in_use(self._owner()) from error
            if _is_at(descriptor, path):  # else it was removed since it was opened, and locks nobody out
                break
        if not self._shared:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    @property
    def _how(self) -> int:
        return (fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX) | fcntl.LOCK_NB

    def _opened(self, path: Path, flags: int) -> int:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
        self._descriptors.append(descriptor)
        return descriptor

    def _owner(self) -> str:
        """The process that ``.lock`` names."""
        try:
            return (self.root / LOCK_FILE).read_text(errors="replace")[:20].strip() or "unknown"
        except OSError:
            return "unknown"

    def release(self) -> None:
        """May be repeated."""
        if self._descriptors:
            self._let_go()
            _locked.discard(self.root)

    def _let_go(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())
        _held.discard(self)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits for its turn among the processes of a fleet that start; there is nobody else without one."""
        descriptor = os.open(self.root / OPENING_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if self._shared:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _in_use(self, owner: str) -> FolderInUse:
        return FolderInUse(
            f"the data folder {self.root} belongs to a server that is running (process {owner}). Stop that"
            " one, or give this one a folder of its own with LORAPLEX_DATA_DIR."
        )


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that has the name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


# What this process has open. A child that is forked owns nothing; that it closes them releases nothing here.
_held: set[FolderLock] = set()


def _let_all_go() -> None:
    for lock in list(_held):
        lock._let_go()
    _locked.clear()


os.register_at_fork(after_in_child=_let_all_go)


@dataclass(frozen=True, slots=True)
class _Mark:
    """What ``installation.json`` holds."""

    id: str
    audit: int
    kept: tuple[str, ...] = ()


class Ownership:
    """The bond between the folder of ``blobs`` and ``database``; made while the folder is locked.

    ``alone``: one folder, one database. Else the processes of a fleet may have folders of their own.
    """

    def __init__(self, blobs: BlobStore, database: Database, *, alone: bool = True) -> None:
        self._alone = alone
        self._blobs = blobs
        self._database = database
        self._path = blobs.root / INSTALLATION_FILE
        self._mark = _Mark("", 0)
        self._named = uuid.uuid4().hex  # the id of a database that has none
        self._found: str | None = None  # the database's id, before it was opened
        self._generation = -1

    @property
    def kept(self) -> frozenset[str]:
        """Digests of blobs that no sweep may remove."""
        return frozenset(self._mark.kept)

    async def verify(self) -> None:
        """Before either is opened: raises WrongDatabase unless folder and database belong together.

        Nothing is touched: no table is made or upgraded, no folder made. Raises SchemaTooNew too.
        """
        seen = await glance(self._database.url, META_KEY)
        self._found = seen.installation
        mark = await run_in_thread(self._read)
        if mark is None:
            await self._check_contents(seen.linked)
            if self._alone and seen.installation and seen.audit and not await self._blobs.digests():
                raise WrongDatabase(
                    f"the database belongs to another data folder than {self._blobs.root}, which is new."
                    f" Nothing was touched. Set LORAPLEX_DATA_DIR to the right one. {_ADOPT}"
                )
            return
        if mark.id != (known := seen.installation):
            raise WrongDatabase(
                f"the database is not the one that the data folder {self._blobs.root} was used with: "
                + ("it is a new one" if known is None else f"its id is {known}, the folder's is {mark.id}")
                + f". No adapter was touched. Set LORAPLEX_DATABASE_URL to the right one. {_ADOPT}"
            )
        if (last := seen.audit) < mark.audit:
            raise WrongDatabase(
                f"the database is older than the data folder {self._blobs.root}: its audit ends with entry"
                f" {last}, and the folder has seen entry {mark.audit}. No adapter was touched. {_ADOPT}"
            )
        self._mark = mark

    async def join(self) -> None:
        """After ``verify``, when both are open: gives an id to what has none yet, as after an upgrade.

        WrongDatabase where another server did so at the same moment: each would take the database for its
        own. The processes of a fleet take what the first of them gave.
        """
        if self._mark.id:
            return
        known = await self._known()
        if known is None:
            try:
                known = await self._name()
            except IntegrityError:
                known = await self._known()
        if self._alone and self._found is None and known != self._named:
            raise WrongDatabase(
                "another server was started on the database at the same moment, with another data folder."
                " Nothing was touched. Give this one a database of its own with LORAPLEX_DATABASE_URL;"
                " several servers on one database are a fleet, see LORAPLEX_ROLE."
            )
        await self._join(known)

    async def claim(self) -> None:
        """After ``join``: the object store, if there is one, becomes this installation's, or is it already.

        Raises WrongStore where it is another's. One that does not answer is neither swept nor refused: what
        was fetched before is served meanwhile.
        """
        objects = self._blobs.objects
        if objects is not None:
            try:
                await objects.claim(self._mark.id)
            except StoreUnavailable:
                logger.warning(
                    "the object store %s does not answer; nothing is fetched until then", objects.url
                )

    async def adopt(self) -> int:
        """Joins folder and database whatever they hold; returns how many blobs without a row are kept."""
        await self._join(await self._known())
        if self._blobs.objects is not None:
            await self._blobs.objects.adopt(self._mark.id)
        return len(self._mark.kept)

    async def remember(self) -> None:
        """Notes the audit's last entry in the folder, if anything was written since the last call."""
        generation = self._database.generation
        if generation != self._generation:
            last = await self._last_audit()
            if last > self._mark.audit:
                await self._keep(_Mark(self._mark.id, last, self._mark.kept))
            self._generation = generation

    async def remember_forever(self) -> None:
        """``try_to_remember`` every ``REMEMBER_INTERVAL_S`` seconds, until it is cancelled."""
        while True:
            await asyncio.sleep(REMEMBER_INTERVAL_S)
            await self.try_to_remember()

    async def try_to_remember(self) -> None:
        """As ``remember``; what fails is logged, since a database or a disk shows where it is needed."""
        try:
            await self.remember()
        except Exception as exc:
            logger.warning("the data folder cannot note what the database has seen: %s", exc)

    async def _check_contents(self, linked: frozenset[str]) -> None:
        present = await self._blobs.digests()
        objects = self._blobs.objects
        place = (
            f"the data folder {self._blobs.root}" if objects is None else f"the object store {objects.url}"
        )
        if linked and not linked & present:
            raise WrongDatabase(
                f"the database has {len(linked)} adapters' files on record, and none of them is in {place}."
                f" No adapter was touched. Set LORAPLEX_DATA_DIR and LORAPLEX_BLOBS_URL to what holds them."
                f" {_ADOPT}"
            )
        if present and not linked:
            raise WrongDatabase(
                f"{place} holds {len(present)} adapters' files, and the database has none on record."
                " No adapter was touched. Set LORAPLEX_DATABASE_URL to the right one."
                f" {_ADOPT}"
            )

    async def _name(self) -> str:
        """Gives the database an id; IntegrityError if it has one."""
        async with self._database.append() as session:
            session.add(MetaRow(key=META_KEY, value=self._named))
        return self._named

    async def _join(self, known: str | None) -> None:
        """The database first: a folder that names a database without an id would be refused."""
        known = known or await self._name()
        kept = await self._blobs.digests() - await linked_digests(self._database)
        await self._keep(_Mark(known, await self._last_audit(), tuple(sorted(kept))))

    async def _keep(self, mark: _Mark) -> None:
        await run_in_thread(self._write, mark)
        self._mark = mark

    async def _known(self) -> str | None:
        async with self._database.read() as session:
            return await session.scalar(select(MetaRow.value).where(MetaRow.key == META_KEY))

    async def _last_audit(self) -> int:
        async with self._database.read() as session:
            return await session.scalar(select(func.max(AuditRow.id))) or 0

    def _read(self) -> _Mark | None:
        try:
            found: dict[str, Any] = json.loads(self._path.read_bytes())
            return _Mark(str(found["id"]), int(found["audit"]), tuple(found["kept"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise WrongDatabase(
                f"{self._path} is damaged ({error}), so that nothing says which database belongs to the"
                f" folder. No adapter was touched. {_ADOPT}"
            ) from error

    def _write(self, mark: _Mark) -> None:
        """By a rename: a crash leaves the old file or the new one."""
        partial = self._path.with_suffix(".part")
        with partial.open("w") as file:
            json.dump(asdict(mark), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self._path)
        sync_path(self._path.parent)
