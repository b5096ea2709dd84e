"""``/health``, ``/ready`` and ``/metrics``: what a load balancer and a monitor ask."""

from __future__ import annotations

import asyncio
import logging
import shutil
from dataclasses import replace
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from adapters.awake import AwakeTimeout
from adapters.store.versions import count_differing, count_of
from server import __version__
from server.http.answers import Health, Readiness
from server.http.auth import METRICS
from server.http.counted import Counted
from server.http.services import Services, ServicesOf
from server.metrics import CONTENT_TYPES, form_of

logger = logging.getLogger(__name__)
router = APIRouter(tags=["operations"])

CHECK_SECONDS = 5
# What each kind of work needs.
_SERVED = ("draining", "engine", "database", "limits")
NEEDS = {
    "inference": _SERVED,
    "writes": ("draining", "database", "writes"),
    "uploads": (*_SERVED, "writes", "store", "room"),
}


@router.head("/health", include_in_schema=False)
@router.get("/health", response_model=Health)
async def health() -> dict[str, str]:
    return {"status": "alive"}


@router.head("/ready", include_in_schema=False)
@router.get("/ready", response_model=Readiness)
async def ready(services: ServicesOf) -> JSONResponse:
    """503 only where inference cannot be served: a full disk takes no traffic from a server that answers."""
    checks = {"draining": "yes"} if services.draining else await services.ready_checks(_checks)
    body = {name: _first_problem(checks, needs) for name, needs in NEEDS.items()}
    ok = body["inference"] == "ok"
    body = {"status": "ready" if ok else "not ready", **body}
    return JSONResponse({**body, "checks": checks}, 200 if ok else 503)


def _first_problem(checks: dict[str, str], needs: tuple[str, ...]) -> str:
    """ "ok", or the name of what is missing."""
    return next((name for name in needs if checks.get(name, "ok") != "ok"), "ok")


@router.head("/metrics", dependencies=[METRICS], include_in_schema=False)
@router.get("/metrics", dependencies=[METRICS])
async def metrics(request: Request, services: ServicesOf) -> Response:
    """Text, or OpenMetrics with exemplars for who asks for it."""
    counted = await services.counted.count(partial(_count, services), CHECK_SECONDS)
    gauges = replace(
        services.dispatcher.gauges(counted.versions),
        quarantined=counted.quarantined,
        unfit=counted.unfit,
        damaged=counted.damaged,
        differing=counted.differing,
        build=_build(services),
        disk_free=(await asyncio.to_thread(shutil.disk_usage, services.settings.data_dir)).free,
        rollouts=counted.rollouts,
        usage_aside=await asyncio.to_thread(services.usage_writer.set_aside),
    )
    form = form_of(request.headers.get("accept", ""))
    return Response(services.metrics.render(gauges, form), media_type=CONTENT_TYPES[form])


async def _count(services: Services) -> Counted:
    fitness, database = services.publishing.fitness, services.database
    return Counted(
        versions=await services.publishing.catalog.count_versions(),
        quarantined=await services.publishing.quarantine.count(),
        unfit=await count_of(database, fitness.unfit, fitness.bases),
        damaged=await count_of(database, fitness.damaged),
        differing=await count_differing(database),
        rollouts=await services.judge.rows.counts(),
    )


def _build(services: Services) -> dict[str, str]:
    """What runs here, as labels."""
    engine = services.engine
    return {
        "version": __version__,
        "engine": engine.version,
        "base": engine.base.name,
        "dtype": str(engine.lora_dtype),
        "role": services.settings.role,
    }


async def _checks(services: Services) -> dict[str, str]:
    """ "ok", or the reason why not, for all that something needs."""
    parts = {
        "engine": services.engine.check,
        "database": services.database.ping,
        "writes": services.database.ping_write,
        "store": services.blobs.check,
        "room": services.intake.check_disk,
    }
    if services.redis_ledger is not None and services.settings.limits_fail == "closed":
        parts["limits"] = services.redis_ledger.check
    results = {}
    if services.dispatcher.is_restarting:
        results["engine"] = "restarting"
        del parts["engine"]
    elif services.verifying:
        results["engine"] = "verifying"
        del parts["engine"]
    elif services.dispatcher.is_silent:
        results["engine"] = "not answering"
        del parts["engine"]
    for name, check in parts.items():
        try:
            async with AwakeTimeout(CHECK_SECONDS):
                await check()
            results[name] = "ok"
        except Exception as exc:  # any reason is a reason
            results[name] = f"{type(exc).__name__}"
            logger.warning("%s is not ready: %s", name, exc)
    return results
