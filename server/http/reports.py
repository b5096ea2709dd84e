"""What was changed, for operators (``/admin/v1/audit``), and what was used: for operators
(``/admin/v1/usage``), and for a customer its own (``/v1/usage``).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from adapters.database.audit import Search, entries
from adapters.database.database import Database
from server.accounts.percentiles import PERCENTS, TIMES
from server.accounts.percentiles import percentiles as percentiles_of
from server.accounts.usage import GROUPS, TOTALS, Group, Question, shown_group, usage
from server.errors import Unprocessable
from server.http.answers import Audit, Usage
from server.http.auth import ADMIN, Manager, UsageReader
from server.http.services import services_of

operators = APIRouter(prefix="/admin/v1", tags=["admin"], dependencies=[ADMIN])
customers = APIRouter(prefix="/v1", tags=["self-service"])

Start = Annotated[datetime | None, Query(alias="from", description="ISO 8601; UTC where it has no zone.")]
End = Annotated[datetime | None, Query(alias="to", description="The first moment that does not count.")]
Percentiles = Annotated[bool, Query(description="Also the times that 50, 95 and 99 % did not exceed.")]
Format = Literal["json", "csv"] | None
PAGE = 1000
# Rows count up from 1 and never get there; the document's bounds are floats, and this is exact as one.
LAST_ID = 2**53 - 1
After = Annotated[int, Query(ge=0, le=LAST_ID, description="`next` of the page before.")]
Limit = Annotated[int, Query(ge=1, le=PAGE)]
By = Annotated[str, Query(description=f"Comma-separated: {', '.join(GROUPS)}.")]


def _question(
    adapter: str | None = None,
    key: str | None = None,
    start: Start = None,
    end: End = None,
    by: By = "",
) -> Question:
    return Question(None, adapter, key, utc(start), utc(end), groups_of(by))


Questioned = Annotated[Question, Depends(_question)]


@operators.get(
    "/usage",
    response_model=Usage,
    summary="Sums of what was used, also as CSV (`Accept: text/csv` or `format=csv`)",
)
async def all_usage(
    request: Request,
    asked: Questioned,
    tenant: str | None = None,
    percentiles: Percentiles = False,
    format: Format = None,
) -> Response:
    return await answer(request, replace(asked, tenant=tenant), format, percentiles)


@operators.get(
    "/audit", response_model=Audit, summary="Changes, newest first; as JSON lines all of them, oldest first"
)
async def audit(
    request: Request,
    tenant: str | None = None,
    actor: str | None = None,
    action: str | None = None,
    start: Start = None,
    end: End = None,
    after: After = 0,
    limit: Limit = 100,
    order: Literal["newest", "oldest"] = "newest",
    format: Literal["json", "jsonl"] = "json",
) -> Response:
    database = services_of(request).database
    search = Search(tenant, actor, action, utc(start), utc(end), after)
    if format == "jsonl":
        return StreamingResponse(_lines(database, search), media_type="application/jsonl")
    found = await entries(database, search, limit + 1, newest=order == "newest")
    return JSONResponse(page_of(found, limit, "id"))


@customers.get("/audit", response_model=Audit, summary="Changes of the customer's own things, newest first")
async def own_audit(
    request: Request,
    owner: Manager,
    start: Start = None,
    end: End = None,
    after: After = 0,
    limit: Limit = 100,
) -> dict[str, Any]:
    first = max(utc(start) or owner.created_at, owner.created_at)
    search = Search(owner.id, start=first, end=utc(end), after=after)
    found = await entries(services_of(request).database, search, limit + 1, newest=True)
    # Who of the operator's people it was is not the customer's to know.
    told = [e if e["actor"].startswith(("key ", "member ")) else e | {"actor": "operator"} for e in found]
    return page_of(told, limit, "id")


def page_of(found: list[dict[str, Any]], limit: int, cursor: str) -> dict[str, Any]:
    """The first ``limit`` of ``found``; ``next`` is the last one's ``cursor`` where there are more."""
    page = found[:limit]
    return {"object": "list", "data": page, "next": page[-1][cursor] if len(found) > limit else None}


async def _lines(database: Database, search: Search) -> AsyncIterator[str]:
    while page := await entries(database, search, PAGE):
        yield "".join(f"{json.dumps(entry)}\n" for entry in page)
        search = replace(search, after=page[-1]["id"])


@customers.get(
    "/usage", response_model=Usage, summary="The customer's own; needs a key with the scope `usage:read`"
)
async def own_usage(
    request: Request,
    reader: UsageReader,
    asked: Questioned,
    percentiles: Percentiles = False,
    format: Format = None,
) -> Response:
    # What a tenant of the same name used, which is no more, is none of this one's business.
    first = max(asked.start or reader.created_at, reader.created_at)
    return await answer(request, replace(asked, tenant=reader.id, start=first), format, percentiles)


async def answer(request: Request, question: Question, format: str | None, timed: bool = False) -> Response:
    """Everything that ended before the call is in it; ``timed`` adds percentiles of its times."""
    services = services_of(request)
    await services.usage_writer.flush()
    rows = await usage(services.database, question)
    names = [*question.by, *TOTALS]
    if timed:
        times = {
            tuple(map(shown_group, question.by, key)): found
            for key, found in (await percentiles_of(services.database, question)).items()
        }
        none = dict.fromkeys(f"{name}_p{percent}" for name in TIMES for percent in PERCENTS)
        names += none
        rows = [row | none | times.get(tuple(row[name] for name in question.by), {}) for row in rows]
    if format == "csv" or (format is None and "text/csv" in request.headers.get("accept", "")):
        return Response(_csv(rows, names), media_type="text/csv")
    return JSONResponse({"object": "list", "data": rows})


def groups_of(by: str) -> tuple[Group, ...]:
    """Unprocessable for one that there is not."""
    names = [name.strip() for name in by.split(",") if name.strip()]
    groups = tuple(group for name in dict.fromkeys(names) for group in GROUPS if group == name)
    if len(groups) < len(names):
        raise Unprocessable(f"`by` takes {', '.join(GROUPS)}, each once, with commas between.", param="by")
    return groups


def utc(time: datetime | None) -> datetime | None:
    """``time``, which is in UTC where it has no zone."""
    return time.replace(tzinfo=UTC) if time is not None and time.tzinfo is None else time


def _csv(rows: list[dict[str, Any]], names: list[str]) -> str:
    """With the heads of all columns also where there are no rows."""
    file = io.StringIO()
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
