"""What operators look at: the server, all adapters, single requests, limits; and customers their own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.database.rows import now
from server.settings import MASK, Settings
from tests.service.http.test_api import CHAT_URL, error
from tests.service.http.test_selfservice import owner
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.site import ADMIN_KEY, SERVICE_KEY, Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

ADMIN = "/admin/v1"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    engine = FakeEngine(tiny.base(), times=Times(stage=0.05, activate=0.02, step=0.005))
    async with fake_site(tmp_path, engine, metrics_key="metrics-key-of-the-tests") as site:
        yield site


async def seen(site: Site, path: str, **params: Any) -> Any:
    answer = await site.admin.get(f"{ADMIN}/{path}", params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def rows(site: Site, path: str, **params: Any) -> list[dict[str, Any]]:
    return list((await seen(site, path, **params))["data"])


# --- the server -------------------------------------------------------------------------------------


async def test_the_server_says_what_it_is_and_no_secret(site: Site) -> None:
    found = await seen(site, "server")
    assert found["base"]["name"] == tiny.NAME
    assert (found["capacity"]["gpu_slots"], found["capacity"]["max_lora_rank"]) == (2, 8)
    assert found["disk"]["free"] > 0
    assert found["disk"]["reserve"] == site.services.settings.disk_reserve
    assert found["parsers"] == {
        "tool_parser": "hermes",
        "reasoning_parser": None,
        "tools_shown": True,
        "tools_guessed": False,
    }
    assert found["uptime_seconds"] >= 0
    assert (found["engine_restarts"], found["engine_state"]) == (0, "running")
    assert found["settings"]["admin_key"] == MASK
    whole = str(found)
    for secret in (ADMIN_KEY, SERVICE_KEY, "metrics-key-of-the-tests"):
        assert secret not in whole


async def test_who_has_the_room(site: Site) -> None:
    await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2)})
    key = await site.tenant("zeta", {"a": tiny.adapter(1)})
    await site.tenant("empty")
    sent = {"files": {"file": b"{}\n" * 1000}, "data": {"purpose": "batch"}}
    assert (await site.http.post("/v1/files", headers=bearer(key), **sent)).status_code == 200
    listed = await rows(site, "tenants", stored=True)
    stored = {tenant["id"]: tenant["stored_bytes"] for tenant in listed}
    one = (await rows(site, "adapters", tenant="zeta"))[0]["size_bytes"]
    assert stored == {
        "acme": sum(row["size_bytes"] for row in await rows(site, "adapters", tenant="acme")),
        "empty": 0,
        "zeta": one + 3000,
    }
    assert min(stored["acme"], one) > 0
    assert [tenant["id"] for tenant in await rows(site, "tenants", stored=True, limit=1)] == ["acme"]
    assert "stored_bytes" not in (await rows(site, "tenants"))[0], "it costs a look at all versions"


def test_settings_are_shown_without_what_is_secret() -> None:
    shown = Settings(
        model="/m",
        database_url="postgresql+asyncpg://me:hunter22@db/x",
        limits_redis_url="redis://:hunter22@redis/0",  # type: ignore[arg-type]
        engine_args={"hf_token": "hunter22", "max_num_seqs": 4},
        import_prefixes=("https://me:hunter22@files/x/", "https://open/y/"),
    ).as_json()
    assert "hunter22" not in str(shown)
    assert shown["engine_args"] == {"hf_token": MASK, "max_num_seqs": 4}
    assert shown["import_prefixes"] == [f"https://{MASK}@files/x/", "https://open/y/"]
    assert shown["database_url"] == "postgresql+asyncpg://me:***@db/x"


# --- adapters ---------------------------------------------------------------------------------------


async def test_all_customers_adapters_are_searched_by_the_page(site: Site) -> None:
    await site.tenant("acme", {"support": tiny.adapter(1), "sales": tiny.adapter(2)})
    key = await site.tenant("zeta", {"Support": tiny.adapter(3)})
    await site.upload("acme", "support", tiny.adapter(4))
    found = await rows(site, "adapters")
    assert [(row["tenant"], row["name"], row["versions"], row["live"]) for row in found] == [
        ("acme", "sales", 1, 1), ("acme", "support", 2, 2), ("zeta", "Support", 1, 1)
    ]  # fmt: skip
    assert all("report" not in row and row["size_bytes"] > 0 and row["rank"] == 2 for row in found)
    assert [row["name"] for row in await rows(site, "adapters", q="SUPP")] == ["support", "Support"]
    assert [row["name"] for row in await rows(site, "adapters", q="acme/")] == ["sales", "support"]
    assert [row["name"] for row in await rows(site, "adapters", tenant="zeta")] == ["Support"]
    for nothing in ("%", "_", "x" * 150, "\x00"):
        assert await rows(site, "adapters", q=f"no{nothing}") == []
    pages: list[str] = []
    after = None
    while after or not pages:
        page = await seen(site, "adapters", limit=1, **({"after": after} if after else {}))
        pages += [f"{row['tenant']}/{row['name']}" for row in page["data"]]
        after = page["next"]
    assert pages == ["acme/sales", "acme/support", "zeta/Support"]
    assert await rows(site, "adapters", after="zeta/zzz") == []
    assert await rows(site, "tenants", after="zzz") == []
    for list_, cursors in (
        ("adapters", ("bad", "/", "acme/", "/a", "acme/a/b", "acme/a b")),
        ("tenants", ("Bad", "a/b", "")),
    ):
        for cursor in cursors:
            refused = await site.admin.get(f"{ADMIN}/{list_}", params={"after": cursor})
            assert (refused.status_code, refused.json()["error"]["param"]) == (422, "query.after"), cursor
    await site.chat(key, "hi", model="Support", max_tokens=1)
    assert [row["name"] for row in await rows(site, "adapters", tier="gpu", tenant="zeta")] == ["Support"]
    on_disk = {row["name"] for row in await rows(site, "adapters", tier="disk")}
    assert "Support" not in on_disk
    everywhere = [row for tier in ("disk", "host", "gpu") for row in await rows(site, "adapters", tier=tier)]
    assert len(everywhere) == 3
    await site.admin.delete(f"{ADMIN}/tenants/acme/adapters/sales")
    assert len(await rows(site, "adapters")) == 2, "an adapter without versions is none"


async def test_adapters_with_something_to_look_at(site: Site) -> None:
    await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2), "c": tiny.adapter(3)})
    assert await rows(site, "adapters", has="warning") == []
    from sqlalchemy import update

    from adapters.database.rows import VersionRow

    async with site.services.database.write() as session:
        row = await session.get_one(VersionRow, ("acme", "a", 1))
        row.report = row.report | {"warnings": ["one", "two"]}
        quarantine = {"reason": "it made NaN", "at": "2026-01-01T00:00:00+00:00"}
        await session.execute(
            update(VersionRow).where(VersionRow.adapter == "b").values(quarantine=quarantine)
        )
    (warned,) = await rows(site, "adapters", has="warning")
    assert (warned["name"], warned["warnings"]) == ("a", 2)
    (out,) = await rows(site, "adapters", has="quarantine")
    assert (out["name"], out["quarantine"]["reason"]) == ("b", "it made NaN")
    await site.upload("acme", "c", tiny.adapter(4))
    await site.admin.patch(f"{ADMIN}/tenants/acme/adapters/c", json={"split": {"1": 50, "2": 50}})
    assert [row["name"] for row in await rows(site, "adapters", has="split")] == ["c"]
    refused = await site.admin.get(f"{ADMIN}/adapters", params={"has": "nothing"})
    assert refused.status_code == 422


# --- requests ---------------------------------------------------------------------------------------


async def test_a_request_is_found_by_either_id_with_where_its_time_went(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    for client_id in ("cold-one", "warm-one"):
        body = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        answer = await site.http.post(CHAT_URL, json=body, headers={**bearer(key), "X-Request-Id": client_id})
        assert answer.status_code == 200
    warm, cold = await rows(site, "requests")
    assert (warm["client_request_id"], cold["client_request_id"]) == ("warm-one", "cold-one")
    for row in (warm, cold):
        assert (row["tenant"], row["adapter"], row["version"]) == ("acme", "a", 1)
        assert (row["outcome"], row["code"], row["endpoint"]) == ("completed", None, "chat")
        assert row["output_tokens"] == 3
        assert 0 < row["first_token_seconds"] <= row["seconds"]
        assert await rows(site, "requests", request_id=row["request_id"]) == [row]
        assert await rows(site, "requests", request_id=row["client_request_id"]) == [row]
    assert (warm["cold"], warm["load_seconds"]) == (False, 0)
    assert await rows(site, "requests", slower_than=1000) == []
    assert await rows(site, "requests", adapter="b") == []
    assert await rows(site, "requests", version=1, outcome="completed", tenant="acme") == [warm, cold]


async def test_a_cold_request_says_how_long_its_load_took(tmp_path: Path) -> None:
    engine = FakeEngine(
        tiny.base(), gpu_slots=1, host_slots=1, times=Times(stage=0.05, activate=0.02, step=0.005)
    )
    async with fake_site(tmp_path, engine, gpu_slots=1, host_slots=1) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2)})
        for model in ("a", "b", "b"):
            assert (await site.chat(key, "hi", model=model, max_tokens=1)).status_code == 200
        again, b, a = await rows(site, "requests")
        for row in (a, b):
            assert row["cold"]
            assert 0.07 <= row["load_seconds"] <= row["queue_seconds"]
        assert (again["cold"], again["load_seconds"]) == (False, 0)


async def test_refused_requests_are_found_and_count_nowhere(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)}, limits={"requests_per_minute": 1})
    codes = []
    for body in ({"model": "nobody"}, {"nonsense": 1}, {"max_tokens": 1}, {"max_tokens": 1}):
        answer = await site.chat(key, "hi", **body)
        codes.append(answer.json().get("error", {}).get("code"))
    assert codes == ["model_not_found", "unknown_field", None, "rate_limit_exceeded"]
    found = await rows(site, "requests")
    assert [(row["outcome"], row["code"]) for row in reversed(found)] == [
        ("rejected", "model_not_found"), ("rejected", "unknown_field"), ("completed", None),
        ("refused", "rate_limit_exceeded"),
    ]  # fmt: skip
    assert found[0]["adapter"] == "a"
    (total,) = await rows(site, "usage")
    assert total["requests"] == 1
    by = await rows(site, "usage", by="outcome")
    assert [(row["outcome"], row["requests"]) for row in by] == [("completed", 1)]


async def test_a_loop_of_refused_requests_does_not_fill_the_table(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.accounts.usage import MAX_REFUSED

    key = await site.tenant("acme")
    quotas, second = site.services.completions.quotas, now()
    record = quotas._record_refused
    for later in range(2):
        at = second + timedelta(seconds=later)
        monkeypatch.setattr(quotas, "_record_refused", lambda usage, at=at: record(replace(usage, at=at)))
        for _ in range(2 * MAX_REFUSED):
            await site.chat(key, "hi", model="nobody")
    assert len(await rows(site, "requests", limit=1000)) == 2 * MAX_REFUSED


async def test_requests_come_a_page_at_a_time_newest_first(site: Site) -> None:
    key = await site.tenant("acme")
    for _ in range(5):
        await site.chat(key, "hi", model=tiny.NAME, max_tokens=1)
    whole = await rows(site, "requests")
    assert [row["id"] for row in whole] == sorted((row["id"] for row in whole), reverse=True)
    first = await seen(site, "requests", limit=2)
    second = await seen(site, "requests", limit=2, after=first["next"])
    third = await seen(site, "requests", limit=2, after=second["next"])
    assert [*first["data"], *second["data"], *third["data"]] == whole
    assert third["next"] is None


# --- limits -----------------------------------------------------------------------------------------


async def test_limits_say_what_is_left_and_when_it_comes_back(site: Site) -> None:
    limits = {"requests_per_minute": 10, "tokens_per_minute": 1000, "max_tokens": 50}
    budgets = {"day": {"tokens": 500, "soft_tokens": 400}, "month": {"cost": 2.5}}
    key = await site.tenant("acme", limits=limits, budgets=budgets)
    answer = await site.chat(key, "hi", model=tiny.NAME, max_tokens=3)
    used = answer.json()["usage"]["total_tokens"]
    found = await seen(site, "tenants/acme/limits")
    by_name = {row["limit"]: row for row in found["limits"]}
    assert by_name.keys() == limits.keys()
    assert (by_name["requests_per_minute"]["used"], by_name["requests_per_minute"]["remaining"]) == (1, 9)
    assert (by_name["tokens_per_minute"]["used"], by_name["tokens_per_minute"]["remaining"]) == (
        used, 1000 - used
    )  # fmt: skip
    assert (by_name["max_tokens"]["of"], by_name["max_tokens"]["allowed"]) == ("tenant", 50)
    assert by_name["max_tokens"]["remaining"] is None
    day, month = found["budgets"]
    assert (day["allowed"], day["soft"], day["used"], day["remaining"]) == (500, 400, used, 500 - used)
    assert (month["unit"], month["allowed"], month["used"]) == ("cost", 2.5, 0)
    assert day["resets_at"] < month["resets_at"] or day["resets_at"][:10] == month["resets_at"][:10]
    assert (found["queued"], found["running"]) == (0, 0)


# --- tenants and keys -------------------------------------------------------------------------------


async def test_tenants_are_searched_by_the_page(site: Site) -> None:
    for id_, name in (("acme", "Rocket Parts"), ("bolt", "Bolt"), ("rocket", "R")):
        await site.tenant(id_, name=name)
    assert [row["id"] for row in await rows(site, "tenants", q="ROCKET")] == ["acme", "rocket"]
    first = await seen(site, "tenants", limit=2)
    assert ([row["id"] for row in first["data"]], first["next"]) == (["acme", "bolt"], "bolt")
    assert [row["id"] for row in await rows(site, "tenants", limit=2, after="bolt")] == ["rocket"]
    assert (await seen(site, "tenants"))["next"] is None


async def test_a_suspended_tenant_is_refused_until_it_is_not(site: Site) -> None:
    async with await owner(site, "acme") as client:
        key = client.headers["Authorization"].removeprefix("Bearer ")
        changed = await site.admin.patch(f"{ADMIN}/tenants/acme", json={"suspended": True})
        assert changed.json()["suspended"] is True
        error(await site.chat(key, "hi", max_tokens=1), 403, "tenant_suspended")
        for path in ("/v1/me", "/v1/models", "/v1/adapters", "/v1/usage"):
            error(await client.get(path), 403, "tenant_suspended")
        vouched = {**bearer(SERVICE_KEY), "X-Customer-ID": "acme"}
        error(await site.http.get("/v1/models", headers=vouched), 403, "tenant_suspended")
        await site.admin.patch(f"{ADMIN}/tenants/acme", json={"suspended": False})
        assert (await site.chat(key, "hi", model=tiny.NAME, max_tokens=1)).status_code == 200


async def test_a_key_is_changed_in_place(site: Site) -> None:
    await site.tenant("acme")
    path = f"{ADMIN}/tenants/acme/keys"
    made = (await site.admin.post(path, json={"name": "old", "limits": {"max_tokens": 5}})).json()
    change = {"name": "new", "scopes": ["usage:read"], "limits": {"requests_per_minute": 3}}
    changed = (await site.admin.patch(f"{path}/{made['id']}", json=change)).json()
    assert (changed["name"], changed["scopes"]) == ("new", ["usage:read"])
    assert changed["limits"] == {"max_tokens": 5, "requests_per_minute": 3}
    error(await site.chat(made["key"], "hi"), 403, "scope_missing")
    assert (await site.http.get("/v1/usage", headers=bearer(made["key"]))).status_code == 200
    (entry,) = await rows(site, "audit", action="key.update")
    assert (entry["before"]["name"], entry["after"]["name"]) == ("old", "new")
    for wrong in ({"scopes": []}, {"expires_at": "2000-01-01T00:00:00Z"}, {"name": ""}, {"key": "x"}):
        assert (await site.admin.patch(f"{path}/{made['id']}", json=wrong)).status_code == 422
    error(await site.admin.patch(f"{path}/{'0' * 16}", json=change), 404, "not_found")


# --- customers --------------------------------------------------------------------------------------


async def test_a_customer_sees_who_it_is_and_what_is_left(site: Site) -> None:
    async with await owner(site, "acme", requests_per_minute=9) as client:
        found = (await client.get("/v1/me")).json()
        assert found["tenant"]["id"] == "acme"
        assert found["scopes"] == ["inference", "adapters:write", "usage:read"]
        assert found["key"]["id"]
        assert found["limits"][0]["remaining"] == 9
        served = (await site.admin.get("/admin/v1/server")).json()
        assert found["base"] == {
            "name": tiny.NAME,
            "allowed": True,
            "fingerprint": served["base"]["fingerprint"],
            "max_lora_rank": served["capacity"]["max_lora_rank"],
            "dtype": served["dtype"],
        }
        assert "lp-" not in str(found)
    error(await site.http.get("/v1/me", headers=bearer(ADMIN_KEY)), 403, "permission_denied")
    vouched = await site.http.get("/v1/me", headers={**bearer(SERVICE_KEY), "X-Customer-ID": "acme"})
    assert (vouched.json()["key"], vouched.json()["scopes"]) == (None, ["inference"])


async def test_a_customer_makes_keys_that_may_no_more_than_its_own(site: Site) -> None:
    await site.tenant("acme")
    body = {"scopes": ["inference", "keys:write"], "limits": {"max_tokens": 5}}
    made = (await site.admin.post(f"{ADMIN}/tenants/acme/keys", json=body)).json()
    strong = (await site.admin.post(f"{ADMIN}/tenants/acme/keys", json={"scopes": ["usage:read"]})).json()
    async with httpx.AsyncClient(base_url=site.url, headers=bearer(made["key"]), timeout=60) as client:
        error(
            await client.post("/v1/keys", json={"scopes": ["usage:read"]}), 403, "permission_denied", "scopes"
        )
        own = await client.post("/v1/keys", json={"name": "own"})
        assert own.status_code == 201
        listed = {key["id"]: key for key in (await client.get("/v1/keys")).json()["data"]}
        assert listed[own.json()["id"]]["limits"] == {"max_tokens": 5}
        error(
            await site.chat(own.json()["key"], "hi", model=tiny.NAME, max_tokens=6),
            400,
            "max_tokens_too_large",
            "max_tokens",
        )
        error(await client.post(f"/v1/keys/{strong['id']}/rotate"), 403, "permission_denied")
        turned = await client.post(f"/v1/keys/{own.json()['id']}/rotate")
        assert turned.status_code == 201
        assert (await client.delete(f"/v1/keys/{turned.json()['id']}")).status_code == 204
        error(await site.chat(turned.json()["key"], "hi"), 401, "invalid_api_key")
    async with httpx.AsyncClient(base_url=site.url, headers=bearer(strong["key"]), timeout=60) as client:
        assert (await client.get("/v1/keys")).status_code == 200
        error(await client.post("/v1/keys", json={}), 403, "scope_missing")
    plain = await site.tenant("zeta")
    error(await site.http.get("/v1/keys", headers=bearer(plain)), 403, "scope_missing")


async def test_a_key_that_ends_gives_no_key_that_ends_later(site: Site) -> None:
    await site.tenant("acme")
    keys = f"{ADMIN}/tenants/acme/keys"
    scopes = {"scopes": ["inference", "keys:write"]}
    own = (await site.admin.post(keys, json=scopes | {"expires_at": "2199-01-01T00:00:00Z"})).json()
    later = [
        (await site.admin.post(keys, json=ends)).json()["id"]
        for ends in ({}, {"expires_at": "2199-01-01T00:00:01Z"})
    ]
    sooner = (await site.admin.post(keys, json={"expires_at": "2198-01-01T00:00:00Z"})).json()["id"]
    async with httpx.AsyncClient(base_url=site.url, headers=bearer(own["key"]), timeout=60) as client:
        for id_ in later:
            refused = await client.post(f"/v1/keys/{id_}/rotate", json={"overlap_seconds": 60})
            assert "longer" in error(refused, 403, "permission_denied")["message"]
        for id_ in (sooner, own["id"]):
            turned = await client.post(f"/v1/keys/{id_}/rotate", json={"overlap_seconds": 60})
            assert turned.status_code == 201, turned.text
    kept = {key["id"]: key["expires_at"] for key in (await site.admin.get(keys)).json()["data"]}
    assert kept[later[0]] is None


async def test_a_customer_reads_its_own_audit_newest_first(site: Site) -> None:
    async with await owner(site, "acme") as client, await owner(site, "zeta") as other:
        await site.admin.patch(f"{ADMIN}/tenants/acme", json={"weight": 2})
        entries = (await client.get("/v1/audit")).json()["data"]
        assert [entry["action"] for entry in entries[:2]] == ["tenant.update", "key.create"]
        assert {entry["tenant"] for entry in entries} == {"acme"}
        assert {entry["actor"] for entry in entries} == {"operator"}
        page = (await client.get("/v1/audit", params={"limit": 1})).json()
        rest = (await client.get("/v1/audit", params={"after": page["next"]})).json()
        assert [*page["data"], *rest["data"]] == entries
        assert {entry["tenant"] for entry in (await other.get("/v1/audit")).json()["data"]} == {"zeta"}
    newest = await rows(site, "audit")
    assert newest == list(reversed(await rows(site, "audit", order="oldest")))
