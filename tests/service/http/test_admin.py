"""``/admin/v1`` over real HTTP: every row of the table in the contract, and what each refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path

import pytest
import pytest_asyncio

from server.scheduling.checkpoints import restored
from server.scheduling.event_log import replay
from tests.service.http.test_api import CHAT, CHAT_URL, digest, engine_of, error
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.site import ADMIN_KEY, SERVICE_KEY, Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

TENANTS = "/admin/v1/tenants"
ROUTES = [
    ("POST", "/tenants"),
    ("GET", "/tenants"),
    ("GET", "/tenants/{tenant}"),
    ("PATCH", "/tenants/{tenant}"),
    ("DELETE", "/tenants/{tenant}"),
    ("POST", "/tenants/{tenant}/keys"),
    ("GET", "/tenants/{tenant}/keys"),
    ("DELETE", "/tenants/{tenant}/keys/{key_id}"),
    ("PATCH", "/tenants/{tenant}/keys/{key_id}"),
    ("POST", "/tenants/{tenant}/keys/{key_id}/rotate"),
    ("GET", "/tenants/{tenant}/limits"),
    ("GET", "/server"),
    ("GET", "/replicas"),
    ("GET", "/check"),
    ("POST", "/check"),
    ("POST", "/backup"),
    ("GET", "/me"),
    ("GET", "/people"),
    ("POST", "/people"),
    ("DELETE", "/people/{person}"),
    ("GET", "/uploads"),
    ("GET", "/tenants/{tenant}/adapters/{name}/uploads"),
    ("GET", "/tenants/{tenant}/adapters/{name}/uploads/{upload}"),
    ("GET", "/tenants/{tenant}/adapters/{name}/versions/{version}/download"),
    ("GET", "/adapters"),
    ("GET", "/requests"),
    ("GET", "/batches"),
    ("POST", "/tenants/{tenant}/adapters/{name}/versions"),
    ("GET", "/tenants/{tenant}/adapters"),
    ("GET", "/tenants/{tenant}/adapters/{name}"),
    ("PATCH", "/tenants/{tenant}/adapters/{name}"),
    ("DELETE", "/tenants/{tenant}/adapters/{name}"),
    ("POST", "/tenants/{tenant}/adapters/{name}/warm"),
    ("PATCH", "/tenants/{tenant}/adapters/{name}/versions/{version}"),
    ("DELETE", "/tenants/{tenant}/adapters/{name}/versions/{version}"),
    ("POST", "/tenants/{tenant}/adapters/{name}/verify"),
    ("POST", "/tenants/{tenant}/adapters/{name}/rollouts"),
    ("GET", "/tenants/{tenant}/adapters/{name}/rollouts"),
    ("GET", "/tenants/{tenant}/adapters/{name}/rollouts/{rollout}"),
    ("PATCH", "/tenants/{tenant}/adapters/{name}/rollouts/{rollout}"),
    ("GET", "/rollouts"),
    ("GET", "/residency"),
    ("GET", "/usage"),
    ("GET", "/audit"),
]


def url(path: str, tenant: str = "acme") -> str:
    return "/admin/v1" + path.format(
        tenant=tenant,
        name="a",
        key_id="0123456789abcdef",
        version=1,
        upload="0" * 32,
        person="0" * 16,
        rollout="0" * 32,
    )


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    engine = FakeEngine(tiny.base(), times=Times(step=0.01))
    async with fake_site(tmp_path, engine) as site:
        yield site


async def ask_first(site: Site, key: str, **fields: object) -> str:
    """The digest that names the adapter which answers."""
    made = await site.chat(key, "hi", max_tokens=1, **fields)
    assert made.status_code == 200, made.text
    return str(made.json()["choices"][0]["message"]["content"])


async def eventually(site: Site, path: Path) -> None:
    """``path`` goes away, with what is done in the background about it."""
    async with asyncio.timeout(60):
        while path.exists() or site.services.tasks:
            await asyncio.sleep(0.02)


# --- who may ----------------------------------------------------------------------------------------


async def test_the_table_is_complete(site: Site) -> None:
    documented = {
        (method.upper(), path)
        for path, methods in site.app.openapi()["paths"].items()
        if path.startswith("/admin/v1")
        for method in methods
    }
    assert documented == {(method, f"/admin/v1{path}") for method, path in ROUTES}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guarded(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Site, str]]:
    """A server for calls that change nothing, and a customer's key."""
    async with fake_site(tmp_path_factory.mktemp("guarded"), auth_failures=0) as site:
        yield site, await site.tenant("acme", {"a": tiny.adapter(1)})


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.asyncio(loop_scope="module")
async def test_only_the_admin_key_administers(guarded: tuple[Site, str], method: str, path: str) -> None:
    site, key = guarded
    for headers, status, code in (
        ({}, 401, "invalid_api_key"),
        (bearer("lp-" + "x" * 43), 401, "invalid_api_key"),
        (bearer(key), 403, "permission_denied"),
        (bearer(SERVICE_KEY), 403, "permission_denied"),
        ({**bearer(SERVICE_KEY), "X-Customer-ID": "acme"}, 403, "permission_denied"),
    ):
        refused = await site.http.request(method, url(path), headers=headers)
        error(refused, status, code)
        assert ADMIN_KEY not in refused.text
    assert (await site.admin.get(f"{TENANTS}/acme/adapters/a")).status_code == 200, "nothing happened"


