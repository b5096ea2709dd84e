"""People who operate: keys of their own, roles, and their names in the audit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from sqlalchemy import update

from adapters.database.rows import AdminKeyRow
from tests.service.http.test_api import error
from tests.support.site import ADMIN_KEY, Site, bearer
from tests.support.tiny import fake_site

ADMIN = "/admin/v1"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path) as site:
        yield site


async def person(site: Site, name: str, role: str, **fields: object) -> httpx.AsyncClient:
    made = await site.admin.post(f"{ADMIN}/people", json={"name": name, "role": role, **fields})
    assert made.status_code == 201, made.text
    return httpx.AsyncClient(base_url=site.url, headers=bearer(made.json()["key"]), timeout=60)


async def test_roles_may_more_and_more(site: Site) -> None:
    async with (
        await person(site, "vera", "viewer") as viewer,
        await person(site, "otto", "operator") as operator,
        await person(site, "anna", "admin") as admin,
    ):
        for client in (viewer, operator, admin):
            for path in ("/tenants", "/server", "/requests", "/audit", "/residency"):
                assert (await client.get(f"{ADMIN}{path}")).status_code == 200
        error(await viewer.post(f"{ADMIN}/tenants", json={"id": "acme"}), 403, "role_missing")
        assert (await operator.post(f"{ADMIN}/tenants", json={"id": "acme"})).status_code == 201
        error(await viewer.patch(f"{ADMIN}/tenants/acme", json={"weight": 2}), 403, "role_missing")
        for client in (viewer, operator):
            error(await client.get(f"{ADMIN}/people"), 403, "role_missing")
            error(await client.post(f"{ADMIN}/people", json={"name": "eve"}), 403, "role_missing")
        assert [one["name"] for one in (await admin.get(f"{ADMIN}/people")).json()["data"]] == [
            "anna", "otto", "vera"
        ]  # fmt: skip
        told = (await viewer.get(f"{ADMIN}/me")).json()
        assert (told["name"], told["role"]) == ("vera", "viewer")
        error(await viewer.get("/v1/models"), 403, "permission_denied")
    told = (await site.admin.get(f"{ADMIN}/me")).json()
    assert (told["id"], told["name"], told["role"]) == (None, "admin", "admin")


async def test_the_audit_names_them(site: Site) -> None:
    async with await person(site, "otto", "operator") as operator:
        await operator.post(f"{ADMIN}/tenants", json={"id": "acme"})
    made, created = (await site.admin.get(f"{ADMIN}/audit")).json()["data"]
    assert (made["action"], made["actor"]) == ("tenant.create", "admin otto")
    assert (created["action"], created["actor"], created["target"]) == ("person.create", "admin", "otto")
    assert "lp-admin" not in str(created)


async def test_a_key_is_shown_once_ends_and_is_removed(site: Site) -> None:
    async with await person(site, "otto", "operator") as operator:
        (shown,) = (await site.admin.get(f"{ADMIN}/people")).json()["data"]
        assert "key" not in shown
        await site.services.usage_writer.write_used()
        assert (await operator.get(f"{ADMIN}/server")).status_code == 200
        await site.services.usage_writer.write_used()
        (shown,) = (await site.admin.get(f"{ADMIN}/people")).json()["data"]
        assert shown["last_used_at"]
        async with site.services.database.write() as session:
            ended = datetime.now(UTC) - timedelta(seconds=1)
            await session.execute(update(AdminKeyRow).values(expires_at=ended))
        error(await operator.get(f"{ADMIN}/server"), 401, "expired_api_key")
        assert (await site.admin.delete(f"{ADMIN}/people/{shown['id']}")).status_code == 204
        error(await operator.get(f"{ADMIN}/server"), 401, "invalid_api_key")
        error(await site.admin.delete(f"{ADMIN}/people/{shown['id']}"), 404, "not_found")
        error(await site.admin.delete(f"{ADMIN}/people/nonsense"), 404, "not_found")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": ""},
        {"name": "a b"},
        {"name": "x" * 51},
        {"name": "eve", "role": "root"},
        {"name": "eve", "expires_at": "2000-01-01T00:00:00Z"},
    ],
)
async def test_people_that_cannot_be(site: Site, body: dict[str, object]) -> None:
    assert (await site.admin.post(f"{ADMIN}/people", json=body)).status_code == 422
    async with await person(site, "otto", "viewer"):
        taken = await site.admin.post(f"{ADMIN}/people", json={"name": "otto"})
        error(taken, 409, "conflict", "name")
    assert ADMIN_KEY not in taken.text
