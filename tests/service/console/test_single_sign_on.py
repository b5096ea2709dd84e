"""People sign in to the console by a real provider of identities, and are in the audit by name."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html import unescape
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.console.test_sign_in import csrf
from tests.support import tiny
from tests.support.browser import browsing
from tests.support.ports import unused
from tests.support.provider import CLIENT, consent, provider
from tests.support.site import ADMIN_KEY, Site
from tests.support.tiny import fake_site

PEOPLE = {
    "maria": {"email": "maria@example.org", "email_verified": True, "groups": ["staff", "loraplex-admins"]},
    "vera": {"email": "vera@example.org", "email_verified": True, "groups": ["staff"]},
    "carl": {"email": "carl@acme.example", "email_verified": True, "customer": "acme"},
    "otto": {"email": "otto@nowhere.example", "email_verified": True, "customer": "nowhere"},
    "eve": {"email": "maria@example.org", "email_verified": False, "groups": ["loraplex-admins"]},
    "nina": {"email": "nina@example.org", "email_verified": True},
}
RULES: dict[str, Any] = {
    **CLIENT,
    "oidc_access": {"loraplex-admins": "admin", "staff": "viewer"},
    "oidc_tenant_claim": "customer",
    "oidc_domains": ("example.org", "acme.example", "nowhere.example"),
    "oidc_label": "Example login",
}


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is busy a provider that is well may take its time."""
    monkeypatch.setattr("server.console.oidc.TIMEOUT_S", 60.0)


@asynccontextmanager
async def joined(folder: Path, **changes: Any) -> AsyncIterator[Site]:
    """A server, and the provider that it knows."""
    port = unused()
    async with (
        fake_site(folder, oidc_issuer=f"http://localhost:{port}", **(RULES | changes)) as site,
        provider(port, f"{site.url}/console", PEOPLE),
    ):
        yield site


def browser(site: Site) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=site.url, timeout=60)


async def sign_in(client: httpx.AsyncClient, login: str) -> httpx.Response:
    page = await client.get("/console/sign-in")
    assert "Continue with Example login" in page.text
    begun = await client.get("/console/oidc", params={"next": "/console/usage"})
    assert "code_challenge_method=S256" in begun.headers["location"]
    return await consent(client, begun, login)


async def test_people_are_what_their_claims_make_them_and_the_audit_names_them(tmp_path: Path) -> None:
    async with joined(tmp_path) as site:
        await site.tenant("acme", {"a": tiny.adapter(1)})
        async with browser(site) as client:
            entered = await sign_in(client, "maria")
            assert entered.status_code == 200, entered.text
            assert 'content="0;url=/console/usage"' in entered.text
            assert "<strong>maria@example.org</strong>" in (await client.get("/console/")).text
            made = await client.post(
                "/console/api/admin/v1/tenants", json={"id": "new"}, headers=await csrf(client)
            )
            assert made.status_code == 201
            (entry,) = (await site.admin.get("/admin/v1/audit?actor=person maria@example.org")).json()["data"]
            assert (entry["action"], entry["tenant"]) == ("tenant.create", "new")
            await sign_out(client)
        async with browser(site) as client:
            await sign_in(client, "vera")
            refused = await client.post(
                "/console/api/admin/v1/tenants", json={"id": "newer"}, headers=await csrf(client)
            )
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "role_missing")
        async with browser(site) as client:
            await sign_in(client, "carl")
            home = (await client.get("/console/")).text
            assert "<strong>carl@acme.example</strong>" in home
            assert "acme · " in home
            assert (await client.get("/console/customers")).status_code == 404
            changed = await client.patch(
                "/console/api/v1/adapters/a", json={"default": True}, headers=await csrf(client)
            )
            assert changed.status_code == 200, changed.text
            shown = (await client.get("/console/api/v1/audit")).json()["data"]
        (entry,) = (await site.admin.get("/admin/v1/audit?actor=member carl@acme.example")).json()["data"]
        assert entry["actor"] in {row["actor"] for row in shown}
        assert (entry["action"], entry["tenant"]) == ("adapter.update", "acme")


async def sign_out(client: httpx.AsyncClient) -> None:
    """Here and at the provider, and a cookie that somebody kept is worth nothing."""
    kept = httpx.Cookies(client.cookies)
    token = (await csrf(client))["X-CSRF-Token"]
    left = await client.post("/console/sign-out", data={"csrf": token})
    way_out = re.search(r'content="0;url=([^"]+)"', left.text)
    assert way_out is not None
    asked = await client.get(unescape(way_out[1]))
    assert (asked.status_code, "sign-out" in asked.text) == (200, True), asked.text
    client.cookies = kept
    assert (await client.get("/console/usage")).status_code == 303