# --- tenants and keys -------------------------------------------------------------------------------


async def test_tenants_are_made_shown_changed_and_removed(site: Site) -> None:
    made = await site.admin.post(
        TENANTS, json={"id": "acme", "name": "Acme Inc.", "weight": 2, "max_queued": 3}
    )
    assert made.status_code == 201
    assert made.json() | {"created_at": "-"} == {
        "id": "acme", "name": "Acme Inc.", "weight": 2.0, "priority": "standard", "base_allowed": True,
        "max_queued": 3, "max_running": None, "created_at": "-", "limits": {}, "budgets": {},
        "suspended": False, "sample_prompts": False,
    }  # fmt: skip
    assert (await site.admin.get(f"{TENANTS}/acme")).json() == made.json()
    await site.admin.post(TENANTS, json={"id": "abc"})
    listed = (await site.admin.get(TENANTS)).json()
    assert [tenant["id"] for tenant in listed["data"]] == ["abc", "acme"]
    assert listed["object"] == "list"
    changed = await site.admin.patch(f"{TENANTS}/acme", json={"weight": 0.5, "max_queued": None})
    assert changed.json() == made.json() | {"weight": 0.5, "max_queued": None}
    assert (await site.admin.get(f"{TENANTS}/acme")).json() == changed.json()
    gone = await site.admin.delete(f"{TENANTS}/acme")
    assert (gone.status_code, gone.content) == (204, b"")
    error(await site.admin.get(f"{TENANTS}/acme"), 404, "not_found")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "id"),
        ({"id": "Acme"}, "id"),
        ({"id": "x" * 64}, "id"),
        ({"id": "-a"}, "id"),
        ({"id": 5}, "id"),
        ({"id": "a", "weight": 0}, "weight"),
        ({"id": "a", "weight": "2"}, "weight"),
        ({"id": "a", "max_queued": 0}, "max_queued"),
        ({"id": "a", "max_running": 2**31}, "max_running"),
        ({"id": "a", "name": ""}, "name"),
        ({"id": "a", "name": "x\n"}, "name"),
        ({"id": "a", "wieght": 2}, "wieght"),
        ({"id": "a", "cache_salt": "x"}, "cache_salt"),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_tenants_that_cannot_be(guarded: tuple[Site, str], body: dict[str, object], param: str) -> None:
    site, _ = guarded
    refused = await site.admin.post(TENANTS, json=body)
    assert refused.status_code == 422, refused.text
    assert refused.json()["error"]["param"] == param
    assert [one["id"] for one in (await site.admin.get(TENANTS)).json()["data"]] == ["acme"]


