"""``/admin/v1/check`` and ``/admin/v1/backup``: what is stored, looked at and copied while all goes on."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from adapters.errors import StorageFull
from adapters.store import backup
from adapters.store.blobs import disk_errors
from adapters.tasks import run_in_thread
from server.errors import Conflict, Internal
from server.http import answers
from server.http.auth import ADMIN
from server.http.bodies import Body, body_as, documented
from server.http.services import Services, ServicesOf
from server.publishing import truth

router = APIRouter(prefix="/admin/v1", tags=["admin"], dependencies=[ADMIN])
logger = logging.getLogger(__name__)


class NewBackup(Body):
    """``name`` of a folder in BACKUP_DIR; BACKUP_DIR itself where there is none."""

    empty = b"{}"
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")


class Check(Body):
    empty = b"{}"
    repair: bool = False


@router.get("/check", response_model=answers.Checked)
async def check(services: ServicesOf) -> dict[str, Any]:
    """Every version against its bytes and this engine, and every file against the rows. Reads all of them."""
    return await _checked(services, repair=False)


@router.post("/check", response_model=answers.Checked, openapi_extra=documented(Check))
async def repair(body: Annotated[Check, body_as(Check)], services: ServicesOf) -> dict[str, Any]:
    """The same; with ``repair``, what is broken is moved aside in the data folder."""
    return await _checked(services, repair=body.repair)


async def _checked(services: Services, *, repair: bool) -> dict[str, Any]:
    async with services.holding:  # each reads all that is stored: two at once would only be slower
        fitness, replicas = services.publishing.fitness, services.publishing.elsewhere
        elsewhere = replicas.unfit if replicas is not None else None
        return await truth.check(
            fitness, services.database, services.blobs, repair=repair, elsewhere=elsewhere
        )


@router.post("/backup", status_code=201, response_model=answers.BackedUp, openapi_extra=documented(NewBackup))
async def back_up(body: Annotated[NewBackup, body_as(NewBackup)], services: ServicesOf) -> dict[str, Any]:
    """A consistent copy in BACKUP_DIR; only what is not there yet is copied. Files that are damaged, or are
    not there, are left out and named, as ``broken`` and ``missing``."""
    settings, began = services.settings, time.monotonic()
    folder = settings.backup_dir.absolute()
    folder = folder if body.name is None else folder / body.name
    try:
        with disk_errors("making a backup"):
            done = await run_in_thread(_back_up, services, folder)
    finally:
        logger.info("a backup to %s took %.1f s", folder, time.monotonic() - began)
    if left := len(done.broken) + len(done.missing):
        logger.warning("the backup to %s lacks the files of %d adapters; see /admin/v1/check", folder, left)
    return {"folder": str(folder), **asdict(done), "seconds": round(time.monotonic() - began, 3)}


def _back_up(services: Services, folder: Path) -> backup.Backup:
    settings = services.settings
    try:
        return backup.back_up(
            settings.database_url,
            services.blobs.blobs,
            folder,
            blobs_url=settings.blobs_url,
            reserve=services.intake.reserve,
        )
    except backup.BackupRuns as exc:
        raise Conflict(f"{str(exc).capitalize()}. Try again when it has ended.") from exc
    except backup.BackupFull as exc:
        raise StorageFull(f"The backup ended, and the one before is as it was: {exc}.") from exc
    except backup.BackupFailed as exc:
        message = f"The backup failed, and the one before is as it was: {exc}."
        raise Internal(message, code="backup_failed") from exc
