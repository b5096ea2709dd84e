"""Rows against bytes, both ways: what is on record and not whole, and what is there and on no record."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sqlalchemy.exc import SQLAlchemyError

from adapters.database.database import Database
from adapters.database.glance import glance
from adapters.store.blobs import BlobStore
from adapters.store.digests import digest_of
from adapters.store.files import IncompleteFile, incomplete_files
from adapters.store.ownership import META_KEY
from adapters.store.versions import linked_digests, versions_of
from adapters.tasks import run_in_thread

_LOOKS = 3


@dataclass(frozen=True, slots=True)
class Damaged:
    """Files on record. ``missing``: there is no folder; ``changed``: other bytes than those uploaded."""

    digest: str
    reason: Literal["missing", "changed"]
    versions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unlinked:
    """Files that no version has. Whole ones are removed at a start when they are a day old."""

    digest: str
    whole: bool
    age_seconds: int


@dataclass(slots=True)
class Found:
    """``strays`` are names in the folder of blobs that are no digests; ``moved`` went to ``aside``.

    ``incomplete`` are customers' files of ``/v1/files``, whose bytes are rows.
    """

    versions: int = 0
    files: int = 0
    seconds: float = 0.0
    damaged: list[Damaged] = field(default_factory=list)
    unlinked: list[Unlinked] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    incomplete: list[IncompleteFile] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        """Nothing is damaged; what is merely not linked harms nobody."""
        broken = self.damaged or self.strays or self.incomplete
        return not broken and all(one.whole for one in self.unlinked)

    def as_json(self) -> dict[str, Any]:
        """As the admin API answers, but for what only a running server knows."""
        return {"ok": self.is_ok, **asdict(self)}


async def check(
    database: Database,
    blobs: BlobStore,
    *,
    repair: bool = False,
    is_whole: Callable[[str], Awaitable[bool]] | None = None,
) -> Found:
    """Reads every byte that is stored here; of an object store the names.

    ``is_whole`` says of a digest whether its files are whole, for a caller that remembers it.
    ``repair`` moves what is broken to ``aside`` in the data folder, where nothing looks for it, and removes
    nothing. Rows stay: their versions are refused until the same files are uploaded again or put back.
    Raises StorageFailed, and SQLAlchemy's errors.
    """
    began = time.monotonic()
    linked = await linked_digests(database)
    present = await blobs.digests()
    look = is_whole or _Look(blobs).is_whole
    if blobs.objects is not None:
        look = _Listed(present).is_whole
    found = Found(files=len(present), strays=await blobs.strays())
    named = await versions_of(database, linked)
    found.versions = sum(map(len, named.values()))
    for digest in sorted(linked | present):
        whole = await look(digest)
        for _ in range(_LOOKS):  # it may have been deleted, and uploaded again, since it was looked for
            if whole or digest not in await linked_digests(database):
                break
            whole = await look(digest)
        if whole:
            if digest not in linked and digest in present:
                found.unlinked.append(Unlinked(digest, True, await blobs.age(digest)))
        elif digest in await linked_digests(database):
            there = digest in present
            versions = tuple(named.get(digest) or (await versions_of(database, [digest]))[digest])
            found.damaged.append(Damaged(digest, "changed" if there else "missing", versions))
        elif digest in await blobs.digests():
            found.unlinked.append(Unlinked(digest, False, await blobs.age(digest)))
    found.incomplete = await incomplete_files(database)
    if repair:
        broken = [one.digest for one in found.damaged if one.reason == "changed"]
        broken += [one.digest for one in found.unlinked if not one.whole] + found.strays
        for name in broken:
            if (moved := await blobs.set_aside(name)) is not None:
                found.moved.append(moved)
    found.seconds = round(time.monotonic() - began, 3)
    return found


async def check_offline(database_url: str, blobs: BlobStore, *, repair: bool) -> Found:
    """The same without a server. The database is neither made nor upgraded.

    Raises ValueError where there is none of this program's schema, OSError where it cannot be read.
    """
    database = Database(database_url)
    try:
        seen = await glance(database.url, META_KEY)
        if not seen.is_current:
            raise ValueError(
                f"the database's schema is {seen.revision}, of an earlier release: start this one on it first"
                if seen.revision
                else f"there is no database at {database.url.render_as_string()}"
            )
        return await check(database, blobs, repair=repair)
    except SQLAlchemyError as error:
        raise OSError(f"the database cannot be read: {error}") from error
    finally:
        await database.close()


@dataclass(frozen=True, slots=True)
class _Listed:
    """An object store's bytes are held against their digest whenever they are fetched."""

    present: set[str]

    async def is_whole(self, digest: str) -> bool:
        return digest in self.present


@dataclass(frozen=True, slots=True)
class _Look:
    blobs: BlobStore

    async def is_whole(self, digest: str) -> bool:
        return await run_in_thread(digest_of, self.blobs.path(digest)) == digest
