"""The use case: a version that harms the server is taken out of service, and put back by an operator."""

from __future__ import annotations

import asyncio
import logging

from adapters.errors import DatabaseUnavailable, StorageBusy, StorageFailed, StorageFull
from adapters.model import Version
from adapters.store.catalog import Catalog
from adapters.store.quarantine import Quarantine
from server.scheduling.dispatcher import Dispatcher
from server.scheduling.lease import Lease
from server.scheduling.refusals import quarantined

logger = logging.getLogger(__name__)

# A database that cannot be written is asked again so often, in seconds.
AGAIN_S = 1.0
_OF_THE_DATABASE = (StorageBusy, StorageFull, StorageFailed, DatabaseUnavailable)


async def quarantine(rows: Quarantine, dispatcher: Dispatcher | None, version: Version, reason: str) -> None:
    """Refuses ``version`` from now on, and at once what waits for it; ends its running requests.

    Without a ``dispatcher``, as on a gateway, what waits or runs goes on. ``reason`` is a clause that the
    customer reads, as in "it made NaN". Once this returns, the row is on disk. May be repeated: the first
    reason stays.
    """
    if await rows.put(version, reason):
        about = {"tenant": version.tenant, "adapter": version.adapter, "version": version.number}
        name = f"{version.tenant}/{version.adapter}@{version.number}"
        logger.error("%s is quarantined: %s", name, reason, extra=about)
    if dispatcher is not None:
        await _stop(dispatcher, version, reason)


async def _stop(dispatcher: Dispatcher, version: Version, reason: str) -> None:
    """Ends what waits for ``version`` and what runs on it; it leaves memory."""
    dispatcher.pin(version, False)
    running = [
        lease
        for lease in dispatcher.open_leases()
        if lease.version is not None and lease.version.key == version.key and lease.version.number
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
        dispatcher.out_of_service.put(key, reason)
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

    The version is out of service here and now. A database that is busy or away, or whose disk fails, is asked
    again until it has the row, which then decides, also after a restart. So it is after a defect of ours:
    that may not put the version back.
    """
    dispatcher.out_of_service.put(key, reason)
    known = dispatcher.version(key)
    if known is not None and known.number:
        dispatcher.spawn(_stop(dispatcher, known, reason))
    said = False
    while True:
        try:
            await _quarantine_key(rows, catalog, dispatcher, key, reason)
            break
        except Exception as exc:
            if not said:
                defect = None if isinstance(exc, _OF_THE_DATABASE) else exc
                words = "%s is out of service until a restart, %s; its row waits: %s"
                logger.error(words, key, reason, exc, exc_info=defect)
            said = True
            await asyncio.sleep(AGAIN_S)
    dispatcher.out_of_service.take_out(key)


async def _quarantine_key(
    rows: Quarantine, catalog: Catalog, dispatcher: Dispatcher, key: str, reason: str
) -> None:
    tenant, slash, rest = key.partition("/")
    named = await catalog.of_files(tenant, {rest.rpartition("@")[2]}) if slash else []
    found = [version for version in named if version.key == key]
    if found:
        await quarantine(rows, dispatcher, found[-1], reason)


async def _end(lease: Lease, reason: str) -> None:
    """Ends a running request: with an error that says ``reason`` where the engine can pause it, else cut.

    One that the engine has ended has its own error to tell: that its answer was not a number, for one.
    """
    if lease.work is not None and lease.work.failed:
        return
    lease.failure = lease.failure or quarantined(reason)
    if lease.work is not None and (lease.work.paused or await lease.work.pause()):
        await lease.work.give_up(lease.failure.message)
    else:
        await lease.close("failed")
