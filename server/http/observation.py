"""What operators look at over all customers: the server, adapters, single requests, and what limits leave."""

from __future__ import annotations

import asyncio
import shutil
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query

from adapters.model import ADAPTER_PATTERN, TENANT_PATTERN, Tier
from adapters.store.listing import Has, Wanted, adapters
from server import __version__
from server.accounts.requests import RequestSearch, requests
from server.accounts.tenants import Tenant
from server.http import answers_operators as answers
from server.http.auth import ADMIN, NamedTenant
from server.http.reports import LAST_ID, End, Limit, Start, page_of, utc
from server.http.services import Services, ServicesOf
from server.limits.standing import standing
from server.metrics import Outcome

router = APIRouter(prefix="/admin/v1", tags=["admin"], dependencies=[ADMIN])

_AFTER = f"^{TENANT_PATTERN}/{ADAPTER_PATTERN}$"
Part = Annotated[str | None, Query(max_length=200, description="A part of it, in letters of either case.")]


@router.get(
    "/server",
    response_model=answers.Server,
    summary="What runs here: versions, base model, capacity, settings, disk, restarts",
)
async def server(services: ServicesOf) -> dict[str, Any]:
    """Costs a look at the disk; nothing is asked of the engine."""
    engine, base = services.engine, services.engine.base
    started = datetime.fromtimestamp(services.started, UTC)
    return {
        "version": __version__,
        "engine": engine.version,
        "base": {
            "name": base.name,
            "source": base.source,
            "fingerprint": base.fingerprint,
            "pooling": base.pooling,
            "modules": len(base.modules),
        },
        "dtype": engine.lora_dtype,
        "parsers": engine.parsers.as_json(),
        "capacity": asdict(engine.capacity)
        | {
            "max_lora_rank": base.max_lora_rank,
            "max_running": engine.max_running,
            "max_model_len": engine.max_model_len,
        },
        "settings": services.settings.as_json(),
        "started_at": started.isoformat(),
        "uptime_seconds": round(time.time() - services.started, 1),
        "draining": services.draining,
        "disk": await asyncio.to_thread(_disk, services.settings.data_dir)
        | {"reserve": services.intake.reserve},
        "engine_restarts": services.dispatcher.restarts,
        "engine_state": "restarting" if services.dispatcher.is_restarting else "running",
    }


def _disk(folder: Path) -> dict[str, Any]:
    """Of the file system that the data lies on, in bytes."""
    usage = shutil.disk_usage(folder)
    return {"path": str(folder.absolute()), "total": usage.total, "used": usage.used, "free": usage.free}


@router.get(
    "/adapters",
    response_model=answers.ListedAdapters,
    summary="All customers' adapters, without their reports, a page at a time",
)
async def list_all(
    services: ServicesOf,
    q: Part = None,
    tenant: str | None = None,
    tier: Tier | None = None,
    has: Has | None = None,
    after: Annotated[str | None, Query(pattern=_AFTER, description="`next` of the page before.")] = None,
    limit: Limit = 100,
) -> dict[str, Any]:
    """By tenant and name."""
    wanted = Wanted(q, tenant, tier, has, after)
    resident = dict(services.dispatcher.resident().values())
    found = await adapters(services.database, wanted, limit + 1, resident)
    page = page_of(found, limit, "name")
    if page["next"] is not None:
        page["next"] = f"{page['data'][-1]['tenant']}/{page['next']}"
    return page


@router.get(
    "/requests",
    response_model=answers.Requests,
    summary="Single requests, newest first: outcome, tokens, and where the time went",
)
async def list_requests(
    services: ServicesOf,
    tenant: str | None = None,
    adapter: str | None = None,
    version: Annotated[int | None, Query(ge=1, le=2**31 - 1)] = None,
    key: str | None = None,
    outcome: Outcome | None = None,
    request_id: Annotated[str | None, Query(max_length=128, description="Ours or the client's.")] = None,
    slower_than: Annotated[
        float | None, Query(ge=0, le=1e9, allow_inf_nan=False, description="Seconds, over the whole request.")
    ] = None,
    start: Start = None,
    end: End = None,
    after: Annotated[int | None, Query(ge=0, le=LAST_ID, description="`next` of the page before.")] = None,
    limit: Limit = 100,
) -> dict[str, Any]:
    """Everything that ended before the call is in it."""
    await services.usage_writer.flush()
    search = RequestSearch(
        tenant, adapter, version, key, outcome, request_id, slower_than, utc(start), utc(end), after
    )
    return page_of(await requests(services.database, search, limit + 1), limit, "id")


@router.get(
    "/tenants/{tenant}/limits",
    response_model=answers.Limits,
    summary="What is used now, what is left, and when it comes back",
)
async def tenant_limits(owner: NamedTenant, services: ServicesOf) -> dict[str, Any]:
    """Of the tenant; those of a key are in its own ``/v1/me``."""
    return await limits_of(services, owner)


async def limits_of(services: Services, tenant: Tenant) -> dict[str, Any]:
    """The tenant's limits and budgets, and what waits and runs of it."""
    now = services.dispatcher.snapshot()
    found = await standing(services.completions.quotas, tenant)
    return {
        "tenant": tenant.id,
        **found,
        "queued": now.queued.get(tenant.id, 0),
        "running": now.running.get(tenant.id, 0),
    }
