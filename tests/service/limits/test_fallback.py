"""Without Redis, limits that fail open: counted in the process, and told to Redis when it is back."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path

import pytest

from server.accounts.terms import Budget, Budgets, TenantLimits
from server.errors import TooManyRequests
from server.limits.fallback import FallbackLedger
from server.limits.quotas import Quotas
from server.limits.redis import RedisLedger
from tests.service.http.test_api import error
from tests.support import tiny
from tests.support.ledgers import Gate, admitted, limited, opened, used
from tests.support.services import RedisServer
from tests.support.tiny import fake_site
from tests.support.world import tenant


@pytest.fixture
async def server() -> AsyncIterator[RedisServer]:
    server = RedisServer()
    yield server
    server.kill()


async def back(redis: RedisLedger) -> None:
    async with asyncio.timeout(60):
        while not redis.up:
            await asyncio.sleep(0.05)


async def test_limits_hold_in_the_process_while_redis_is_killed(server: RedisServer) -> None:
    who = limited(requests_per_minute=3, requests_at_once=2)
    local = 0

    def count() -> None:
        nonlocal local
        local += 1

    async with opened(server.url) as redis:
        quotas = Quotas(FallbackLedger(redis, on_local=count))
        before = await admitted(quotas, who)
        server.kill()
        first, second = await admitted(quotas, who), await admitted(quotas, who)
        with pytest.raises(TooManyRequests, match="2 requests at once"):
            await admitted(quotas, who)
        first.withdraw()
        await admitted(quotas, who)
        second.withdraw()
        with pytest.raises(TooManyRequests, match="3 requests per minute"):
            await admitted(quotas, who)
        assert local == 3
        assert quotas.headers(who)["x-ratelimit-remaining-requests"] == "0"
        before.withdraw()
        server.start()
        await back(redis)
        (await admitted(quotas, who)).withdraw()
        assert local == 3


async def test_what_was_used_in_an_outage_is_told_to_a_redis_that_kept_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate()
    who = tenant(
        f"t{uuid.uuid4().hex[:12]}",
        limits=TenantLimits(tokens_per_minute=1000),
        budgets=Budgets(day=Budget(tokens=100)),
    )

    async def recorded(tenant: str, start: datetime, end: datetime) -> tuple[int, int]:
        return 20, 0

    async with opened(await gate.start()) as redis:
        quotas = Quotas(FallbackLedger(redis), spent=recorded)
        used(await admitted(quotas, who, 10), 10, ended=True)
        long = await admitted(quotas, who, 5)
        gate.open = False
        monkeypatch.setattr("server.limits.redis.TIMEOUT_S", 1.0)
        for _ in range(2):
            used(await admitted(quotas, who, 10), 10, ended=True)
        assert quotas.ledger.spending(quotas.budget(who)).used["day"].tokens == 40
        with pytest.raises(TooManyRequests, match="of 100 tokens"):
            await admitted(quotas, who, 70)
        long.asks(3, 4, 1)
        assert await long.settle() is None, "it runs already, and needs more than it has reserved"
        used(long, 7, ended=True)
        monkeypatch.setattr("server.limits.redis.TIMEOUT_S", 60.0)
        gate.open = True
        await back(redis)
        await admitted(quotas, who, 1)
        spending = quotas.ledger.spending(quotas.budget(who))
        assert spending.used["day"].tokens == 20 + 10 + 20 + 7
        assert quotas.headers(who)["x-ratelimit-remaining-tokens"] == str(1000 - 10 - 20 - 7 - 1)
        assert len(redis._entries) == 1
    gate.close()


@pytest.mark.parametrize("fail", ["closed", "open"])
async def test_a_server_without_its_redis(
    server: RedisServer, tmp_path: Path, fail: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with fake_site(tmp_path, limits_redis_url=server.url, limits_fail=fail) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)}, limits={"requests_per_minute": 2})
        server.kill()
        with caplog.at_level(logging.ERROR):
            answers = [await site.chat(key, "hi", max_tokens=1) for _ in range(3)]
        ready = await site.http.get("/ready")
        page = (await site.http.get("/metrics")).text
        if fail == "closed":
            error(answers[0], 503, "limits_unavailable")
            assert ready.status_code == 503
            assert "loraplex_limited_locally_total 0.0" in page
        else:
            assert [answer.status_code for answer in answers] == [200, 200, 429]
            assert (ready.status_code, "limits" in ready.json()["checks"]) == (200, False)
            assert "loraplex_limited_locally_total 2.0" in page
            assert any("limits hold in each process" in text for text in caplog.messages)
