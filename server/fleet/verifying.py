"""A replica is held against the golden probes before it takes requests, once for each kind of engine."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging

from adapters.model import Version
from server.http.services import Services
from server.publishing.publish import verify_all

logger = logging.getLogger(__name__)

# How long requests wait for it where no other replica takes them, and where one does; what is left is
# verified beside the requests.
ALONE_S, VERIFY_S = 60.0, 600.0
LEASE_S = 60.0
LOOK_EVERY_S = 1.0


async def verify_first(services: Services, holder: str) -> None:
    """Returns when each version that answers, and has golden probes, has a verdict on this replica's engine,
    dtype and base or cannot have one, when it took too long (then it goes on in the background), or when it
    broke off, as where the engine or the database is lost.

    That is after ``VERIFY_S`` seconds, and after ``ALONE_S`` where no other replica takes requests.
    Of several replicas of one kind that start at once one verifies, by a lease, and the others wait for it.
    What differs is logged and counted, and no reason to stay away; see ``verify_all``.
    """
    found: list[Version] | None = None
    with contextlib.suppress(Exception):  # the turn to verify is waited for all the same
        found = await unverified(services)
    number = "unknown" if found is None else len(found)
    logger.info("before requests come, versions to be verified on this kind of engine: %s", number)
    clock = asyncio.get_running_loop().time
    not_possible: set[Version] = set()
    work, began = services.in_background(_in_turn(services, holder, not_possible)), clock()
    while clock() - began < VERIFY_S:
        most = VERIFY_S if await _others_answer(services, holder) else ALONE_S
        left = began + most - clock()
        await asyncio.wait([work], timeout=max(0.0, min(LOOK_EVERY_S, left)))
        if work.done() or left <= 0:
            break
    with contextlib.suppress(Exception):  # the database is away: as many as there were
        found = await unverified(services)
    if found is None:  # the database was away before, too
        logger.warning(
            "after %.0f s requests come; how many versions are not yet verified cannot be told, since the"
            " database did not answer",
            clock() - began,
        )
    elif waiting := len(set(found) - not_possible):
        services.metrics.verified("late", waiting)
        logger.warning(
            "after %.0f s requests come all the same; not yet verified: %d", clock() - began, waiting
        )


async def _others_answer(services: Services, holder: str) -> bool:
    try:
        rows = await services.replicas.all()
    except Exception:  # the database is away: no reason to begin sooner
        return True
    return any(row.id != holder and row.state == "ready" and not row.is_lost for row in rows)


async def _in_turn(services: Services, holder: str, not_possible: set[Version]) -> None:
    here = json.dumps(services.publishing.prober.here, sort_keys=True)
    lease = f"verify {hashlib.sha256(here.encode()).hexdigest()[:32]}"
    try:
        while not await services.replicas.hold(lease, holder, LEASE_S):
            await asyncio.sleep(LOOK_EVERY_S)
        keeping = asyncio.create_task(_keep(services, lease, holder), name="loraplex-verify-lease")
        try:
            await verify_all(services.publishing, services.metrics, not_possible)
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])
            await services.replicas.release(holder, lease)
    except Exception:  # it must not keep a replica away that can answer
        logger.exception("versions could not be verified")


async def _keep(services: Services, lease: str, holder: str) -> None:
    """Or the next one of this kind would verify the same at the same time."""
    while True:
        await asyncio.sleep(LEASE_S / 4)
        try:
            await services.replicas.hold(lease, holder, LEASE_S)
        except Exception as exc:  # it is tried again, and at worst something is verified twice
            logger.warning("the turn to verify could not be kept: %s", exc)


async def unverified(services: Services) -> list[Version]:
    """The versions that answer, came with golden probes, and have no verdict on this kind of engine."""
    publishing = services.publishing
    found = await publishing.catalog.unverified(publishing.prober.here)
    return [version for version in found if version.quarantine is None]
