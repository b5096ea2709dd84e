"""What the command line does with a data folder and its database, without asking the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from adapters.database.database import Database, SchemaTooNew
from adapters.errors import AdapterError
from adapters.store import backup, backup_check
from adapters.store.blobs import BlobStore
from adapters.store.check import check_offline
from adapters.store.objects import ObjectStore
from adapters.store.ownership import FolderInUse, FolderLock, Ownership
from server.settings import Settings

OK, PARTLY, FAILED = 0, 1, 2


def adopt(settings: Settings) -> int:
    """Joins DATA_DIR and DATABASE_URL whatever they hold, and says so; 0 done, 2 failed."""
    try:
        kept = asyncio.run(_adopt(settings))
    except (OSError, ValueError, SchemaTooNew) as error:
        return _failed(error)
    print(f"{settings.data_dir} and its database belong together now.")
    if kept:
        print(f"{kept} blobs without a row are kept: no start removes them.")
    return OK


def back_up(settings: Settings, folder: Path) -> int:
    """Copies the data folder to ``folder``, while a server runs on it or not; 0 done, 1 in part, 2 failed."""
    blobs, url = settings.data_dir / "blobs", settings.database_url
    store, reserve = settings.blobs_url, settings.disk_reserve

    def run() -> backup.Backup:
        return backup.back_up(url, blobs, folder, blobs_url=store, reserve=reserve)

    return _report("backed up to", folder, run)


def restore(settings: Settings, folder: Path) -> int:
    """Copies a backup to DATA_DIR and joins it to its database; 0 done, 1 in part, 2 failed."""

    def run() -> backup.Backup:
        lock = FolderLock(settings.data_dir).acquire()
        try:
            blobs, url = settings.data_dir / "blobs", settings.database_url
            done = backup.restore(folder, url, blobs, blobs_url=settings.blobs_url)
        finally:
            lock.release()
        asyncio.run(_adopt(settings))
        return done

    return _report("restored from", folder, run)


def check(settings: Settings, *, repair: bool, as_json: bool) -> int:
    """Rows against bytes, without a server; 0 all is well, 1 something was found, 2 it could not be done.

    A repair needs the folder for itself; a look may be taken beside a server.
    """
    lock = FolderLock(settings.data_dir)
    try:
        if not settings.data_dir.exists():
            raise ValueError(f"there is no data folder {settings.data_dir}")
        try:
            lock.acquire()
        except FolderInUse as error:
            if repair:
                raise ValueError(f"{error} Or let it do the repair itself, with --url.") from error
        try:
            found = asyncio.run(_check(settings, repair))
        finally:
            lock.release()
    except (OSError, ValueError, SchemaTooNew, AdapterError) as error:
        return _failed(error)
    return show_check(found, as_json=as_json)


def check_backup(folder: Path, *, as_json: bool) -> int:
    """Every byte of a backup; 0 all is well, 1 something was found, 2 nothing of it can be restored."""
    try:
        found = backup_check.check_backup(folder)
    except (OSError, ValueError) as error:
        return _failed(error)
    return show_check(found.as_json(), as_json=as_json)


def show_check(found: dict[str, Any], *, as_json: bool) -> int:
    """Prints what a check found, of a server's too."""
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print(f"{found['versions']} versions, {found['files']} folders of files, {found['seconds']} s")
        for one in found["damaged"]:
            print(f"{one['reason']}: {one['digest']}, of {', '.join(one['versions'])}")
        for one in found["unlinked"]:
            print(f"of no version{'' if one['whole'] else ', and broken'}: {one['digest']}")
        for name in found["strays"]:
            print(f"not an adapter's: {name}")
        for one in found.get("incomplete", []):
            sizes = f"{one['stored_bytes']} of {one['size_bytes']} bytes"
            print(f"a file of {one['tenant']} that is not whole, {sizes}: {one['file']}")
        for one in found.get("unfit", []):
            print(f"not served: {one['tenant']}/{one['adapter']}@{one['version']}: {one['message']}")
        for name in found["moved"]:
            print(f"moved to {name}")
        print("all is well" if found["ok"] else "not all is well")
    return OK if found["ok"] else PARTLY


def _failed(error: Exception) -> int:
    Console(stderr=True).print(f"[red]{escape(str(error))}[/red]", soft_wrap=True)
    return FAILED


def _report(what: str, folder: Path, run: Callable[[], backup.Backup]) -> int:
    try:
        done = run()
    except (OSError, ValueError, SchemaTooNew, AdapterError) as error:
        return _failed(error)
    print(f"{what} {folder}: {done.copied} adapters' files copied, {done.present} were there already.")
    if done.verified:
        print(f"{done.verified} of those were read again, and are whole.")
    for digest in done.repaired:
        print(f"copied anew, its bytes in the backup had changed: {digest}")
    for digest in done.broken:
        print(f"left out, its bytes are not those that were uploaded: {digest}")
    for digest in done.missing:
        print(f"left out, its files are not there: {digest}")
    return PARTLY if done.broken or done.missing else OK


async def _check(settings: Settings, repair: bool) -> dict[str, Any]:
    return (await check_offline(settings.database_url, _blobs(settings), repair=repair)).as_json()


async def _adopt(settings: Settings) -> int:
    lock = FolderLock(settings.data_dir).acquire()
    database = Database(settings.database_url)
    try:
        await database.open()
        blobs = _blobs(settings)
        await blobs.open()
        return await Ownership(blobs, database).adopt()
    finally:
        await database.close()
        lock.release()


def _blobs(settings: Settings) -> BlobStore:
    objects = ObjectStore(settings.blobs_url) if settings.blobs_url else None
    return BlobStore(settings.data_dir, max_bytes=settings.max_upload_bytes, objects=objects)