async def test_a_taken_id_and_an_unknown_one(site: Site) -> None:
    await site.tenant("acme")
    error(await site.admin.post(TENANTS, json={"id": "acme"}), 409, "conflict", "id")
    for method, path in ROUTES:
        if "{tenant}" in path:
            body = {"live": 1} if method == "PATCH" and "adapters" in path else {}
            refused = await site.admin.request(method, url(path, "nobody"), json=body)
            error(refused, 404, "not_found")


async def test_keys_are_shown_once(site: Site) -> None:
    await site.admin.post(TENANTS, json={"id": "acme"})
    made = await site.admin.post(f"{TENANTS}/acme/keys", json={"name": "laptop"})
    assert made.status_code == 201
    key, id_ = made.json()["key"], made.json()["id"]
    assert made.json().keys() == {"id", "key", "name"}
    unnamed = await site.admin.post(f"{TENANTS}/acme/keys")
    assert unnamed.status_code == 201
    listed = (await site.admin.get(f"{TENANTS}/acme/keys")).json()
    assert [(k["id"], k["name"]) for k in listed["data"]] == [(id_, "laptop"), (unnamed.json()["id"], None)]
    for path in (f"{TENANTS}/acme/keys", TENANTS, f"{TENANTS}/acme"):
        assert key not in (await site.admin.get(path)).text
    assert (await site.http.get("/v1/models", headers=bearer(key))).status_code == 200
    assert (await site.admin.delete(f"{TENANTS}/acme/keys/{id_}")).status_code == 204
    error(await site.http.get("/v1/models", headers=bearer(key)), 401, "invalid_api_key")
    other = unnamed.json()["key"]
    assert (await site.http.get("/v1/models", headers=bearer(other))).status_code == 200
    for gone in (id_, "nonsense"):
        error(await site.admin.delete(f"{TENANTS}/acme/keys/{gone}"), 404, "not_found")


async def test_a_tenant_that_goes_takes_everything_along(site: Site, tmp_path: Path) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    keeper = await site.tenant("zeta", {"a": tiny.adapter(2), "b": tiny.adapter(3)})
    await site.upload("acme", "b", tiny.adapter(3))
    only, shared = await digest(site, "acme", "a"), await digest(site, "acme", "b")
    for model in ("a", "b"):
        await ask_first(site, key, model=model)
    assert (await site.admin.delete(f"{TENANTS}/acme")).status_code == 204
    error(await site.chat(key, "hi"), 401, "invalid_api_key")
    await eventually(site, tmp_path / "blobs" / only)
    async with asyncio.timeout(60):
        while any(entry["version"].startswith("acme/") for entry in (await residency(site))["host"]):
            await asyncio.sleep(0.02)
    assert await ask_first(site, keeper, model="b") == shared, "another tenant has the same bytes"
    again = await site.tenant("acme")
    assert (await site.http.get("/v1/models", headers=bearer(again))).json()["data"][0]["id"] == tiny.NAME


# --- adapters ---------------------------------------------------------------------------------------


async def residency(site: Site) -> dict[str, list[dict[str, str]]]:
    shown = await site.admin.get("/admin/v1/residency")
    assert shown.status_code == 200
    return dict(shown.json())


