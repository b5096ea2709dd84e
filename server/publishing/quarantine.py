"""The use case: a version that harms the server is taken out of service, and put back by an operator."""

from __future__ import annotations

import asyncio
import itertools
import logging

from adapters.errors import DatabaseUnavailable, StorageBusy, StorageFailed, StorageFull
from adapters.model import Version
from adapters.store.catalog import Catalog
from adapters.store.quarantine import Quarantine
from server.scheduling.dispatcher import Dispatcher
from server.scheduling.lease import Lease
from server.scheduling.refusals import quarantined

logger = logging.getLogger(__name__)

# A database that cannot be written is asked again so often, for ten minutes.
AGAIN_S, TRIES = 1.0, 600


async def quarantine(rows: Quarantine, dispatcher: Dispatcher, version: Version, reason: str) -> None:
    """Refuses ``version`` from now on, and at once what waits for it; ends its running requests.

    ``reason`` is a clause that the customer reads, as in "it made NaN". Once this returns, the row is on
    disk. May be repeated: the first reason stays.
    """
    if await rows.put(version, reason):
        about = {"tenant": version.tenant, "adapter": version.adapter, "version": version.number}
        name = f"{version.tenant}/{version.adapter}@{version.number}"
        logger.error("%s is quarantined: %s", name, reason, extra=about)
    dispatcher.pin(version, False)
    running = [
        lease
        for lease in dispatcher.open_leases()
        if lease.version is not None and lease.version.key == version.key
    ]
    dispatcher.quarantine(version, reason)
    await asyncio.gather(*(_end(lease, reason) for lease in running), return_exceptions=True)
    dispatcher.retire(version)


class Faults:
    """Quarantines versions as the engine finds them out: each of their answers says so, and one is enough."""

    def __init__(self) -> None:
        self._under_way: set[str] = set()

    async def quarantine(
        self, rows: Quarantine, catalog: Catalog, dispatcher: Dispatcher, key: str, reason: str
    ) -> None:
        """``quarantine_key``, unless that is under way for ``key``."""
        if key in self._under_way:
            return
        self._under_way.add(key)
        try:
            await quarantine_key(rows, catalog, dispatcher, key, reason)
        finally:
            self._under_way.discard(key)


async def quarantine_key(
    rows: Quarantine, catalog: Catalog, dispatcher: Dispatcher, key: str, reason: str
) -> None:
    """As ``quarantine``, for what the engine knows a version by (``Version.key``).

    Nothing happens where no version has this key: the base model, a version that has been deleted, or one
    whose upload is still being tried, which is refused by its probe.

    Nobody waits for it, so a database that is busy or away, or whose disk fails, is asked again; its error is
    raised in the end.
    """
    for tries in itertools.count(1):
        try:
            await _quarantine_key(rows, catalog, dispatcher, key, reason)
            return
        except (StorageBusy, StorageFull, StorageFailed, DatabaseUnavailable) as exc:
            if tries == TRIES:
                raise
            if tries == 1:
                logger.error("%s cannot be quarantined yet, and will be: %s; %s", key, reason, exc)
            await asyncio.sleep(AGAIN_S)


async def _quarantine_key(
    rows: Quarantine, catalog: Catalog, dispatcher: Dispatcher, key: str, reason: str
) -> None:
    tenant, slash, rest = key.partition("/")
    named = await catalog.of_files(tenant, {rest.rpartition("@")[2]}) if slash else []
    found = [version for version in named if version.key == key]
    if found:
        await quarantine(rows, dispatcher, found[-1], reason)


async def _end(lease: Lease, reason: str) -> None:
    """Ends a running request: with an error that says ``reason`` where the engine can pause it, else cut."""
    lease.failure = lease.failure or quarantined(reason)
    if lease.work is not None and (lease.work.paused or await lease.work.pause()):
        await lease.work.give_up(lease.failure.message)
    else:
        await lease.close("failed")
