"""The use case: a version that harms the server is taken out of service, and put back by an operator."""

from __future__ import annotations

import asyncio
import logging

from adapters.model import Version
from adapters.store.quarantine import Quarantine
from server.scheduling.dispatcher import Dispatcher
from server.scheduling.lease import Lease

logger = logging.getLogger(__name__)


async def quarantine(rows: Quarantine, dispatcher: Dispatcher, version: Version, reason: str) -> None:
    """Refuses ``version`` from now on, and ends its running requests.

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
    message = f"The adapter is out of service: {reason}."
    await asyncio.gather(*(_end(lease, message) for lease in running), return_exceptions=True)
    dispatcher.retire(version)


async def _end(lease: Lease, message: str) -> None:
    """Ends a running request: with an error that says ``message`` where the engine can pause it, else cut."""
    if lease.work is not None and await lease.work.pause():
        await lease.work.give_up(message)
    else:
        await lease.close("failed")
