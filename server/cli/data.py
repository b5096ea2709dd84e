"""What the command line does with the data folder and the database of a server that is stopped."""

from __future__ import annotations

import asyncio

from rich.console import Console
from rich.markup import escape

from adapters.database.database import Database, SchemaTooNew
from adapters.store.blobs import BlobStore
from adapters.store.ownership import FolderLock, Ownership
from server.settings import Settings

OK, FAILED = 0, 2


def adopt(settings: Settings) -> int:
    """Joins DATA_DIR and DATABASE_URL whatever they hold, and says so; 0 done, 2 failed."""
    try:
        kept = asyncio.run(_adopt(settings))
    except (OSError, ValueError, SchemaTooNew) as error:
        Console(stderr=True).print(f"[red]{escape(str(error))}[/red]")
        return FAILED
    print(f"{settings.data_dir} and its database belong together now.")
    if kept:
        print(f"{kept} blobs without a row are kept: no start removes them.")
    return OK


async def _adopt(settings: Settings) -> int:
    lock = FolderLock(settings.data_dir).acquire()
    database = Database(settings.database_url)
    try:
        await database.open()
        blobs = BlobStore(settings.data_dir, max_bytes=settings.max_upload_bytes)
        await blobs.open()
        return await Ownership(blobs, database).adopt()
    finally:
        await database.close()
        lock.release()