async def test_versions_live_and_rollback(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    second = (await site.upload("acme", "a", tiny.adapter(2))).json()
    assert (second["adapter"], second["version"], second["live"]) == ("a", 2, 2)
    shown = (await site.admin.get(f"{TENANTS}/acme/adapters/a")).json()
    assert (shown["name"], shown["tenant"], shown["live"], shown["default"], shown["pinned"]) == (
        "a", "acme", 2, True, False,
    )  # fmt: skip
    first_digest, second_digest = (version["digest"] for version in shown["versions"])
    assert shown["versions"][1]["report"] == second["report"]
    assert await ask_first(site, key) == second_digest == second["digest"]
    rolled = await site.admin.patch(f"{TENANTS}/acme/adapters/a", json={"live": 1})
    assert rolled.json()["live"] == 1
    assert await ask_first(site, key) == first_digest
    assert await ask_first(site, key, model="a@2") == second_digest
    tiers = (await site.admin.get(f"{TENANTS}/acme/adapters")).json()["data"][0]
    assert tiers["tier"] == "gpu"
    assert [version["tier"] for version in tiers["versions"]] == ["gpu", "gpu"]
    error(
        await site.admin.patch(f"{TENANTS}/acme/adapters/a", json={"live": 3}),
        404,
        "version_not_found",
        "live",
    )
    error(await site.admin.delete(f"{TENANTS}/acme/adapters/a/versions/1"), 409, "adapter_conflict")
    error(await site.admin.delete(f"{TENANTS}/acme/adapters/a/versions/9"), 404, "version_not_found")
    assert (await site.admin.delete(f"{TENANTS}/acme/adapters/a/versions/2")).status_code == 204
    error(await site.chat(key, "hi", model="a@2"), 404, "model_not_found", "model")
    error(await site.admin.delete(f"{TENANTS}/acme/adapters/a/versions/1"), 409, "adapter_conflict")
    bad = await site.admin.delete(f"{TENANTS}/acme/adapters/a/versions/two")
    assert bad.status_code == 422


@pytest.mark.parametrize(
    "body", [{}, {"live": 0}, {"live": "1"}, {"live": True}, {"name": "b"}, {"pinned": "yes"}, {"default": 1}]
)
@pytest.mark.asyncio(loop_scope="module")
async def test_changes_that_cannot_be(guarded: tuple[Site, str], body: dict[str, object]) -> None:
    site, _ = guarded
    before = (await site.admin.get(f"{TENANTS}/acme/adapters/a")).json()
    refused = await site.admin.patch(f"{TENANTS}/acme/adapters/a", json=body)
    assert refused.status_code == 422, refused.text
    error(await site.admin.patch(f"{TENANTS}/acme/adapters/b", json={"live": 1}), 404, "adapter_not_found")
    assert (await site.admin.get(f"{TENANTS}/acme/adapters/a")).json() == before


async def test_the_default_is_moved(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2)})
    assert await ask_first(site, key) == await digest(site, "acme", "a")
    moved = await site.admin.patch(f"{TENANTS}/acme/adapters/b", json={"default": True})
    assert moved.json()["default"] is True
    assert await ask_first(site, key, model="default") == await digest(site, "acme", "b")
    assert (await site.admin.get(f"{TENANTS}/acme/adapters/a")).json()["default"] is False
    await site.admin.patch(f"{TENANTS}/acme/adapters/b", json={"default": False})
    error(await site.chat(key, "hi"), 404, "model_not_found", "model")


async def test_a_pinned_adapter_stays_in_memory(site: Site) -> None:
    key = await site.tenant(
        "acme", {"pinned": tiny.adapter(0), **{f"a{i}": tiny.adapter(i) for i in range(1, 6)}}
    )
    engine_of(site).ops.clear()  # each was in memory for its probe
    pinned = await site.admin.patch(f"{TENANTS}/acme/adapters/pinned", json={"pinned": True})
    assert pinned.json()["pinned"] is True
    await ask_first(site, key, model="pinned")
    for _ in range(2):
        for i in range(1, 6):
            await ask_first(site, key, model=f"a{i}")
    assert (await site.admin.get(f"{TENANTS}/acme/adapters/pinned")).json()["tier"] == "gpu"
    (entry,) = [e for e in (await residency(site))["host"] if e["version"].startswith("acme/pinned@")]
    assert entry["pinned"] is True
    loads = [op.name for op in engine_of(site).ops if op.verb == "stage" and "pinned" in op.name]
    assert len(loads) == 1


