"""What the command line does with a data folder and its database, without asking the server."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from adapters.database.database import Database, SchemaTooNew, sqlite_file
from adapters.store import backup
from adapters.store.blobs import BlobStore
from adapters.store.objects import ObjectStore
from adapters.store.ownership import FolderLock, Ownership
from server.settings import Settings

OK, PARTLY, FAILED = 0, 1, 2


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


def back_up(settings: Settings, folder: Path) -> int:
    """Copies the data folder to ``folder``, while a server runs on it or not; 0 done, 1 in part, 2 failed."""
    return _report("backed up to", folder, lambda: backup.back_up(*_places(settings), folder))


def restore(settings: Settings, folder: Path) -> int:
    """Copies a backup to DATA_DIR and joins it to its database; 0 done, 1 in part, 2 failed."""

    def run() -> backup.Backup:
        lock = FolderLock(settings.data_dir).acquire()
        try:
            done = backup.restore(folder, *_places(settings))
        finally:
            lock.release()
        asyncio.run(_adopt(settings))
        return done

    return _report("restored from", folder, run)


def _places(settings: Settings) -> tuple[Path, Path]:
    """The SQLite file and the folder of blobs. Raises ValueError for another database."""
    file = sqlite_file(settings.database_url)
    if file is None:
        raise ValueError(
            "only SQLite is copied here. Back up PostgreSQL with pg_dump first and then copy DATA_DIR/blobs;"
            " restore both and run `loraplex adopt`."
        )
    return file, settings.data_dir / "blobs"


def _report(what: str, folder: Path, run: Callable[[], backup.Backup]) -> int:
    try:
        done = run()
    except (OSError, ValueError, SchemaTooNew, sqlite3.Error) as error:
        Console(stderr=True).print(f"[red]{escape(str(error))}[/red]")
        return FAILED
    print(f"{what} {folder}: {done.copied} adapters' files copied, {done.present} were there already.")
    for digest in done.broken:
        print(f"left out, its bytes are not those that were uploaded: {digest}")
    return PARTLY if done.broken else OK


async def _adopt(settings: Settings) -> int:
    lock = FolderLock(settings.data_dir).acquire()
    database = Database(settings.database_url)
    try:
        await database.open()
        objects = ObjectStore(settings.blobs_url) if settings.blobs_url else None
        blobs = BlobStore(settings.data_dir, max_bytes=settings.max_upload_bytes, objects=objects)
        await blobs.open()
        return await Ownership(blobs, database).adopt()
    finally:
        await database.close()
        lock.release()
