"""An adapter as both APIs show it.

It is made as text: the reports of a thousand versions are megabytes of JSON that nobody here has to read.
"""

from __future__ import annotations

import asyncio

from adapters.model import Adapter, Tier, Version, VersionInfo
from adapters.store.fitness import Fitness
from server.http.services import Services
from server.inference.long_documents import dumped

# Versions that are put into words at once, in the event loop or out of it.
SLICE = 50


async def adapter_text(adapter: Adapter, services: Services) -> str:
    """JSON, with the tiers that the versions are in now. Others have a turn after each ``SLICE`` of them."""
    live, dispatcher, fitness = adapter.live_version, services.dispatcher, services.publishing.fitness
    head = {
        "name": adapter.name,
        "tenant": adapter.tenant,
        "live": adapter.live,
        "default": adapter.default,
        "pinned": adapter.pinned,
        "split": adapter.split,
        "keep_versions": adapter.keep_versions,
        "defaults": dict(adapter.defaults) if adapter.defaults else None,
        "tier": dispatcher.tier_of(live) if live else Tier.DISK,
        "created_at": adapter.created_at.isoformat(),
    }
    shown = []
    for first in range(0, len(adapter.versions), SLICE):
        if first:
            await asyncio.sleep(0)
        for info in adapter.versions[first : first + SLICE]:
            shown.append(_version(info, dispatcher.tier_of(info.version), _problem(fitness, info.version)))
    return f'{dumped(head)[:-1]},"versions":[{",".join(shown)}]}}'


def _version(info: VersionInfo, tier: Tier, problem: dict[str, str] | None) -> str:
    version = {
        "version": info.version.number,
        "digest": info.version.digest,
        "tier": tier,
        "created_at": info.created_at.isoformat(),
        "uploader": info.uploader,
        "note": info.note,
        "quarantine": dict(info.quarantine) if info.quarantine else None,
        "problem": problem,
    }
    return f'{dumped(version)[:-1]},"report":{info.report}}}'


def _problem(fitness: Fitness, version: Version) -> dict[str, str] | None:
    """Why a version is not loaded any more, although nobody has taken it out of service."""
    if (unfit := fitness.problem(version)) is not None:
        return {"code": unfit.code, "message": unfit.message}
    if (damaged := fitness.damage(version)) is not None:
        return {"code": damaged.code, "message": damaged.message}
    return None
