"""The operator's pages: what each asks of the admin API, and what its template shows."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, get_args
from urllib.parse import parse_qs, urlencode

from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from server.console import shared, views
from server.console.api import Api, Refused
from server.console.formats import flat, segment, size, when
from server.console.web import Page, PageHandler
from server.metrics import Outcome

ADMIN = "/admin/v1"
ROWS = 50
PLAYGROUND_KEY_S = 3600


async def fleet(page: Page) -> Response:
    """Readiness, slots, host memory, queues, rates, and what this server is."""
    now, server = await asyncio.gather(_now(page.api), page.api.get(f"{ADMIN}/server"))
    capacity, disk = server["capacity"], server["disk"]
    each = ", each replica" if now["replicas"] is not None else ""
    facts = [
        ("Base model", server["base"]["name"]),
        ("Version", server["version"]),
        ("Engine", server.get("engine")),
        ("Type of adapters", server["dtype"]),
        (f"Slots{each}", capacity.get("gpu_slots")),
        (f"Adapters in host memory, at most{each}", capacity.get("host_slots")),
        ("Largest rank", capacity.get("max_lora_rank")),
        ("Context, tokens", capacity.get("max_model_len")),
        ("Up since", when(server["started_at"])),
        ("Engine restarts", server["engine_restarts"]),
        ("Disk", f"{size(disk['free'])} of {size(disk['total'])} free"),
    ]
    return page.show("fleet.html", facts=facts, host_slots=capacity.get("host_slots"), **now)


async def fleet_live(page: Page) -> Response:
    """The part of it that is loaded again and again."""
    return page.show("fleet_live.html", host_slots=None, **await _now(page.api))


async def _now(api: Api) -> dict[str, Any]:
    (status, ready), residency = await asyncio.gather(api.status("/ready"), api.get(f"{ADMIN}/residency"))
    replicas = residency.get("replicas")
    return {
        "ready": status == 200,
        "checks": ready.get("checks", {}),
        "rates": residency["rates"],
        "residency": residency,
        "running": sum(residency["running"].values()),
        "waiting": sum(residency["queued"].values()),
        "replicas": replicas,
        "serving": sum(one["answered"] and one["state"] == "ready" for one in replicas or ()),
        "places": views.places(residency),
        "host_bytes": sum(entry["size_bytes"] for entry in residency["host"]),
        "queues": views.queues(residency),
    }


async def customers(page: Page) -> Response:
    """A page of customers, with their budgets."""
    asked = {"q": page.query.get("q"), "after": page.query.get("after"), "limit": ROWS}
    found = await page.api.get(f"{ADMIN}/tenants", asked)
    tenants = [(tenant, await _budgets(page.api, tenant)) for tenant in found["data"]]
    return page.show("customers.html", query=page.query, tenants=tenants, next=found["next"])


async def _budgets(api: Api, tenant: Mapping[str, Any]) -> list[views.Gauge]:
    if not tenant["budgets"]:
        return []
    standing = await api.get(f"{ADMIN}/tenants/{segment(tenant['id'])}/limits")
    return shared.gauges({**standing, "limits": []})


async def customer(page: Page) -> Response:
    """One customer: adapters, limits, keys, usage, and the last changes."""
    tenant = page.request.path_params["tenant"]
    where = f"{ADMIN}/tenants/{segment(tenant)}"
    found = await page.api.get(where)
    adapters, keys, limits, used, audit = await asyncio.gather(
        page.api.get(f"{ADMIN}/adapters", {"tenant": tenant, "limit": 200}),
        page.api.get(f"{where}/keys"),
        page.api.get(f"{where}/limits"),
        page.api.get(f"{ADMIN}/usage", {"tenant": tenant, "by": "day,adapter", "from": shared.ago(30)}),
        page.api.get(f"{ADMIN}/audit", {"tenant": tenant, "limit": 10}),
    )
    return page.show(
        "customer.html",
        tenant=found,
        adapters=shared.rows_of(adapters["data"]),
        with_tenant=False,
        keys=keys["data"],
        keys_api=f"{where.lstrip('/')}/keys",
        may_write=True,
        gauges=shared.gauges(limits),
        uncounted=shared.uncounted(limits),
        usage=views.stacked(used["data"], "day", "adapter", "total_tokens", shared.moments(30)),
        audit=[(entry, _changes(entry)) for entry in audit["data"]],
        upload_api=f"{where.lstrip('/')}/adapters",
        upload_name=None,
        link_prefix=f"/customers/{segment(tenant)}",
    )


async def adapters(page: Page) -> Response:
    """All customers' adapters, searched, a page at a time."""
    asked = {name: page.query.get(name) for name in ("q", "tier", "has", "after")} | {"limit": ROWS}
    found = await page.api.get(f"{ADMIN}/adapters", asked)
    return page.show(
        "adapters.html",
        query=page.query,
        adapters=shared.rows_of(found["data"]),
        with_tenant=True,
        next=found["next"],
        upload_api=None,
        link_prefix=None,
    )


