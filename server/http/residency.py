"""``/admin/v1/residency``: where adapters are and who waits, once or as a stream of events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse

from adapters.model import Version
from server.errors import NotFound
from server.http import answers
from server.http.auth import ADMIN
from server.http.long_answers import long_answer
from server.http.services import Services, ServicesOf
from server.scheduling.event_log import KEPT

router = APIRouter(prefix="/admin/v1", tags=["admin"], dependencies=[ADMIN])

EVENT_STREAM = "text/event-stream"
# Seconds after which a stream says that it is still there, though nothing has changed.
_SILENCE = 15.0


@router.get(
    "/residency",
    response_model=answers.Residency,
    summary="Slots, tiers and queues as they are now; each time they change with `Accept: text/event-stream`",
)
async def residency(
    request: Request,
    services: ServicesOf,
    events: Annotated[int, Query(ge=0, le=KEPT, description="The scheduler's last so many events.")] = 0,
    every: Annotated[float, Query(ge=0.2, le=60, description="Of a stream: seconds between two looks.")] = 1,
    replica: Annotated[str | None, Query(description="Of a fleet: this replica's alone.")] = None,
) -> Response:
    """Adapters are named by tenant and ``name@version``, where the version is known."""
    streams = EVENT_STREAM in request.headers.get("accept", "")
    found = await seen(services, 0 if streams else events, replica)
    if streams:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        stream = _stream(services, every, replica, found)
        return StreamingResponse(stream, media_type=EVENT_STREAM, headers=headers)
    return await long_answer(found, services.settings.client_timeout)


async def seen(services: Services, events: int = 0, replica: str | None = None) -> dict[str, Any]:
    """The state at this moment, of this process or of a fleet's replicas; ``events`` of each, if any.

    NotFound (``replica_not_found``).
    """
    if services.peers is not None:
        return await services.peers.residency(look(services), events, replica)
    if replica is not None:
        raise NotFound(
            "This process has no replicas; leave `replica` out.", code="replica_not_found", param="replica"
        )
    found = look(services)
    return found | await services.dispatcher.recorded(events) if events else found


def look(services: Services) -> dict[str, Any]:
    """The state of this process at this moment, as JSON."""
    found = asdict(services.dispatcher.snapshot()) | {"rates": services.metrics.recent.rates()}
    for entry in (*found["slots"], *found["host"]):
        version = services.dispatcher.version(entry["version"]) if entry["version"] else None
        entry["tenant"] = version.tenant if version else None
        entry["name"] = _named(version) if version else None
        entry["number"] = version.number if version else None
    return found


def _named(version: Version) -> str:
    return f"{version.adapter}@{version.number}"


async def _stream(
    services: Services, every: float, replica: str | None, found: dict[str, Any]
) -> AsyncIterator[str]:
    """An event for each state that differs from the one before, from ``found`` on, until the server stops or
    the replica has left the fleet."""
    before, silent = "", 0.0
    while not services.draining:
        now = json.dumps(found)
        if now != before:
            before, silent = now, 0.0
            yield f"event: residency\ndata: {now}\n\n"
        elif silent >= _SILENCE:
            silent = 0.0
            yield ": still here\n\n"
        await asyncio.sleep(every)
        silent += every
        try:
            found = await seen(services, replica=replica)
        except NotFound:
            return
