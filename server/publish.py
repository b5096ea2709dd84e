"""The use case: an upload, top to bottom.

Bytes are committed under their digest before a row names them, so a failure at any step leaves nothing that
a request could reach, and nothing to roll back: the sweep at start-up removes what nobody links.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial

from adapters.admit import admit
from adapters.blobs import BlobStore
from adapters.catalog import Catalog
from adapters.model import Adapter, Manifest, Quota, Version
from server.dispatcher import Dispatcher
from server.engine import Engine

# How often a deleted version's blob is looked at until its last request is done.
_RECLAIM_EVERY = 0.5


@dataclass(frozen=True, slots=True)
class Publishing:
    """What an upload needs; made once by ``create_app``."""

    engine: Engine
    dispatcher: Dispatcher
    blobs: BlobStore
    catalog: Catalog
    # Held from commit to link, and while a blob is removed: a digest must not vanish in between.
    linking: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True, slots=True)
class Published:
    adapter: Adapter
    version: Version
    manifest: Manifest


async def publish(
    service: Publishing,
    tenant: str,
    name: str,
    files: AsyncIterator[tuple[str, bytes]],
    quota: Quota | None = None,
) -> Published:
    """Receives ``files`` as (file name, bytes) pieces and makes them the live version of ``name``.

    When it returns, the files and the row are on disk. Raises an AdapterError, with nothing kept.
    """
    service.catalog.check_name(name)
    if quota is not None:
        await service.catalog.check_quota(tenant, name, quota)
    async with service.blobs.receive() as incoming:
        async for filename, chunk in files:
            await incoming.write(filename, chunk)
        uploaded = await incoming.finish()
        manifest = await incoming.examine(
            partial(
                admit,
                base=service.engine.base,
                original_digest=uploaded,
                serving_dtype=service.engine.lora_dtype,
            )
        )
        async with service.linking:
            digest = (await incoming.commit()).name
            adapter, version = await service.catalog.link(
                tenant, name, digest=digest, manifest=manifest, quota=quota
            )
    move_pin(service.dispatcher, adapter)
    return Published(adapter, version, manifest)


def move_pin(dispatcher: Dispatcher, adapter: Adapter) -> None:
    """Pins and loads the live version of a pinned adapter, and lets go of all its others."""
    live = adapter.live_version if adapter.pinned else None
    for key, version in {info.version.key: info.version for info in adapter.versions}.items():
        dispatcher.pin(version, live is not None and key == live.key)


async def unpublish(service: Publishing, versions: list[Version]) -> None:
    """Frees the memory and the bytes of versions that were deleted, once their last request is done."""
    gone = {version.key: version for version in versions}
    for tenant in {version.tenant for version in versions}:
        for adapter in await service.catalog.adapters(tenant):
            for info in adapter.versions:
                gone.pop(info.version.key, None)  # the same bytes under another number
    for version in gone.values():
        service.dispatcher.retire(version)
    while service.dispatcher.in_use(gone.keys()):
        await asyncio.sleep(_RECLAIM_EVERY)
    await remove_unlinked(service, {version.digest for version in versions})


async def remove_unlinked(service: Publishing, digests: set[str]) -> None:
    async with service.linking:
        for digest in digests:
            if not await service.catalog.is_linked(digest):
                await service.blobs.remove(digest)