async def adapter(page: Page) -> Response:
    """One adapter of one customer, and one of its versions in full."""
    tenant, name = page.request.path_params["tenant"], page.request.path_params["adapter"]
    where = f"{ADMIN}/tenants/{segment(tenant)}/adapters"
    found = await page.api.get(f"{where}/{segment(name)}")
    used: Any = {"data": []}
    if found["split"]:
        asked = {"tenant": tenant, "adapter": name, "by": "version,outcome", "from": shared.ago(1)}
        used = await page.api.get(f"{ADMIN}/usage", asked)
    one = f"{where}/{segment(name)}"
    rollout, refused = await shared.newest_rollout(page, one), await shared.refused_uploads(page, one)
    return shared.adapter_page(page, found, used["data"], where.lstrip("/"), rollout, refused, operator=True)


async def requests(page: Page) -> Response:
    """Single requests, searched, newest first; one of them in full."""
    names = ("tenant", "adapter", "outcome", "slower_than", "request_id", "after")
    asked = {name: page.query.get(name) for name in names} | {"limit": ROWS}
    found = await page.api.get(f"{ADMIN}/requests", asked)
    rows = [(row, views.timeline(row)) for row in found["data"]]
    one = flat(rows[0][0]) if len(rows) == 1 and page.query.get("request_id") else None
    return page.show(
        "requests.html",
        query=page.query,
        requests=rows,
        outcomes=get_args(Outcome),
        next=found["next"],
        one=one,
    )


async def usage(page: Page) -> Response:
    """What was used, as bars and sums."""
    groups = ("tenant", "adapter", "outcome", "endpoint", "version", "key")
    return await shared.usage_page(page, f"{ADMIN}/usage", groups, with_tenant=True)


async def audit(page: Page) -> Response:
    """Who changed what, before and after, newest first."""
    asked = {name: page.query.get(name) for name in ("tenant", "actor", "action", "after")} | {"limit": ROWS}
    found = await page.api.get(f"{ADMIN}/audit", asked)
    entries = [(entry, _changes(entry)) for entry in found["data"]]
    return page.show("audit.html", query=page.query, audit=entries, with_tenant=True, next=found["next"])


def _changes(entry: Mapping[str, Any]) -> list[tuple[str, str | None, str | None]]:
    """Name, before and after of the fields that differ."""
    before, after = flat(entry.get("before")), flat(entry.get("after"))
    rows = [(name, before.get(name), after.get(name)) for name in dict.fromkeys([*before, *after])]
    return [row for row in rows if row[1] != row[2]]


async def playground(page: Page) -> Response:
    """One prompt to several versions of one customer, with a key of that customer."""
    found = await page.api.get(f"{ADMIN}/tenants", {"limit": 1000})
    tenants = [tenant["id"] for tenant in found["data"]]
    tenant = page.query.get("tenant") or (tenants[0] if tenants else None)
    if tenant is None:
        return shared.playground_page(page, tenants=[], tenant=None, models=[], needs_key=False)
    where = f"{ADMIN}/tenants/{segment(tenant)}"
    owner, listed = await asyncio.gather(page.api.get(where), shared.every_adapter(page, f"{where}/adapters"))
    models = shared.models_of(listed, page.base if owner["base_allowed"] else None)
    tenants = tenants if tenant in tenants else [tenant, *tenants]
    needs_key = not await _has_key(page, tenant)
    return shared.playground_page(page, tenants=tenants, tenant=tenant, models=models, needs_key=needs_key)


async def _has_key(page: Page, tenant: str) -> bool:
    """Whether the session has a key of the customer that still opens: it may have ended, or been revoked."""
    key = page.session.playground.get(tenant)
    if key is None:
        return False
    try:
        await page.api_of(key).get("/v1/me")
    except Refused:
        del page.session.playground[tenant]
        return False
    return True


async def playground_key(page: Page) -> Response:
    """Makes a key for an hour, which asks models only, and keeps it in the session."""
    form = parse_qs((await page.request.body())[:4096].decode("utf-8", "replace"))
    sent = {name: form.get(name, [""])[0] for name in ("csrf", "tenant", "model")}
    if not hmac.compare_digest(sent["csrf"].encode(), page.session.csrf.encode()):
        raise HTTPException(403, "This form is not from this console.")
    ends = datetime.now(UTC) + timedelta(seconds=PLAYGROUND_KEY_S)
    body = {"name": "console playground", "scopes": ["inference"], "expires_at": ends.isoformat()}
    made = await page.api.post(f"{ADMIN}/tenants/{segment(sent['tenant'])}/keys", body)
    page.session.playground[sent["tenant"]] = made["key"]
    query = urlencode({"tenant": sent["tenant"], "model": sent["model"]})
    return RedirectResponse(f"{page.root}/playground?{query}", 303)


PAGES: dict[str, PageHandler] = {
    "/": fleet,
    "/fleet/live": fleet_live,
    "/customers": customers,
    "/customers/{tenant}": customer,
    "/customers/{tenant}/adapters/{adapter}": adapter,
    "/adapters": adapters,
    "/requests": requests,
    "/usage": usage,
    "/audit": audit,
    "/playground": playground,
}
FORMS: dict[str, PageHandler] = {"/playground/key": playground_key}
