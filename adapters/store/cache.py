"""What of an object store lies in the data folder: fetched when it is needed, bounded, and held against its
digest.

    prepare   fetches a version's files, if they are not here, before the engine reads them
    held      the same for whoever else reads them: they stay as long
    trim      lets go of what was used longest ago, until the rest fits

A fetch that fails is that version's failure alone: whoever waits for it is told, and the next request tries
again. What is in memory or on its way there stays, also when that is more than fits.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from adapters.errors import (
    AdapterDamaged,
    BlobMissing,
    StorageFailed,
    StorageFull,
    StoreUnavailable,
    cause_of,
)
from adapters.model import Version
from adapters.store.blobs import BlobStore, discard, disk_errors
from adapters.store.digests import digest_of
from adapters.store.objects import ObjectStore
from adapters.tasks import run_in_thread

logger = logging.getLogger(__name__)

# A version that the store did not have is asked for again at most so often, in seconds.
_ASK_AGAIN_S = 5.0


class Next(Protocol):
    """What is done with files that are here, before the engine reads them; ``fitness.Fitness``."""

    def is_ready(self, version: Version) -> bool: ...
    async def prepare(self, version: Version) -> None: ...
    def fetched(self, digest: str) -> None: ...


class Cache:
    """The blobs of ``blobs`` as a cache of ``objects``; ``max_bytes`` bounds it.

    ``in_use`` says which digests may not go: what is in memory, or about to be. ``on_fetch`` is told of each
    fetch whether it came to be and how many seconds it took.
    """

    def __init__(
        self,
        blobs: BlobStore,
        max_bytes: int,
        then: Next,
        on_fetch: Callable[[bool, float], None] = lambda _fetched, _seconds: None,
    ) -> None:
        assert blobs.objects is not None, "nothing to fetch from"
        self.max_bytes = max_bytes
        self.in_use: Callable[[], Collection[str]] = lambda: ()
        self._blobs = blobs
        self._objects: ObjectStore = blobs.objects
        self._then = then
        self._on_fetch = on_fetch
        self._sizes: OrderedDict[str, int] = OrderedDict()  # the longest unused first
        self._missing: dict[str, float] = {}
        self._held: Counter[str] = Counter()
        self._trimming = asyncio.Lock()
        self._all_in_store = False

    def __repr__(self) -> str:
        return f"Cache({len(self._sizes)} blobs, {self.size_bytes} of {self.max_bytes} bytes)"

    @property
    def size_bytes(self) -> int:
        """Bytes of all files in the cache."""
        return sum(self._sizes.values())

    async def open(self) -> None:
        """Finds what is here from before, and lets go of what is too much."""
        found = OrderedDict(await run_in_thread(self._found, await self._blobs.local()))
        self._sizes = found | self._sizes  # what has been fetched meanwhile too
        await self.trim()

    def is_ready(self, version: Version) -> bool:
        """Whether the files are here and need no further look; to ask counts as use."""
        if version.digest not in self._sizes:
            return False
        self._sizes.move_to_end(version.digest)
        return self._then.is_ready(version)

    async def prepare(self, version: Version) -> None:
        """Fetches the files if they are not here, or not whole, and has them looked at.

        Raises StoreUnavailable, BlobMissing (whatever else lies under that name counts as missing),
        StorageFull, StorageFailed, and what the look leads to.
        """
        await self._have(version)
        try:
            await self._then.prepare(version)
        except AdapterDamaged:
            await self._blobs.drop(version.digest)
            await self._have(version)
            await self._then.prepare(version)
        await self.trim()

    @asynccontextmanager
    async def held(self, version: Version) -> AsyncIterator[None]:
        """The files are here for as long as the block. Raises as ``prepare``."""
        self._held[version.digest] += 1
        try:
            await self.prepare(version)
            yield
        finally:
            self._held[version.digest] -= 1
            if not self._held[version.digest]:
                del self._held[version.digest]

    async def trim(self) -> None:
        """Lets go of what was used longest ago, but not of what is in use, until the rest fits.

        Of nothing before the store is known to have everything that is here.
        """
        async with self._trimming:
            if not await self._put_all() or self.size_bytes <= self.max_bytes:
                return
            kept = {*self.in_use(), *self._held}
            for digest in list(self._sizes):
                if self.size_bytes <= self.max_bytes:
                    return
                if digest not in kept:
                    await self._let_go(digest)

    async def _put_all(self) -> bool:
        """Puts what is only here, as after a server without an object store; False where that fails."""
        if not self._all_in_store:
            try:
                stored = await self._blobs.digests()
                for digest in [digest for digest in self._sizes if digest not in stored]:
                    if await run_in_thread(digest_of, self._blobs.path(digest)) == digest:
                        await self._objects.put(digest, self._blobs.path(digest))
                        logger.info("put %s, which was only here, into the object store", digest)
            except StoreUnavailable:
                return False
            self._all_in_store = True
        return True

    async def _have(self, version: Version) -> None:
        digest = version.digest
        async with self._blobs.lock(digest):
            if not await run_in_thread(version.path.exists):
                if time.monotonic() - self._missing.get(digest, float("-inf")) < _ASK_AGAIN_S:
                    raise _missing(version)
                await self._fetch(version)
            self._sizes[digest] = await run_in_thread(_size_of, version.path)
            self._sizes.move_to_end(digest)

    async def _fetch(self, version: Version) -> None:
        began = time.monotonic()
        folder = self._blobs.quarantine / uuid.uuid4().hex
        fetched = False
        try:
            with disk_errors(f"fetching {version.digest}"):
                await run_in_thread(folder.mkdir)
                await self._objects.get(version.digest, folder)
            if await run_in_thread(digest_of, folder) != version.digest:
                raise BlobMissing("The object store has other bytes under this name.")
            await self._blobs.take_in(folder, version.digest)
            self._then.fetched(version.digest)
            fetched = True
        except BlobMissing as error:
            self._missing = {d: at for d, at in self._missing.items() if began - at < _ASK_AGAIN_S}
            self._missing[version.digest] = began
            logger.error("the object store has no whole files of %s: %s", version.digest, error.message)
            raise _missing(version) from error
        finally:
            await run_in_thread(discard, folder)
            self._on_fetch(fetched, time.monotonic() - began)

    async def _let_go(self, digest: str) -> None:
        try:
            await self._blobs.drop(digest)
        except (StorageFailed, StorageFull) as exc:
            logger.warning("%s stays in the data folder: %s", digest, cause_of(exc))
            return
        self._sizes.pop(digest, None)

    def _found(self, digests: Collection[str]) -> list[tuple[str, int]]:
        """The files in the cache by the time of their last use, as far as the disk knows it."""
        paths = [self._blobs.path(digest) for digest in digests]
        used = sorted((max(os.stat(path).st_mtime, _read_at(path)), path) for path in paths)
        return [(path.name, _size_of(path)) for _, path in used]


def _read_at(folder: Path) -> float:
    return max((file.stat().st_atime for file in folder.iterdir()), default=0.0)


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _missing(version: Version) -> BlobMissing:
    return BlobMissing(
        f"The files of version {version.number} of `{version.adapter}` are not in the store of adapters, or"
        " not those that were uploaded. Upload them again, or ask the operator to restore them."
    )
