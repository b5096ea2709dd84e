"""Two customers with the same adapter name, the same bytes and the same prompt: neither sees the other."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.model import CONFIG_FILE
from tests.service.http.test_api import CHAT, CHAT_URL, engine_of
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

ADA, BOB = "ada-tenant", "bob-tenant"
SECRET = "a-sentence-that-only-bob-says"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path, FakeEngine(tiny.base(), times=Times(step=0.005)), max_queued=1) as site:
        yield site


async def everything(site: Site, key: str) -> list[httpx.Response]:
    """What a customer can ask for, with what is refused."""
    own = bearer(key)
    bodies: list[dict[str, Any]] = [
        CHAT,
        {**CHAT, "model": "support"},
        {**CHAT, "model": "support@1"},
        {**CHAT, "model": "support@2"},
        {**CHAT, "model": "only-bobs"},
        {**CHAT, "model": tiny.NAME},
        {**CHAT, "model": 5},
        {**CHAT, "n": 0},
        {**CHAT, "surprise": True},
        {**CHAT, "stream": True, "stream_options": {"include_usage": True}},
    ]
    answers = [await site.http.post(CHAT_URL, json=body, headers=own) for body in bodies]
    answers.append(await site.http.post("/v1/completions", json={"prompt": "hi", "echo": True}, headers=own))
    message = {"max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
    answers.append(await site.http.post("/v1/messages", json=message, headers=own))
    answers.append(await site.http.post("/v1/responses", json={"input": "hi"}, headers=own))
    answers.append(await site.http.post("/tokenize", json={"prompt": "hi"}, headers=own))
    for path in ("/v1/models", "/v1/models/support", "/v1/models/only-bobs", "/admin/v1/tenants", "/nowhere"):
        answers.append(await site.http.get(path, headers=own))
    answers += await asyncio.gather(*(site.http.post(CHAT_URL, json=CHAT, headers=own) for _ in range(8)))
    return answers


def text_of(answers: list[httpx.Response]) -> str:
    return "\n".join(f"{answer.headers} {answer.text}" for answer in answers)


async def test_nothing_that_one_is_told_says_anything_of_the_other(
    site: Site, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    folder = tiny.adapter(1)
    ada = await site.tenant(ADA, {"support": folder})
    bob = await site.tenant(BOB, {"support": folder, "only-bobs": tiny.adapter(2)})
    alone = text_of(await everything(site, ada))
    with caplog.at_level(logging.INFO):
        body = {**CHAT, "messages": [{"role": "user", "content": SECRET}], "user": SECRET}
        _, answers, _ = await asyncio.gather(
            everything(site, bob),
            everything(site, ada),
            site.http.post(CHAT_URL, json=body, headers=bearer(bob)),
        )
    beside = text_of(answers)
    for said in (alone, beside):
        assert BOB not in said
        assert SECRET not in said
        assert "blobs" not in said
        assert str(tmp_path) not in said
    assert SECRET not in caplog.text
    for record in caplog.records:
        if getattr(record, "tenant", None) == ADA:
            assert BOB not in json.dumps(record.__dict__, default=str)


async def test_what_one_used_is_not_the_others(site: Site) -> None:
    keys = {name: await site.tenant(name, {"support": tiny.adapter(1)}) for name in (ADA, BOB)}
    told = dict.fromkeys(keys, 0)
    for name in (ADA, BOB, BOB):
        answer = (await site.chat(keys[name], "hi", max_tokens=3)).json()
        told[name] += answer["usage"]["total_tokens"]
    for name in keys:
        rows = (await site.admin.get(f"/admin/v1/usage?tenant={name}&by=tenant")).json()["data"]
        assert [row["tenant"] for row in rows] == [name]
        assert rows[0]["prompt_tokens"] + rows[0]["output_tokens"] == told[name]
    metrics = (await site.http.get("/metrics")).text
    done = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in metrics.splitlines()
        if line.startswith("loraplex_requests_total") and 'outcome="completed"' in line
    }
    assert {name: sum(n for row, n in done.items() if f'"{name}"' in row) for name in keys} == {
        ADA: 1,
        BOB: 2,
    }


async def test_one_customers_upload_and_delete_leave_the_others_bytes(site: Site) -> None:
    keys = {name: await site.tenant(name, {"support": tiny.adapter(1)}) for name in (ADA, BOB)}
    assert (await site.admin.delete(f"/admin/v1/tenants/{BOB}/adapters/support")).status_code == 204
    assert (await site.chat(keys[BOB], "hi", model="support")).status_code == 404
    for _ in range(3):
        assert (await site.chat(keys[ADA], "hi", model="support")).status_code == 200
        await asyncio.sleep(0.3)
    version = await site.services.publishing.catalog.resolve(ADA, "support")
    assert (version.path / CONFIG_FILE).is_file()


async def test_the_key_decides_and_not_what_a_url_or_header_claims(site: Site) -> None:
    """Authorisation looks at the route that was matched."""
    key = await site.tenant(ADA, {"support": tiny.adapter(1)})
    await site.tenant(BOB, {"only-bobs": tiny.adapter(2)})
    claims = {
        "X-Forwarded-Prefix": "/v1",
        "X-Original-URL": "/v1/models",
        "X-Rewrite-URL": "/v1/models",
        "X-Forwarded-Host": "localhost",
        "X-Tenant": BOB,
        "Host": "admin",
    }
    paths = (
        "/admin/v1/tenants",
        "/v1/../admin/v1/tenants",
        "/v1//admin/v1/tenants",
        "//admin/v1/tenants",
        "/v1/%2e%2e/admin/v1/tenants",
        "/admin/v1/tenants/",
        "/ADMIN/v1/tenants",
        "/admin/v1/tenants;/v1/models",
    )
    for path in paths:
        raw = httpx.URL(site.url).copy_with(raw_path=path.encode())
        refused = await site.http.get(raw, headers={**bearer(key), **claims})
        assert refused.status_code in (401, 403, 404, 307, 405), path
        assert BOB not in refused.text, path
    mine = await site.http.get("/v1/models", headers={**bearer(key), **claims})
    assert BOB not in mine.text
    assert "only-bobs" not in mine.text


async def test_a_clients_request_id_is_echoed_and_never_used(site: Site) -> None:
    key = await site.tenant(ADA, {"support": tiny.adapter(1)})
    engine_of(site).calls.clear()
    for _ in range(2):
        answer = await site.http.post(CHAT_URL, json=CHAT, headers={**bearer(key), "X-Request-Id": "mine"})
        assert answer.headers["x-request-id"] == "mine"
    ids = [call.id for call in engine_of(site).calls]
    assert len(set(ids)) == 2
    assert "mine" not in ids