@pytest.fixture
async def refusing(tmp_path: Path) -> AsyncIterator[Site]:
    async with joined(tmp_path) as site:
        yield site


async def test_who_is_not_let_in_is_told_why(refusing: Site) -> None:
    for login, status, why in (
        ("eve", 403, "no verified e-mail address"),
        ("nina", 403, "nothing that it belongs to has been let in"),
        ("otto", 401, "is not known here"),
    ):
        async with browser(refusing) as client:
            refused = await sign_in(client, login)
            assert (refused.status_code, why in refused.text) == (status, True), refused.text
            assert 'role="alert"' in refused.text
            assert (await client.get("/console/")).status_code == 303
    async with browser(refusing) as client:
        begun = await client.get("/console/oidc")
        state = re.search(r"state=([^&]+)", begun.headers["location"])
        assert state is not None
        no = {"error": "access_denied", "error_description": "<b>No</b>", "state": state[1]}
        denied = await client.get("/console/oidc/callback", params=no)
        assert (denied.status_code, "&lt;b&gt;No" in denied.text) == (401, True)


async def test_only_the_browser_that_began_comes_in_and_only_once(refusing: Site) -> None:
    async with browser(refusing) as client, browser(refusing) as other:
        begun = await client.get("/console/oidc")
        cookie = begun.headers["set-cookie"]
        for part in ("HttpOnly", "SameSite=lax", "Path=/console/oidc", "Max-Age=600"):
            assert part in cookie
        # As far as the way back, which another browser takes: a code that somebody was led to.
        back = await _led_back(client, begun)
        stolen = await other.get(back)
        assert (stolen.status_code, "not begun in this browser" in stolen.text) == (401, True)
        await other.get("/console/oidc")
        stolen = await other.get(back)
        assert (stolen.status_code, "not begun in this browser" in stolen.text) == (401, True)
        kept = httpx.Cookies(client.cookies)
        assert (await client.get(back)).status_code == 200
        client.cookies = kept
        again = await client.get(back)
        assert (again.status_code, "Sign in again" in again.text) == (401, True)


async def _led_back(client: httpx.AsyncClient, page: httpx.Response) -> str:
    """The address that the provider leads to, which has not been asked yet."""
    found: list[str] = []

    async def note(answer: httpx.Response) -> None:
        if "/oidc/callback" in answer.headers.get("location", ""):
            found.append(answer.headers["location"])
            answer.headers["location"] = "/health"

    client.event_hooks["response"] = [note]
    await consent(client, page, "maria")
    client.event_hooks["response"] = []
    return found[0]


async def test_keys_open_the_console_while_the_provider_is_away(tmp_path: Path) -> None:
    port = unused()
    async with (
        fake_site(tmp_path, oidc_issuer=f"http://localhost:{port}", **RULES) as site,
        browser(site) as client,
    ):
        away = await client.get("/console/oidc")
        assert (away.status_code, "does not answer" in away.text) == (502, True)
        entered = await client.post("/console/sign-in", data={"key": ADMIN_KEY})
        assert entered.status_code == 303
        async with provider(port, f"{site.url}/console", PEOPLE):
            assert (await client.get("/console/oidc")).status_code == 303


async def test_without_a_provider_there_is_no_such_way(tmp_path: Path) -> None:
    async with fake_site(tmp_path) as site, browser(site) as client:
        assert "Continue with" not in (await client.get("/console/sign-in")).text
        assert (await client.get("/console/oidc")).status_code == 404


async def test_a_real_browser_comes_back_signed_in_from_another_site(tmp_path: Path) -> None:
    # The provider's own pages ask for a font from elsewhere, which the test withholds.
    elsewhere = ("http://localhost:", "https://fonts.googleapis.com/")
    async with joined(tmp_path) as site, browsing(site.url, elsewhere=elsewhere) as page:
        await page.route("https://**", lambda route: route.abort())
        await page.goto("/console/audit")
        await page.get_by_role("link", name="Continue with Example login").click()
        await page.get_by_placeholder("Enter any login").fill("maria")
        await page.get_by_placeholder("and password").fill("any")
        await page.get_by_role("button", name="Sign-in").click()
        await page.get_by_role("button", name="Continue").click()
        await page.get_by_role("heading", name="Audit").wait_for()
        await page.get_by_text("maria@example.org").wait_for()
        await page.get_by_role("button", name="Sign out").click()
        await page.get_by_role("button", name="Yes, sign me out").click()
        await page.get_by_label("Key").wait_for()
        assert page.url.startswith(f"{site.url}/console/sign-in")
