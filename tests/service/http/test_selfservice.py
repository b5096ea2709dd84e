"""``/v1/adapters`` and ``/v1/usage``: a customer's own, within quotas, and never anybody else's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from tests.service.http.test_api import error
from tests.support import tiny
from tests.support.site import ADMIN_KEY, SERVICE_KEY, Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

ROUTES = [
    ("GET", "/v1/adapters"),
    ("GET", "/v1/adapters/a"),
    ("POST", "/v1/adapters/a/versions"),
    ("PATCH", "/v1/adapters/a"),
    ("DELETE", "/v1/adapters/a"),
    ("DELETE", "/v1/adapters/a/versions/1"),
    ("POST", "/v1/adapters/a/rollouts"),
    ("GET", "/v1/adapters/a/rollouts"),
    ("GET", "/v1/adapters/a/rollouts/0"),
    ("PATCH", "/v1/adapters/a/rollouts/0"),
]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path) as site:
        yield site


async def owner(site: Site, id_: str = "acme", *scopes: str, **limits: Any) -> httpx.AsyncClient:
    """A client with a key of a new tenant."""
    await site.tenant(id_, limits=limits)
    body = {"scopes": scopes or ("adapters:write", "usage:read", "inference")}
    made = await site.admin.post(f"/admin/v1/tenants/{id_}/keys", json=body)
    return httpx.AsyncClient(base_url=site.url, headers=bearer(made.json()["key"]), timeout=60)


async def upload(client: httpx.AsyncClient, name: str, seed: int) -> httpx.Response:
    files = {n: (tiny.adapter(seed) / n).read_bytes() for n in (CONFIG_FILE, WEIGHTS_FILE)}
    return await client.post(f"/v1/adapters/{name}/versions", files=files)


async def test_a_key_manages_the_adapters_that_its_limits_name(site: Site) -> None:
    async with await owner(site) as client:
        for name in ("a", "b"):
            assert (await upload(client, name, 1)).status_code == 201
    body = {"scopes": ["adapters:write"], "limits": {"adapters": ["b", "c"]}}
    made = await site.admin.post("/admin/v1/tenants/acme/keys", json=body)
    async with httpx.AsyncClient(base_url=site.url, headers=bearer(made.json()["key"]), timeout=60) as client:
        listed = (await client.get("/v1/adapters")).json()
        assert [one["name"] for one in listed["data"]] == ["b"]
        for method, path in ROUTES[1:]:
            refused = await client.request(method, path, json={} if method == "PATCH" else None)
            error(refused, 403, "model_not_allowed", "name")
        for more in ("uploads", "uploads/0", "versions/1/download"):
            error(await client.get(f"/v1/adapters/a/{more}"), 403, "model_not_allowed", "name")
        error(await upload(client, "d", 2), 403, "model_not_allowed", "name")
        assert (await upload(client, "c", 2)).status_code == 201
        assert (await client.get("/v1/adapters/b")).status_code == 200
    everything = (await site.admin.get("/admin/v1/tenants/acme/adapters")).json()["data"]
    assert [one["name"] for one in everything] == ["a", "b", "c"], "for operators nothing is left out"


async def test_the_whole_life_of_an_adapter_without_an_operator(site: Site) -> None:
    async with await owner(site) as client:
        for number in (1, 2):
            made = await upload(client, "a", number)
            assert (made.status_code, made.json()["version"], made.json()["live"]) == (201, number, number)
        admins = await site.admin.get("/admin/v1/tenants/acme/adapters/a")
        assert (await client.get("/v1/adapters/a")).json() == admins.json()
        listed = (await client.get("/v1/adapters")).json()
        assert [adapter["name"] for adapter in listed["data"]] == ["a"]
        back = await client.patch("/v1/adapters/a", json={"live": 1})
        assert back.json()["live"] == 1
        chat = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        answered = await client.post("/v1/chat/completions", json=chat)
        first = answered.json()["choices"][0]["message"]["content"]
        assert first == back.json()["versions"][0]["digest"]
        assert (await client.delete("/v1/adapters/a/versions/2")).status_code == 204
        assert (await client.delete("/v1/adapters/a")).status_code == 204
        error(await client.get("/v1/adapters/a"), 404, "adapter_not_found")
        error(await client.patch("/v1/adapters/a", json={"pinned": True}), 403, "permission_denied", "pinned")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guarded(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Site, str]]:
    """A server for calls that change nothing, and a customer's key."""
    async with fake_site(tmp_path_factory.mktemp("guarded"), auth_failures=0) as site:
        yield site, await site.tenant("acme", {"a": tiny.adapter(1)})


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.asyncio(loop_scope="module")
async def test_only_a_key_with_the_scope_writes(guarded: tuple[Site, str], method: str, path: str) -> None:
    site, key = guarded
    for headers, status, code in (
        ({}, 401, "invalid_api_key"),
        (bearer(key), 403, "scope_missing"),
        (bearer(ADMIN_KEY), 403, "permission_denied"),
        ({**bearer(SERVICE_KEY), "X-Customer-ID": "acme"}, 403, "scope_missing"),
    ):
        error(await site.http.request(method, path, headers=headers), status, code)
    assert (await site.admin.get("/admin/v1/tenants/acme/adapters/a")).status_code == 200


