"""The way into the console, and what holds it apart from other sites, other customers and the open net."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.accounts.terms import TenantLimits
from server.demo.run import console_path
from tests.support import tiny
from tests.support.site import ADMIN_KEY, SERVICE_KEY, Site, bearer
from tests.support.tiny import fake_site

OPERATOR = (
    "/", "/fleet/live", "/customers", "/customers/acme", "/customers/acme/adapters/support", "/adapters",
    "/requests", "/usage", "/audit", "/playground",
)  # fmt: skip
CUSTOMER = ("/", "/adapters", "/adapters/support", "/keys", "/usage", "/playground")
EVERY_SCOPE = ["inference", "adapters:write", "usage:read", "keys:write"]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path) as site:
        yield site


async def full_key(site: Site, tenant: str) -> str:
    """A new tenant with an adapter, and its key that may do everything."""
    await site.tenant(tenant, {"support": tiny.adapter(1)})
    made = await site.admin.post(f"/admin/v1/tenants/{tenant}/keys", json={"scopes": EVERY_SCOPE})
    return str(made.json()["key"])


@asynccontextmanager
async def browser(site: Site, key: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=site.url, timeout=60) as client:
        if key is not None:
            entered = await client.post("/console/sign-in", data={"key": key})
            assert (entered.status_code, entered.headers["location"]) == (303, "/console/")
        yield client


async def csrf(client: httpx.AsyncClient) -> dict[str, str]:
    found = re.search('data-csrf="([^"]+)"', (await client.get("/console/")).text)
    assert found is not None
    return {"X-CSRF-Token": found[1]}


async def test_everybody_is_led_to_the_sign_in_page_and_back(site: Site) -> None:
    async with browser(site) as client:
        for path in ("/", "/ui", "/console"):
            led = await client.get(path)
            assert (led.status_code, led.headers["location"]) == (307, "/console/")
        led = await client.get("/console/usage?days=30")
        assert led.headers["location"] == "/console/sign-in?next=%2Fconsole%2Fusage%3Fdays%3D30"
        page = await client.get(led.headers["location"])
        assert "<label>Key <input" in page.text
        entered = await client.post(led.headers["location"], data={"key": ADMIN_KEY})
        assert entered.headers["location"] == "/console/usage?days=30"


async def test_the_cookie_is_for_this_console_alone(site: Site) -> None:
    async with browser(site) as client:
        entered = await client.post("/console/sign-in", data={"key": f" {ADMIN_KEY}\n"})
        cookie = entered.headers["set-cookie"]
        for part in ("HttpOnly", "SameSite=strict", "Path=/console", "Max-Age=43200"):
            assert part in cookie
        assert ADMIN_KEY not in cookie


@pytest.mark.parametrize("key", ["nonsense", "", "\x00", "schlüssel", SERVICE_KEY, "a b"])
async def test_other_keys_do_not_open_it(site: Site, key: str) -> None:
    async with browser(site) as client:
        refused = await client.post("/console/sign-in", data={"key": key})
        assert refused.status_code in (400, 401, 403)
        assert 'role="alert"' in refused.text
        assert "set-cookie" not in refused.headers


async def test_wrong_keys_are_slowed_by_address_as_those_of_the_api(tmp_path: Path) -> None:
    async with fake_site(tmp_path, auth_failures=3) as site, browser(site) as client:
        answers = [await client.post("/console/sign-in", data={"key": f"wrong-{n}"}) for n in range(5)]
        assert [answer.status_code for answer in answers] == [401, 401, 401, 429, 429]


@pytest.mark.parametrize(
    "after",
    [
        "https://evil.example/",
        "//evil.example",
        "/console//evil.example",
        "/\\evil.example",
        "/v1/models",
        "/console/sign-out",
        "",
    ],
)
async def test_signing_in_leads_to_no_other_place(site: Site, after: str) -> None:
    async with browser(site) as client:
        entered = await client.post("/console/sign-in", params={"next": after}, data={"key": ADMIN_KEY})
        assert (entered.status_code, entered.headers["location"]) == (303, "/console/")


async def test_every_page_is_there_and_says_what_may_run_in_it(site: Site) -> None:
    key = await full_key(site, "acme")
    await site.chat(key, "hi", model="support")
    for who, paths in ((ADMIN_KEY, OPERATOR), (key, CUSTOMER)):
        async with browser(site, who) as client:
            for path in paths:
                page = await client.get(f"/console{path}")
                assert page.status_code == 200, f"{path}: {page.text}"
                policy = page.headers["content-security-policy"]
                assert "default-src 'none'" in policy
                assert "unsafe" not in policy
                assert page.headers["cache-control"] == "no-store"
                assert who not in page.text
                assert not re.search(r"\son[a-z]+=|\sstyle=|<script>|<style", page.text), path
                foreign = re.findall(r'(?:src|href|action)="((?:https?:)?//[^"]+)', page.text)
                assert foreign == []


async def test_limits_of_every_kind_are_shown_to_operator_and_customer(site: Site) -> None:
    """Those of which something is used up as gauges, the others by their value."""
    counted = {"requests_per_minute": 1001, "tokens_per_minute": 1002}
    others = {"requests_at_once": 1003, "max_tokens": 1004, "adapters": ["first", "second"], "base": False}
    of_tenant = {"max_adapters": 1005, "max_storage_bytes": 3 << 20}
    key = await site.tenant("acme", limits={"max_adapters": 1005})
    pages = [(ADMIN_KEY, "/customers/acme"), (key, "/")]
    for limits in ({"max_adapters": 1005}, counted | others | of_tenant):
        assert set(limits) <= set(TenantLimits.model_fields)
        changed = await site.admin.patch("/admin/v1/tenants/acme", json={"limits": limits})
        assert changed.status_code == 200, changed.text
        for who, path in pages:
            async with browser(site, who) as client:
                page = await client.get(f"/console{path}")
            assert page.status_code == 200, f"{limits}: {page.text}"
            assert "Nothing limits this customer" not in page.text
            assert "<dt>max adapters</dt><dd>1,005</dd>" in page.text
    assert set(limits) == set(TenantLimits.model_fields)
    for shown in (
        "0 of 1,001", "0 of 1,002", "<dd>1,003</dd>", "<dd>1,004</dd>", "<dd>first, second</dd>",
        "<dt>base</dt><dd>no</dd>", "<dd>3.0 MiB</dd>",
    ):  # fmt: skip
        assert shown in page.text, shown
    own = {"limits": {"max_tokens": 7}}
    made = await site.admin.post("/admin/v1/tenants/acme/keys", json=own)
    async with browser(site, made.json()["key"]) as client:
        assert "<dt>max tokens of this key</dt><dd>7</dd>" in (await client.get("/console/")).text


async def test_static_files_are_ours_and_can_be_kept(site: Site) -> None:
    for name, kind in (("console.js", "javascript"), ("console.css", "text/css"), ("icon.svg", "image/svg")):
        file = await site.http.get(f"/console/static/{name}")
        assert file.status_code == 200
        assert kind in file.headers["content-type"]
        again = await site.http.get(
            f"/console/static/{name}", headers={"If-None-Match": file.headers["etag"]}
        )
        assert again.status_code == 304
    assert (await site.http.get("/console/static/../web.py")).status_code == 404
    assert (await site.http.get("/console/static/%2e%2e/web.py")).status_code == 404


async def test_a_customer_sees_its_own_and_nothing_else(site: Site) -> None:
    key = await full_key(site, "acme")
    await full_key(site, "globex")
    async with browser(site, key) as client:
        for path in CUSTOMER:
            assert "globex" not in (await client.get(f"/console{path}")).text
        for path in ("/customers", "/customers/globex", "/fleet/live", "/requests", "/audit"):
            assert (await client.get(f"/console{path}")).status_code == 404, path
        for path in ("admin/v1/tenants", "admin/v1/residency", "admin/v1/tenants/globex/keys"):
            assert (await client.get(f"/console/api/{path}")).status_code == 403, path


async def test_a_key_without_a_scope_is_told_so(site: Site) -> None:
    key = await site.tenant("acme", {"support": tiny.adapter(1)})
    async with browser(site, key) as client:
        assert (await client.get("/console/")).status_code == 200
        for path in ("/adapters", "/usage"):
            refused = await client.get(f"/console{path}")
            assert refused.status_code == 403
            assert "does not have the scope" in refused.text
        assert "does not have the scope" in (await client.get("/console/keys")).text


async def test_changes_need_the_token_of_the_page_and_the_same_site(site: Site) -> None:
    async with browser(site, ADMIN_KEY) as client:
        token = await csrf(client)
        new: dict[str, Any] = {"json": {"id": "acme"}}
        for headers in (
            {},
            {"X-CSRF-Token": "x" * 43},
            {**token, "Origin": "https://evil.example"},
            {**token, "Sec-Fetch-Site": "cross-site"},
        ):
            assert (
                await client.post("/console/api/admin/v1/tenants", **new, headers=headers)
            ).status_code == 403
        assert (await site.admin.get("/admin/v1/tenants/acme")).status_code == 404
        made = await client.post(
            "/console/api/admin/v1/tenants", **new, headers={**token, "Origin": site.url}
        )
        assert made.status_code == 201
        assert len(made.headers.get_list("x-request-id")) == 1
        for path in ("health", "metrics", "openapi.json", "console/usage", "../admin/v1/tenants", ""):
            assert (await client.get(f"/console/api/{path}")).status_code == 404, path
    async with browser(site) as nobody:
        assert (await nobody.get("/console/api/admin/v1/tenants")).status_code == 401
        own = {"Authorization": f"Bearer {ADMIN_KEY}"}
        assert (await nobody.get("/console/api/admin/v1/tenants", headers=own)).status_code == 401


async def test_a_form_of_another_site_signs_nobody_in_or_out(site: Site) -> None:
    async with browser(site) as client:
        foreign = {"Origin": "https://evil.example"}
        refused = await client.post("/console/sign-in", data={"key": ADMIN_KEY}, headers=foreign)
        assert (refused.status_code, "set-cookie" in refused.headers) == (403, False)
    async with browser(site, ADMIN_KEY) as client:
        assert (await client.post("/console/sign-out", data={"csrf": "x"})).status_code == 403
        assert (await client.get("/console/usage")).status_code == 200
        token = (await csrf(client))["X-CSRF-Token"]
        assert (await client.post("/console/sign-out", data={"csrf": token})).status_code == 303
        assert (await client.get("/console/usage")).status_code == 303


async def test_a_revoked_key_ends_its_session(site: Site) -> None:
    key = await full_key(site, "acme")
    async with browser(site, key) as client:
        (found,) = [
            k
            for k in (await site.admin.get("/admin/v1/tenants/acme/keys")).json()["data"]
            if len(k["scopes"]) > 1
        ]
        assert (await client.get("/console/")).status_code == 200
        assert (await site.admin.delete(f"/admin/v1/tenants/acme/keys/{found['id']}")).status_code == 204
        led = await client.get("/console/")
        assert (led.status_code, "reason=key" in led.headers["location"]) == (303, True)
        assert "session is over" in (await client.get(led.headers["location"])).text
        assert (await client.get("/console/static/console.css")).status_code == 200


async def test_a_ticket_signs_in_once(site: Site) -> None:
    made = await site.http.post("/console/ticket", headers=bearer(ADMIN_KEY))
    assert made.status_code == 201
    async with browser(site) as client:
        entered = await client.get(made.json()["path"])
        assert (entered.status_code, entered.headers["location"]) == (303, "/console/")
        assert "Fleet" in (await client.get("/console/")).text
    async with browser(site) as client:
        again = await client.get(made.json()["path"])
        assert (again.status_code, "set-cookie" in again.headers) == (401, False)
    path = await console_path(site.http, ADMIN_KEY)  # which the demo prints
    assert (await site.http.get(path)).headers["location"] == "/console/"
    for headers in ({}, bearer("nonsense"), bearer(SERVICE_KEY)):
        assert (await site.http.post("/console/ticket", headers=headers)).status_code in (400, 401, 403)


async def test_the_playground_asks_with_a_key_of_the_customer(site: Site) -> None:
    await full_key(site, "acme")
    async with browser(site, ADMIN_KEY) as client:
        token = await csrf(client)
        chat = {"model": "support", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        headers = token | {"X-Playground": "acme"}
        assert "Make a key for an hour" in (await client.get("/console/playground?tenant=acme")).text
        refused = await client.post("/console/api/v1/chat/completions", json=chat, headers=headers)
        assert refused.status_code == 403
        form = {"csrf": token["X-CSRF-Token"], "tenant": "acme", "model": "support@1"}
        made = await client.post("/console/playground/key", data=form)
        assert made.headers["location"] == "/console/playground?tenant=acme&model=support%401"
        page = await client.get(made.headers["location"])
        assert "<option selected>support@1</option>" in page.text
        answered = await client.post("/console/api/v1/chat/completions", json=chat, headers=headers)
        assert answered.status_code == 200
        keys = (await site.admin.get("/admin/v1/tenants/acme/keys")).json()["data"]
        (temporary,) = [key for key in keys if key["name"] == "console playground"]
        assert temporary["scopes"] == ["inference"]
        assert temporary["expires_at"] is not None
        bad = await client.post("/console/playground/key", data=form | {"csrf": "x"})
        assert bad.status_code == 403
        assert "Make a key for an hour" not in (await client.get("/console/playground?tenant=acme")).text
        await site.admin.delete(f"/admin/v1/tenants/acme/keys/{temporary['id']}")
        page = await client.get("/console/playground?tenant=acme")
        assert "Make a key for an hour" in page.text, "one that has ended is not kept"


async def test_a_setting_takes_it_away(tmp_path: Path) -> None:
    async with fake_site(tmp_path, console=False) as site:
        for path in ("/console", "/console/", "/console/sign-in", "/ui", "/"):
            assert (await site.http.get(path)).status_code == 404


async def test_an_adapters_page_shows_its_rollout(site: Site) -> None:
    key = await full_key(site, "acme")
    await site.upload("acme", "support", tiny.adapter(2))
    adapter = "/admin/v1/tenants/acme/adapters/support"
    await site.admin.patch(adapter, json={"live": 1})
    pages = {key: "/console/adapters/support", ADMIN_KEY: "/console/customers/acme/adapters/support"}
    for who, path in pages.items():
        async with browser(site, who) as client:
            assert "Roll it out" in (await client.get(path)).text
            made = (await site.admin.post(f"{adapter}/rollouts", json={"version": 2})).json()
            one = f"{adapter}/rollouts/{made['id']}"
            await site.admin.patch(one, json={"action": "forward"})
            shown = (await client.get(path)).text
            assert "version 2 beside 1, " in shown
            assert ("Pause" in shown, "Roll back" in shown, "Divide requests" in shown) == (True, True, False)
            assert 'data-refresh="?part=rollout"' in shown
            part = (await client.get(f"{path}?part=rollout")).text
            assert ("version 2 beside 1, " in part, "Pause" in part, "<html" in part) == (True, True, False)
            await site.admin.patch(one, json={"action": "roll_back"})
            shown = (await client.get(path)).text
            assert "rolled back" in shown
            assert "Divide requests" in shown
            assert "data-refresh" not in shown


async def test_what_is_shown_is_escaped(site: Site) -> None:
    name = "<img src=x onerror=alert(1)>"
    await site.tenant("acme", name=name)
    async with browser(site, ADMIN_KEY) as client:
        for path in ("/customers", "/customers/acme", "/audit"):
            text = (await client.get(f"/console{path}")).text
            assert "<img" not in text, path
            assert "&lt;img" in text, path
        refused = await client.get("/console/requests?tenant=%22%3E%3Cscript%3E")
        assert "<script>" not in refused.text


async def test_usage_of_very_many_is_still_a_page(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.accounts.usage.MAX_GROUPS", 1)
    for tenant in ("acme", "globex"):
        await site.chat(await full_key(site, tenant), "hi", model="support")
    async with browser(site, ADMIN_KEY) as client:
        page = await client.get("/console/usage")
        assert page.status_code == 200
        assert "more than fits a page" in page.text
        assert "figure" in page.text
