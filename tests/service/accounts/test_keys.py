"""Keys: scopes, expiry, rotation, last use, and revocation that other processes see."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from adapters.database.audit import Search, entries
from adapters.database.database import WATCH_EVERY, Database
from server.accounts.tenants import Tenants
from tests.service.http.test_api import CHAT, CHAT_URL, error
from tests.support import tiny
from tests.support.site import SERVICE_KEY, Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

KEYS = "/admin/v1/tenants/acme/keys"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path) as site:
        yield site


async def issue(site: Site, **fields: Any) -> dict[str, Any]:
    made = await site.admin.post(KEYS, json=fields)
    assert made.status_code == 201, made.text
    return dict(made.json())


async def shown(site: Site, id_: str) -> dict[str, Any]:
    listed = (await site.admin.get(KEYS)).json()["data"]
    return next(key for key in listed if key["id"] == id_)


async def ask(site: Site, key: str) -> Any:
    return await site.http.post(CHAT_URL, json=CHAT, headers=bearer(key))


async def test_a_key_is_for_inference_unless_it_says_more(site: Site) -> None:
    await site.tenant("acme", {"a": tiny.adapter(1)})
    plain = await issue(site)
    assert (await shown(site, plain["id"]))["scopes"] == ["inference"]
    assert (await ask(site, plain["key"])).status_code == 200
    other = await issue(site, scopes=["usage:read", "adapters:write"])
    assert (await shown(site, other["id"]))["scopes"] == ["adapters:write", "usage:read"]
    error(await ask(site, other["key"]), 403, "scope_missing")
    listed = await site.http.get("/v1/models", headers=bearer(other["key"]))
    error(listed, 403, "scope_missing")


def after(monkeypatch: pytest.MonkeyPatch, hours: float) -> None:
    """From now on keys are looked at as they will be after so many hours."""
    for module in ("keys", "tenants"):
        later = f"server.accounts.{module}.now"
        monkeypatch.setattr(later, lambda: datetime.now(UTC) + timedelta(hours=hours))


async def test_the_log_says_who_came_with_a_key_that_does_not_open(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await site.tenant("acme", {"a": tiny.adapter(1)})
    key = await issue(site, expires_at=(datetime.now(UTC) + timedelta(hours=1)).isoformat())
    revoked = await issue(site)
    assert (await site.admin.delete(f"{KEYS}/{revoked['id']}")).status_code == 204
    caplog.set_level(logging.INFO, "loraplex.access")

    async def line(secret: str, path: str = CHAT_URL) -> dict[str, Any]:
        caplog.clear()
        headers = bearer(secret) if secret else {}
        answer = await site.http.post(path, json=CHAT, headers=headers)
        (record,) = (r for r in caplog.records if r.name == "loraplex.access")
        assert not secret or secret not in str(vars(record))
        found = {name: vars(record).get(name) for name in ("client", "tenant", "key", "code")}
        return {"status": answer.status_code, **{n: v for n, v in found.items() if v is not None}}

    assert await line(key["key"]) == {"status": 200, "tenant": "acme"}
    here = {"status": 401, "client": "127.0.0.1"}
    for secret in ("", "wrong", revoked["key"]):
        assert await line(secret) == {**here, "code": "invalid_api_key"}
    assert await line("lp-admin-wrong", "/admin/v1/tenants") == {**here, "code": "invalid_api_key"}
    after(monkeypatch, 1)
    assert await line(key["key"]) == {**here, "code": "expired_api_key", "tenant": "acme", "key": key["id"]}


async def test_a_key_expires(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    await site.tenant("acme", {"a": tiny.adapter(1)})
    soon = datetime.now(UTC) + timedelta(hours=1)
    key = await issue(site, expires_at=soon.isoformat())
    assert (await shown(site, key["id"]))["expires_at"] == soon.isoformat()
    assert (await ask(site, key["key"])).status_code == 200
    after(monkeypatch, 1)
    error(await ask(site, key["key"]), 401, "expired_api_key")
    error(await site.admin.post(f"{KEYS}/{key['id']}/rotate"), 409, "conflict")


async def test_rotation_keeps_everything_and_ends_the_old_key_after_the_overlap(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    await site.tenant("acme", {"a": tiny.adapter(1)})
    until = (datetime.now(UTC) + timedelta(days=9)).isoformat()
    terms = {"name": "app", "scopes": ["inference"], "limits": {"max_tokens": 9}, "expires_at": until}
    first = await issue(site, **terms)
    made = await site.admin.post(f"{KEYS}/{first['id']}/rotate", json={"overlap_seconds": 3600})
    assert made.status_code == 201
    second = made.json()
    assert second["key"] not in (first["key"], None)
    assert second["replaces"]["id"] == first["id"]
    new = await shown(site, second["id"])
    assert {name: new[name] for name in terms} == terms
    for key in (first, second):
        assert (await ask(site, key["key"])).status_code == 200
    after(monkeypatch, 1)
    error(await ask(site, first["key"]), 401, "expired_api_key")
    assert (await ask(site, second["key"])).status_code == 200
    at_once = (await site.admin.post(f"{KEYS}/{second['id']}/rotate")).json()
    error(await ask(site, second["key"]), 401, "expired_api_key")
    assert (await ask(site, at_once["key"])).status_code == 200
    error(await site.admin.post(f"{KEYS}/0123456789abcdef/rotate"), 404, "not_found")
    assert second["key"] not in (await site.admin.get(KEYS)).text


async def test_a_keys_own_limits_hold(site: Site) -> None:
    await site.tenant("acme", {"a": tiny.adapter(1)})
    one, two = await issue(site, limits={"requests_per_minute": 1}), await issue(site)
    answered = await ask(site, one["key"])
    assert answered.headers["x-ratelimit-remaining-requests"] == "0"
    error(await ask(site, one["key"]), 429, "rate_limit_exceeded")
    assert (await ask(site, two["key"])).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"scopes": []}, "scopes"),
        ({"scopes": ["everything"]}, "scopes.0"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_at": "2999-01-01T00:00:00"}, "expires_at"),
        ({"limits": {"max_adapters": 3}}, "limits.max_adapters"),
    ],
)
async def test_keys_that_cannot_be(site: Site, fields: dict[str, Any], param: str) -> None:
    await site.tenant("acme")
    refused = await site.admin.post(KEYS, json=fields)
    assert refused.status_code == 422
    assert refused.json()["error"]["param"] == param


async def test_the_time_of_last_use_is_written_in_the_background(site: Site) -> None:
    await site.tenant("acme", {"a": tiny.adapter(1)})
    used, unused = await issue(site), await issue(site)
    await ask(site, used["key"])
    await site.http.post(CHAT_URL, json=CHAT, headers={**bearer(SERVICE_KEY), "X-Customer-ID": "acme"})
    generation = site.services.database.generation
    await site.services.usage_writer.write_used()
    assert site.services.database.generation == generation, "no cache is emptied for it"
    at = datetime.fromisoformat((await shown(site, used["id"]))["last_used_at"])
    assert abs((datetime.now(UTC) - at).total_seconds()) < 60
    assert (await shown(site, unused["id"]))["last_used_at"] is None


async def test_a_key_that_another_process_revokes_is_refused_within_a_second(
    site: Site, tmp_path: Path
) -> None:
    await site.tenant("acme", {"a": tiny.adapter(1)})
    key = await issue(site)
    assert (await ask(site, key["key"])).status_code == 200
    assert WATCH_EVERY <= 0.5
    database, ours = Database(site.services.settings.database_url), site.services.database
    before = ours.generation
    await Tenants(database).revoke("acme", key["id"])
    async with asyncio.timeout(60):
        while ours.generation == before:  # until it looks
            await asyncio.sleep(0.02)
    error(await ask(site, key["key"]), 401, "invalid_api_key")
    await database.close()


async def test_a_rotation_that_is_cancelled_anywhere_is_whole_or_absent_and_never_blocks_the_next(
    tmp_path: Path,
) -> None:
    """Its change and its two audit entries are several statements, some of which return rows."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'loraplex.db'}")
    await database.open()
    tenants = Tenants(database)
    await tenants.create("acme")
    turns = ended = issued = rotated = 0
    while ended < 3:
        key = await tenants.issue_key("acme")
        issued += 1
        task = asyncio.create_task(tenants.rotate_key("acme", key.id, timedelta(hours=1)))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        ended += not task.cancelled()
        (old,) = [info for info in await tenants.keys("acme") if info.id == key.id]
        rotated += old.expires_at is not None
        turns += 1 + turns // 20
    assert len(await tenants.keys("acme")) == issued + rotated
    audit = await entries(database, Search(), 10**4)
    assert Counter(entry["action"] for entry in audit) == {
        "tenant.create": 1,
        "key.create": issued + rotated,
        "key.rotate": rotated,
    }
    await database.close()
