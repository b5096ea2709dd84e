"""The use case: at every start all versions are held against the engine as it is now.

What it cannot serve faithfully any more is refused from then on, and named. A version is never loaded before
it has been looked at (``adapters.store.fitness``), so none of this has to end before the first request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from adapters.database.database import Database
from adapters.store.blobs import BlobStore
from adapters.store.check import check as rows_against_bytes
from adapters.store.digests import digest_slowly
from adapters.store.fitness import Fitness
from adapters.store.versions import every, linked_digests

logger = logging.getLogger(__name__)

# A start waits so long for the first look, in seconds; what takes longer goes on beside the requests.
START_S = 5.0
_NAMED = 20
# Of the time in which verdicts are found, the part that is left to the requests.
_LEFT = 0.75


async def hold_all(fitness: Fitness, database: Database, path_of: Callable[[str], Path]) -> None:
    """Finds the verdict on every version that has none yet, and names those that are refused.

    Known verdicts are from the start before, so that 10,000 versions take a second; for another engine each
    takes some milliseconds of a thread, and most of the time is left to the requests.
    """
    began, refused = time.monotonic(), 0
    linked = await linked_digests(database)
    for digest in fitness.known() - linked:
        fitness.forget(digest)
    if not linked:  # two statements less at the first start of all, which tests make a thousand times
        await fitness.save()
        return
    async for version in every(database, path_of):
        if not fitness.knows(version.digest):
            looked = time.monotonic()
            await fitness.judge(version.digest)
            if looked - began > START_S:
                await asyncio.sleep((time.monotonic() - looked) * _LEFT / (1 - _LEFT))
        problem = fitness.problem(version)
        if problem is None:
            continue
        refused += 1
        if refused <= _NAMED:
            about = {"tenant": version.tenant, "adapter": version.adapter, "version": version.number}
            name = f"{version.tenant}/{version.adapter}@{version.number}"
            logger.error("%s is not served by this engine: %s", name, problem.message, extra=about)
    if refused:
        more = f", {refused - _NAMED} of them not named here" if refused > _NAMED else ""
        logger.error("%d versions are not served by this engine%s; see GET /admin/v1/check", refused, more)
    await fitness.save()


async def check(
    fitness: Fitness,
    database: Database,
    blobs: BlobStore,
    *,
    repair: bool,
    elsewhere: Callable[[], Awaitable[list[dict[str, Any]]]] | None = None,
) -> dict[str, Any]:
    """As JSON: rows against bytes (``adapters.store.check``), and what this engine does not serve.

    A process without an engine asks ``elsewhere``, which tells what ``unfit`` does.
    """
    found = await rows_against_bytes(database, blobs, repair=repair, is_whole=fitness.is_whole)
    refused = await (elsewhere() if elsewhere is not None else unfit(fitness, database, blobs.path))
    return found.as_json() | {"ok": found.is_ok and not refused, "unfit": refused}


async def unfit(fitness: Fitness, database: Database, path_of: Callable[[str], Path]) -> list[dict[str, Any]]:
    """As JSON: every version that this engine does not serve, and why."""
    found = []
    async for version in every(database, path_of):
        if (problem := fitness.problem(version)) is not None:
            about = {"tenant": version.tenant, "adapter": version.adapter, "version": version.number}
            found.append(about | {"code": problem.code, "message": problem.message})
    return found


async def scrub(
    fitness: Fitness,
    database: Database,
    path_of: Callable[[str], Path],
    rate: float,
    pause: float = 3600.0,
) -> None:
    """Never returns: reads the bytes of every version, at most ``rate`` a second; again after ``pause``."""
    while True:
        for digest in sorted(await linked_digests(database)):
            whole = await digest_slowly(path_of(digest), rate) == digest
            # A version may have been deleted meanwhile; what is still linked is looked at once more.
            if not whole and digest in await linked_digests(database):
                await fitness.is_whole(digest)
        await asyncio.sleep(pause)


async def look_again(fitness: Fitness, database: Database, every_s: float = 60.0) -> None:
    """Never returns: files found damaged are read again, for they may be whole again, or nobody's."""
    while True:
        await asyncio.sleep(every_s)
        for digest in fitness.damaged:
            if digest in await linked_digests(database):
                await fitness.is_whole(digest)
            else:
                fitness.forget(digest)
        await fitness.save()
