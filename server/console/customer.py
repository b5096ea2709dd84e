"""A customer's pages: its own adapters, keys, usage, and a place to try them, with its own key."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.responses import Response

from server.console import shared, views
from server.console.api import Refused
from server.console.formats import segment, when
from server.console.web import Page, PageHandler


async def home(page: Page) -> Response:
    """What is left, what was used, and what this key may."""
    me, (status, _), adapters = await asyncio.gather(
        page.api.get("/v1/me"), page.api.status("/ready"), _adapters(page)
    )
    used: list[dict[str, Any]] = []
    note = ""
    try:
        asked = {"by": "day,adapter", "from": shared.ago(30)}
        used = (await page.api.get("/v1/usage", asked))["data"]
    except Refused as exc:
        note = exc.message
    today = [row for row in used if row["day"][:10] == shared.ago(1)[:10]]
    key = me["key"] or {}
    return page.show(
        "home.html",
        ready=status == 200,
        adapter_count=None if adapters is None else len(adapters),
        tokens_today=None if note else sum(row["total_tokens"] for row in today),
        requests_today=None if note else sum(row["requests"] for row in today),
        gauges=shared.gauges(me),
        uncounted=shared.uncounted(me),
        usage=views.stacked(used, "day", "adapter", "total_tokens", shared.moments(30)),
        usage_note=note,
        key_facts=[
            ("Name", key.get("name") or "without a name"),
            ("May", ", ".join(me["scopes"])),
            ("Made", when(key.get("created_at"))),
            ("Expires", when(key.get("expires_at"))),
        ],
    )


async def _adapters(page: Page) -> list[dict[str, Any]] | None:
    """The customer's adapters; None where this key may not see them."""
    try:
        found = await shared.every_adapter(page, "/v1/adapters")
    except Refused as exc:
        if exc.code != "scope_missing":
            raise
        return None
    return found


async def adapters(page: Page) -> Response:
    """The customer's adapters."""
    q = page.query.get("q", "").lower()
    listed = [
        adapter
        for adapter in await shared.every_adapter(page, "/v1/adapters")
        if q in adapter["name"].lower()
    ]
    return page.show(
        "adapters.html",
        query=page.query,
        adapters=shared.rows_of(listed),
        with_tenant=False,
        next=None,
        upload_api="v1/adapters",
        upload_name=None,
        link_prefix="",
    )


async def adapter(page: Page) -> Response:
    """One adapter, and one of its versions in full."""
    name = page.request.path_params["adapter"]
    found = await page.api.get(f"/v1/adapters/{segment(name)}")
    used: list[dict[str, Any]] = []
    if found["split"]:
        try:
            asked = {"adapter": name, "by": "version,outcome", "from": shared.ago(1)}
            used = (await page.api.get("/v1/usage", asked))["data"]
        except Refused as exc:
            if exc.code != "scope_missing":
                raise
    one = f"/v1/adapters/{segment(name)}"
    rollout, refused = await shared.newest_rollout(page, one), await shared.refused_uploads(page, one)
    return shared.adapter_page(page, found, used, "v1/adapters", rollout, refused, operator=False)


async def keys(page: Page) -> Response:
    """The customer's keys; making and revoking them needs the scope for it."""
    me = await page.api.get("/v1/me")
    try:
        found = await page.api.get("/v1/keys")
    except Refused as exc:
        if exc.code != "scope_missing":
            raise
        return page.show("keys.html", note=exc.message)
    may_write = "keys:write" in me["scopes"]
    return page.show("keys.html", note="", keys=found["data"], keys_api="v1/keys", may_write=may_write)


async def usage(page: Page) -> Response:
    """What the customer used, as bars and sums."""
    groups = ("adapter", "outcome", "endpoint", "version", "key")
    return await shared.usage_page(page, "/v1/usage", groups, with_tenant=False)


async def playground(page: Page) -> Response:
    """One prompt to the base and to versions, side by side."""
    me, listed = await asyncio.gather(page.api.get("/v1/me"), _adapters(page))
    if listed is None:
        named = await page.api.get("/v1/models")
        models = [model["id"] for model in named["data"]]
    else:
        models = shared.models_of(listed, page.base if me["base"]["allowed"] else None)
    note = "" if "inference" in me["scopes"] else "This key does not have the scope `inference`."
    models = [] if note else models
    tenant = me["tenant"]["id"]
    return shared.playground_page(
        page, tenants=None, tenant=tenant, models=models, needs_key=False, note=note
    )


PAGES: dict[str, PageHandler] = {
    "/": home,
    "/adapters": adapters,
    "/adapters/{adapter}": adapter,
    "/keys": keys,
    "/usage": usage,
    "/playground": playground,
}
