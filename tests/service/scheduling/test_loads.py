"""Loads over HTTP: adapters that cannot be loaded, and those that are loaded before anybody asks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adapters.model import Tier, Version
from tests.service.http.test_api import CHAT, CHAT_URL, engine_of, error
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

ADAPTERS = "/admin/v1/tenants/{}/adapters"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    engine = FakeEngine(tiny.base(), times=Times(step=0.01))
    async with fake_site(tmp_path, engine, queue_timeout=600) as site:
        yield site


async def cold(site: Site, tenant: str, number: int) -> tuple[str, Version]:
    """A tenant's key and its adapter, which is on disk only."""
    key = await site.tenant(tenant, {"a": tiny.adapter(number)})
    version: Version = await site.services.publishing.catalog.resolve(tenant, "a")
    site.services.dispatcher.retire(version)
    async with asyncio.timeout(60):
        while site.services.dispatcher.tier_of(version) is not Tier.DISK:
            await asyncio.sleep(0.01)
    return key, version


@pytest.mark.parametrize("step", ["stage", "activate"])
async def test_a_failed_load_fails_its_own_requests_and_the_next_attempt_works(
    site: Site, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = await site.tenant("other", {"a": tiny.adapter(1)})
    key, version = await cold(site, "acme", 2)
    engine_of(site).fail(step, version.key)
    body = {**CHAT, "max_tokens": 100, "stream": True}
    async with site.http.stream("POST", CHAT_URL, json=body, headers=bearer(other)) as stream:
        lines = stream.aiter_lines()
        await anext(lines)
        with caplog.at_level(logging.ERROR):
            refused = error(await site.chat(key, "hi"), 503, "adapter_unavailable")
        assert "injected" not in refused["message"]
        assert "injected" in caplog.text
        assert (await site.chat(key, "hi")).status_code == 200
        assert [line async for line in lines if line][-1] == "data: [DONE]"


async def test_an_adapter_whose_files_are_gone_works_once_they_are_back(site: Site) -> None:
    key, version = await cold(site, "acme", 1)
    away = version.path.with_name("away")
    version.path.rename(away)
    for _ in range(2):
        error(await site.chat(key, "hi"), 503, "adapter_damaged")
    away.rename(version.path)
    assert (await site.chat(key, "hi")).status_code == 200


async def test_a_slow_load_delays_its_own_requests_only(site: Site) -> None:
    other = await site.tenant("other", {"a": tiny.adapter(1)})
    assert (await site.chat(other, "hi")).status_code == 200
    key, _ = await cold(site, "acme", 2)
    engine = engine_of(site)
    engine.times.stage = 3600.0
    slow = asyncio.create_task(site.chat(key, "hi"))
    async with asyncio.timeout(60):
        while not engine._staging:
            await asyncio.sleep(0.01)
    for _ in range(10):
        assert (await site.chat(other, "hi", max_tokens=1)).status_code == 200
        assert not slow.done()
    engine._staging = dict.fromkeys(engine._staging, 0.0)
    assert (await slow).status_code == 200


@pytest.mark.parametrize(("body", "tier"), [({}, "host"), ({"slot": True}, "gpu"), ({"version": 1}, "host")])
async def test_warm_returns_when_the_adapter_is_there(site: Site, body: dict[str, object], tier: str) -> None:
    await cold(site, "acme", 1)
    warmed = await site.admin.post(f"{ADAPTERS.format('acme')}/a/warm", json=body)
    assert (warmed.status_code, warmed.json()) == (200, {"adapter": "a", "version": 1, "tier": tier})
    assert (await site.admin.get(f"{ADAPTERS.format('acme')}/a")).json()["tier"] == tier


async def test_what_cannot_be_warmed(site: Site) -> None:
    _, version = await cold(site, "acme", 1)
    warm = f"{ADAPTERS.format('acme')}/a/warm"
    engine_of(site).fail("stage", version.key)
    error(await site.admin.post(warm), 503, "adapter_unavailable")
    assert (await site.admin.post(warm)).status_code == 200
    error(await site.admin.post(warm, json={"version": 2}), 404, "version_not_found", "version")
    error(await site.admin.post(f"{ADAPTERS.format('acme')}/b/warm"), 404, "adapter_not_found")
    error(await site.admin.post(f"{ADAPTERS.format('nobody')}/a/warm"), 404, "not_found")
    assert (await site.admin.post(warm, json={"slot": 1})).status_code == 422


async def test_warm_waits_for_room_and_says_that_there_is_none(tmp_path: Path) -> None:
    engine = FakeEngine(tiny.base(), gpu_slots=1, host_slots=1, times=Times(step=0.05))
    async with fake_site(tmp_path, engine, gpu_slots=1, host_slots=1, queue_timeout=1.0) as site:
        await site.tenant("cold", {"a": tiny.adapter(2)})
        key = await site.tenant("busy", {"a": tiny.adapter(1)})
        warm = f"{ADAPTERS.format('cold')}/a/warm"
        body = {**CHAT, "max_tokens": 500, "stream": True}
        async with site.http.stream("POST", CHAT_URL, json=body, headers=bearer(key)) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            error(await site.admin.post(warm), 503, "no_room")
            site.services.settings = site.services.settings.model_copy(update={"queue_timeout": 600})
            waiting = asyncio.create_task(site.admin.post(warm))
            await asyncio.sleep(0.2)
        assert (await waiting).json()["tier"] == "host"
