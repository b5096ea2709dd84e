"""What of an object store lies in the data folder: fetched when it is needed, bounded, and held against its
digest.

    prepare   fetches a version's files, if they are not here, before the engine reads them
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
from collections import OrderedDict
from collections.abc import Callable, Collection
from pathlib import Path

from adapters.errors import BlobMissing, StorageFailed, StorageFull
from adapters.model import Version
from adapters.store.blobs import BlobStore, digest_of, discard, disk_errors
from adapters.store.objects import ObjectStore
from adapters.tasks import run_in_thread

logger = logging.getLogger(__name__)

# A version that the store did not have is asked for again at most so often, in seconds.
_ASK_AGAIN_S = 5.0


class Cache:
    """The blobs of ``blobs`` as a cache of ``objects``; ``max_bytes`` bounds it.

    ``in_use`` says which digests may not go: what is in memory, or about to be.
    """

    def __init__(
        self, blobs: BlobStore, max_bytes: int, in_use: Callable[[], Collection[str]] = lambda: ()
    ) -> None:
        assert blobs.objects is not None, "nothing to fetch from"
        self.max_bytes = max_bytes
        self.in_use = in_use
        self.fetched = self.evicted = 0
        self._blobs = blobs
        self._objects: ObjectStore = blobs.objects
        self._sizes: OrderedDict[str, int] = OrderedDict()  # the longest unused first
        self._missing: dict[str, float] = {}
        self._trimming = asyncio.Lock()

    def __repr__(self) -> str:
        return f"Cache({len(self._sizes)} blobs, {self.size_bytes} of {self.max_bytes} bytes)"

    @property
    def size_bytes(self) -> int:
        """Of all files that are here."""
        return sum(self._sizes.values())

    async def open(self) -> None:
        """Finds what is here from before, and lets go of what is too much."""
        self._sizes = OrderedDict(await run_in_thread(self._found, await self._blobs.local()))
        await self.trim()

    def is_ready(self, version: Version) -> bool:
        """Whether the files are here; to ask counts as use."""
        if version.digest not in self._sizes:
            return False
        self._sizes.move_to_end(version.digest)
        return version.path.exists()

    async def prepare(self, version: Version) -> None:
        """Fetches the files if they are not here.

        Raises StoreUnavailable, BlobMissing (whatever else lies under that name counts as missing),
        StorageFull or StorageFailed.
        """
        digest = version.digest
        async with self._blobs.lock(digest):
            if not version.path.exists():
                if time.monotonic() - self._missing.get(digest, float("-inf")) < _ASK_AGAIN_S:
                    raise _missing(version)
                await self._fetch(version)
            self._sizes[digest] = await run_in_thread(_size_of, version.path)
            self._sizes.move_to_end(digest)
        await self.trim()

    async def trim(self) -> None:
        """Lets go of what was used longest ago, but not of what is in use, until the rest fits."""
        async with self._trimming:
            kept = set(self.in_use())
            for digest in list(self._sizes):
                if self.size_bytes <= self.max_bytes:
                    return
                if digest not in kept:
                    await self._let_go(digest)

    async def _fetch(self, version: Version) -> None:
        began = time.monotonic()
        folder = self._blobs.quarantine / uuid.uuid4().hex
        try:
            with disk_errors(f"fetching {version.digest}"):
                await run_in_thread(folder.mkdir)
                await self._objects.get(version.digest, folder)
            if await run_in_thread(digest_of, folder) != version.digest:
                raise BlobMissing("other bytes")
            await self._blobs.take_in(folder, version.digest)
        except BlobMissing as error:
            self._missing = {d: at for d, at in self._missing.items() if began - at < _ASK_AGAIN_S}
            self._missing[version.digest] = began
            logger.error("the object store has no whole files of %s: %s", version.digest, error.message)
            raise _missing(version) from error
        finally:
            await run_in_thread(discard, folder)
        self.fetched += 1
        logger.info("fetched %s in %.2f s", version.digest, time.monotonic() - began)

    async def _let_go(self, digest: str) -> None:
        try:
            await self._blobs.drop(digest)
        except (StorageFailed, StorageFull):
            logger.warning("%s stays in the data folder", digest, exc_info=True)
            return
        self._sizes.pop(digest, None)
        self.evicted += 1

    def _found(self, digests: Collection[str]) -> list[tuple[str, int]]:
        """By the time of their last use, as far as the disk knows it."""
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