async def test_nobody_elses(site: Site) -> None:
    async with await owner(site, "acme") as ours, await owner(site, "globex") as theirs:
        assert (await upload(theirs, "secret", 1)).status_code == 201
        for method, path in ROUTES:
            if path != "/v1/adapters" and method != "POST":
                change = {"action": "pause"} if "rollouts" in path else {"live": 1}
                body = {"json": change} if method == "PATCH" else {}
                secret = path.replace("adapters/a", "adapters/secret")
                refused = await ours.request(method, secret, **body)
                error(refused, 404, "adapter_not_found")
                assert "globex" not in refused.text
        assert (await ours.get("/v1/adapters")).json()["data"] == []
        assert (await upload(ours, "secret", 2)).status_code == 201
        assert len((await theirs.get("/v1/adapters/secret")).json()["versions"]) == 1
        for key in (ours, theirs):
            chat = {"model": "secret", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
            await key.post("/v1/chat/completions", json=chat)
        own = (await ours.get("/v1/usage", params={"by": "tenant,adapter", "tenant": "globex"})).json()[
            "data"
        ]
        assert [(row["tenant"], row["requests"]) for row in own] == [("acme", 1)]


async def test_a_new_tenant_does_not_see_what_an_old_one_of_its_name_used(site: Site) -> None:
    async with await owner(site) as client:
        await upload(client, "a", 1)
        chat = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        assert (await client.post("/v1/chat/completions", json=chat)).status_code == 200
        assert (await client.get("/v1/usage")).json()["data"][0]["requests"] == 1
    await site.admin.delete("/admin/v1/tenants/acme")
    async with await owner(site) as client:
        for params in ({}, {"from": "2020-01-01"}):
            assert (await client.get("/v1/usage", params=params)).json()["data"][0]["requests"] == 0
    (both,) = (await site.admin.get("/admin/v1/usage", params={"tenant": "acme"})).json()["data"]
    assert both["requests"] == 1


async def test_usage_needs_its_own_scope(site: Site) -> None:
    async with await owner(site, "acme", "adapters:write") as client:
        error(await client.get("/v1/usage"), 403, "scope_missing")
    async with await owner(site, "globex", "usage:read") as client:
        assert (await client.get("/v1/usage", params={"format": "csv"})).status_code == 200
        error(await client.get("/v1/adapters"), 403, "scope_missing")


async def test_as_many_adapters_as_the_quota_has_also_when_uploaded_at_once(site: Site) -> None:
    async with await owner(site, max_adapters=2) as client:
        answers = await asyncio.gather(*(upload(client, f"a{i}", i) for i in range(4)))
        assert sorted(answer.status_code for answer in answers) == [201, 201, 403, 403]
        for answer in answers:
            if answer.status_code == 403:
                error(answer, 403, "quota_exceeded")
        kept = (await client.get("/v1/adapters")).json()["data"]
        assert len(kept) == 2
        assert (await upload(client, kept[0]["name"], 9)).status_code == 201, (
            "a new version is no new adapter"
        )
        by_operator = await site.upload("acme", "extra", tiny.adapter(5))
        assert by_operator.status_code == 201
        error(await upload(client, "b", 6), 403, "quota_exceeded")
        for name in (kept[0]["name"], "extra"):
            await client.delete(f"/v1/adapters/{name}")
        assert (await upload(client, "b", 6)).status_code == 201


async def test_as_many_bytes_as_the_quota_has(site: Site) -> None:
    size = sum((tiny.adapter(1) / n).stat().st_size for n in (CONFIG_FILE, WEIGHTS_FILE))
    async with await owner(site, max_storage_bytes=int(2.5 * size)) as client:
        assert [(await upload(client, "a", i)).status_code for i in (1, 2)] == [201, 201]
        refused = error(await upload(client, "a", 3), 403, "quota_exceeded")
        assert str(int(2.5 * size)) in refused["message"]
        await client.delete("/v1/adapters/a/versions/1")
        assert (await upload(client, "a", 3)).status_code == 201
