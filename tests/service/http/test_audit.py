"""The audit: an entry for every change, in its transaction, and never a secret in one."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from adapters.database.audit import Search, entries, note
from adapters.database.database import Database
from adapters.database.rows import KeyRow, TenantRow
from server.accounts.tenants import Tenants
from server.errors import Conflict
from server.http import reports
from tests.service.http.test_selfservice import upload
from tests.support.databases import KINDS, with_tables
from tests.support.site import ADMIN_KEY, SERVICE_KEY, Site, bearer
from tests.support.tiny import fake_site

AUDIT = "/admin/v1/audit"
TENANTS = "/admin/v1/tenants"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path) as site:
        yield site


async def audit(site: Site, **params: Any) -> list[dict[str, Any]]:
    answer = await site.admin.get(AUDIT, params={"order": "oldest"} | params)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"])


async def everything(site: Site) -> list[str]:
    """Makes one change of every kind; returns the keys that were shown."""
    admin = site.admin
    await admin.post(TENANTS, json={"id": "acme", "limits": {"max_tokens": 9}})
    await admin.patch(f"{TENANTS}/acme", json={"weight": 2, "budgets": {"day": {"tokens": 500}}})
    body = {"name": "app", "scopes": ["adapters:write"]}
    key = (await admin.post(f"{TENANTS}/acme/keys", json=body)).json()
    rotated = (
        await admin.post(f"{TENANTS}/acme/keys/{key['id']}/rotate", json={"overlap_seconds": 60})
    ).json()
    async with httpx.AsyncClient(base_url=site.url, headers=bearer(rotated["key"]), timeout=60) as client:
        for seed in (1, 2):
            assert (await upload(client, "a", seed)).status_code == 201
        await client.patch("/v1/adapters/a", json={"live": 1})
        await client.delete("/v1/adapters/a/versions/2")
    await admin.patch(f"{TENANTS}/acme/adapters/a", json={"pinned": True})
    await admin.delete(f"{TENANTS}/acme/adapters/a")
    await admin.delete(f"{TENANTS}/acme/keys/{key['id']}")
    await admin.delete(f"{TENANTS}/acme")
    return [key["key"], rotated["key"]]


async def test_every_change_is_there_with_who_and_what_it_was_before_and_after(site: Site) -> None:
    await everything(site)
    found = await audit(site)
    assert [entry["action"] for entry in found] == [
        "tenant.create", "tenant.update", "key.create", "key.rotate", "key.create", "version.create",
        "version.create", "adapter.update", "version.delete", "adapter.update", "adapter.delete",
        "key.revoke", "tenant.delete",
    ]  # fmt: skip
    by_key = {entry["actor"] for entry in found[5:9]}
    assert len(by_key) == 1
    assert re.fullmatch(r"key [0-9a-f]{16}", by_key.pop())
    assert {entry["actor"] for entry in (*found[:5], *found[9:])} == {"admin"}
    assert {entry["tenant"] for entry in found} == {"acme"}
    assert all(re.fullmatch(r"[0-9a-f]{32}", entry["request_id"]) for entry in found)
    assert found[3]["request_id"] == found[4]["request_id"]
    changed = found[1]
    assert (changed["before"]["weight"], changed["after"]["weight"]) == (1.0, 2.0)
    assert (changed["before"]["budgets"], changed["after"]["budgets"]) == ({}, {"day": {"tokens": 500}})
    assert (found[3]["before"]["expires_at"], found[3]["after"]["expires_at"] is None) == (None, False)
    rollback = found[7]
    assert (rollback["target"], rollback["before"]["live"], rollback["after"]["live"]) == ("a", 2, 1)
    assert found[6]["target"] == "a@2"
    assert set(found[10]["before"]["versions"]) == {"1"}
    assert found[12]["after"] is None


async def test_no_secret_is_in_any_of_it(site: Site) -> None:
    await site.admin.post(TENANTS, json={"id": "globex"})
    shown = await everything(site)
    key = (await site.admin.post(f"{TENANTS}/globex/keys", json={})).json()["key"]
    text = (await site.admin.get(AUDIT, params={"format": "jsonl"})).text
    async with site.services.database.read() as session:
        digests = list(await session.scalars(select(KeyRow.digest)))
        salts = list(await session.scalars(select(TenantRow.cache_salt)))
    assert digests
    for secret in (*shown, key, *digests, *salts, ADMIN_KEY, SERVICE_KEY):
        assert secret not in text


async def test_filters_pages_and_lines(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    await everything(site)
    await site.admin.post(TENANTS, json={"id": "globex"})
    found = await audit(site)
    assert [e["id"] for e in await audit(site, tenant="globex")] == [found[-1]["id"]]
    assert {e["action"] for e in await audit(site, action="key.create")} == {"key.create"}
    assert len(await audit(site, actor="admin")) == 10
    middle = found[6]["at"]
    assert [*await audit(site, to=middle), *await audit(site, **{"from": middle})] == found
    pages, after = [], 0
    while after is not None:
        page = (await site.admin.get(AUDIT, params={"limit": 4, "after": after})).json()
        assert len(page["data"]) <= 4
        pages += page["data"]
        after = page["next"]
    assert pages == found[::-1]
    monkeypatch.setattr(reports, "PAGE", 3)
    lines = await site.admin.get(AUDIT, params={"format": "jsonl"})
    assert [json.loads(line) for line in lines.text.splitlines()] == found
    only = await site.admin.get(AUDIT, params={"format": "jsonl", "tenant": "globex"})
    assert len(only.text.splitlines()) == 1


@pytest.mark.parametrize("format", ["json", "jsonl"])
async def test_an_after_that_no_entry_can_have_is_refused(site: Site, format: str) -> None:
    """Beyond 64 bits the database could not even be asked."""
    for after, status in ((2**53 - 1, 200), (2**53, 422), (2**63, 422), (2**70, 422), (-1, 422)):
        answer = await site.admin.get(AUDIT, params={"format": format, "after": after})
        assert answer.status_code == status, (after, answer.text)


async def test_there_is_no_way_to_change_it(site: Site) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        assert (await site.admin.request(method, AUDIT)).status_code == 405


async def fails(database: Database) -> None:
    with suppress(ZeroDivisionError):
        async with database.write() as session:
            note(session, "tenant.update", "acme")
            await session.flush()
            raise ZeroDivisionError


@pytest.mark.parametrize("kind", KINDS)
async def test_a_change_that_fails_leaves_no_entry(kind: str, tmp_path: Path) -> None:
    async with with_tables(kind, tmp_path) as url:
        database = Database(url)
        await database.open()
        tenants = Tenants(database)
        await tenants.create("acme")
        with pytest.raises(Conflict):
            await tenants.create("acme")
        await fails(database)
        (only,) = await entries(database, Search(), 10)
        assert (only["action"], only["actor"], only["request_id"]) == ("tenant.create", "system", None)
        await database.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_times_at_the_ends_of_the_calendar_are_times(kind: str, tmp_path: Path) -> None:
    """In UTC these are before the first and after the last one that there is."""
    first, last = map(datetime.fromisoformat, ("0001-01-01T00:00:00+00:01", "9999-12-31T23:59:59-00:01"))
    async with with_tables(kind, tmp_path) as url:
        database = Database(url)
        await database.open()
        tenants = Tenants(database)
        await tenants.create("acme")
        assert len(await entries(database, Search(start=first, end=last), 10)) == 1
        assert await entries(database, Search(end=first), 10) == []
        assert await entries(database, Search(start=last), 10) == []
        await tenants.issue_key("acme", expires_at=last)
        (key,) = await tenants.keys("acme")
        assert key.expires_at == datetime.max.replace(tzinfo=UTC)
        await database.close()
