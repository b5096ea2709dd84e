"""A replica is held against the golden probes before it takes requests, once for each kind of engine."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging

from adapters.model import Version
from server.http.services import Services
from server.publishing.publish import verify_all

logger = logging.getLogger(__name__)

# How long a start may take longer for it; what is left is verified beside the requests.
VERIFY_S = 60.0
LOOK_EVERY_S = 1.0


async def verify_first(services: Services, holder: str) -> None:
    """Returns when each version that answers, and has golden probes, has a verdict on this replica's engine,
    dtype and base, or ``VERIFY_S`` seconds have passed: then it goes on in the background.

    Of several replicas of one kind that start at once one verifies, by a lease, and the others wait for it.
    What differs is logged and counted, and no reason to stay away; see ``verify_all``.
    """
    waiting = await _unverified(services)
    if not waiting:
        return
    logger.info("before requests come, versions to be verified on this kind of engine: %d", len(waiting))
    work = services.in_background(_in_turn(services, holder))
    await asyncio.wait([work], timeout=VERIFY_S)
    if work.done():
        return
    left = len(await _unverified(services))
    services.metrics.verified("late", left)
    logger.warning("after %.0f s requests come all the same; not yet verified: %d", VERIFY_S, left)


async def _in_turn(services: Services, holder: str) -> None:
    here = json.dumps(services.publishing.prober.here, sort_keys=True)
    lease = f"verify {hashlib.sha256(here.encode()).hexdigest()[:32]}"
    try:
        while not await services.replicas.hold(lease, holder, VERIFY_S):
            await asyncio.sleep(LOOK_EVERY_S)
        try:
            await verify_all(services.publishing, services.metrics)
        finally:
            await services.replicas.release(holder, lease)
    except Exception:  # it must not keep a replica away that can answer
        logger.exception("versions could not be verified")


async def _unverified(services: Services) -> list[Version]:
    publishing = services.publishing
    found = await publishing.catalog.unverified(publishing.prober.here)
    return [version for version in found if version.quarantine is None]
