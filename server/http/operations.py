"""``/health``, ``/ready`` and ``/metrics``: what a load balancer and a monitor ask."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from adapters.errors import StoreUnavailable
from adapters.store.versions import count_of
from server.http.answers import Health, Readiness
from server.http.auth import METRICS
from server.http.services import Services, ServicesOf
from server.metrics import Metrics

logger = logging.getLogger(__name__)
router = APIRouter(tags=["operations"])

CHECK_SECONDS = 5


@router.head("/health", include_in_schema=False)
@router.get("/health", response_model=Health)
async def health() -> dict[str, str]:
    return {"status": "alive"}


@router.head("/ready", include_in_schema=False)
@router.get("/ready", response_model=Readiness)
async def ready(services: ServicesOf) -> JSONResponse:
    checks = {"draining": "yes"} if services.draining else await _checks(services)
    # Without its object store a server still answers with what it has.
    failing = {f"{name}: {found}" for name, found in checks.items() if found != "ok"}
    ok = not services.draining and failing <= {f"store: {StoreUnavailable.__name__}"}
    return JSONResponse({"status": "ready" if ok else "not ready", "checks": checks}, 200 if ok else 503)


@router.head("/metrics", dependencies=[METRICS], include_in_schema=False)
@router.get("/metrics", dependencies=[METRICS])
async def metrics(services: ServicesOf) -> Response:
    versions = await services.publishing.catalog.count_versions()
    quarantined = await services.publishing.quarantine.count()
    fitness, database = services.publishing.fitness, services.database
    gauges = replace(
        services.dispatcher.gauges(versions),
        quarantined=quarantined,
        unfit=await count_of(database, fitness.unfit, fitness.bases),
        damaged=await count_of(database, fitness.damaged),
    )
    page = services.metrics.render(gauges)
    return Response(page, media_type=Metrics.content_type)


async def _checks(services: Services) -> dict[str, str]:
    """For the engine, the database, the store, and Redis if limits are there: "ok", or the reason why not."""
    parts = {
        "engine": services.engine.check,
        "database": services.database.ping,
        "store": services.blobs.check,
    }
    if services.shared is not None and services.settings.limits_fail == "closed":
        parts["limits"] = services.shared.check
    results = {}
    if services.dispatcher.is_restarting:
        results["engine"] = "restarting"
        del parts["engine"]
    for name, check in parts.items():
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await check()
            results[name] = "ok"
        except Exception as exc:  # any reason is a reason
            results[name] = f"{type(exc).__name__}"
            logger.warning("%s is not ready: %s", name, exc)
    return results