async def test_residency_as_it_is_now(site: Site) -> None:
    idle = await residency(site)
    assert idle.pop("rates")["first_tokens"] == 0
    assert idle == {
        "slots": [
            dict.fromkeys(("version", "load_id", "state", "tenant", "name", "number"))
            | {"running": 0, "draining": False}
        ] * 2,
        "host": [], "queued": {}, "running": {}, "counters": {}, "aside": 0, "drains": 0,
        "preemptions": 0, "draining": False,
    }  # fmt: skip
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    engine_of(site).times.step = 0.1
    async with site.http.stream(
        "POST", CHAT_URL, json={**CHAT, "max_tokens": 300, "stream": True}, headers=bearer(key)
    ) as stream:
        lines = stream.aiter_lines()
        await anext(lines)
        now = await residency(site)
        version = f"acme/a@{await digest(site, 'acme', 'a')}"
        assert now["running"] == {"acme": 1}
        assert now["slots"][0] == {
            "version": version, "load_id": 1, "state": "active", "running": 1, "draining": False,
            "tenant": "acme", "name": "a@1", "number": 1,
        }  # fmt: skip
        (entry,) = now["host"]
        assert (entry["version"], entry["tier"], entry["state"]) == (version, "gpu", "active")
        assert int(entry["size_bytes"]) > 0


async def test_an_adapter_is_deleted_under_a_running_stream(site: Site, tmp_path: Path) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    blob = tmp_path / "blobs" / await digest(site, "acme", "a")
    body = {**CHAT, "max_tokens": 400, "stream": True}
    engine_of(site).times.step = 0.1
    async with site.http.stream("POST", CHAT_URL, json=body, headers=bearer(key)) as stream:
        lines = stream.aiter_lines()
        await anext(lines)
        assert (await site.admin.delete(f"{TENANTS}/acme/adapters/a")).status_code == 204
        error(await site.chat(key, "hi", model="a"), 404, "model_not_found", "model")
        error(await site.admin.delete(f"{TENANTS}/acme/adapters/a"), 404, "adapter_not_found")
        assert blob.exists(), "it is being used"
        engine_of(site).times.step = 0.001
        rest = "".join([line async for line in lines])
    assert '" 399"' in rest
    assert rest.endswith("data: [DONE]")
    await eventually(site, blob)
    assert (await residency(site))["host"] == []
    assert (await engine_of(site).report()).host == frozenset()
    again = (await site.upload("acme", "a", tiny.adapter(1))).json()
    assert again["version"] == 2, "a number is never used twice"
    assert await ask_first(site, key, model="a") == blob.name


async def test_the_same_bytes_are_kept_for_whoever_else_has_them(site: Site, tmp_path: Path) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(1)})
    assert (await site.upload("acme", "a", tiny.adapter(1))).json()["version"] == 2
    shared = await digest(site, "acme", "a")
    assert (await site.admin.delete(f"{TENANTS}/acme/adapters/a/versions/1")).status_code == 204
    assert await ask_first(site, key, model="a") == shared
    assert (await site.admin.delete(f"{TENANTS}/acme/adapters/a")).status_code == 204
    async with asyncio.timeout(60):
        while site.services.tasks:
            await asyncio.sleep(0.02)
    assert await ask_first(site, key, model="b") == shared
    assert (await site.admin.delete(f"{TENANTS}/acme/adapters/b")).status_code == 204
    await eventually(site, tmp_path / "blobs" / shared)


async def test_the_schedulers_last_events_can_be_replayed(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    assert (await site.http.post(CHAT_URL, json=CHAT, headers=bearer(key))).status_code == 200
    assert "events" not in (await site.admin.get("/admin/v1/residency")).json()
    shown = (await site.admin.get("/admin/v1/residency?events=3")).json()
    assert len(shown["events"]) == 3
    assert "checkpoint" not in shown
    document = (await site.admin.get("/admin/v1/residency?events=8192")).json()
    every = document["events"]
    names = [event["event"] for event in every]
    assert {"submitted", "staged", "activated", "progressed", "finished"} <= set(names)
    plan = restored(document["checkpoint"])
    replay(plan, every)
    now = asdict(site.services.dispatcher.snapshot())
    assert asdict(plan.snapshot()) == now
    no_fleet = await site.admin.get("/admin/v1/residency?replica=x")
    error(no_fleet, 404, "replica_not_found", "replica")
    for wrong in ("-1", "8193", "x"):
        error(
            await site.admin.get(f"/admin/v1/residency?events={wrong}"),
            422,
            "invalid_request",
            "query.events",
        )
