"""Health, readiness, metrics, drain and death, over real HTTP."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from adapters.errors import DatabaseUnavailable
from server.app import create_app, drain
from server.engine.calls import EngineDied
from server.http import services
from server.http.connection import DrainingServer
from server.settings import Settings
from tests.service.http.test_api import CHAT, CHAT_URL, digest, error
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    engine = FakeEngine(tiny.base(), times=Times(step=0.03))
    async with fake_site(tmp_path, engine, drain_timeout=0.3) as site:
        yield site


async def samples(site: Site) -> Samples:
    answer = await site.http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(of: Samples, name: str, **labels: str) -> float:
    return of[name, frozenset(labels.items())]


async def begun(site: Site, key: str, tokens: int = 500) -> asyncio.Task[str]:
    """A stream that is being produced, and that is read to its end."""

    async def read() -> str:
        body = {**CHAT, "max_tokens": tokens, "stream": True}
        async with site.http.stream("POST", CHAT_URL, json=body, headers=bearer(key)) as stream:
            return "".join([line async for line in stream.aiter_lines()])

    running = site.services.engine.running
    before = len(running)
    task = asyncio.create_task(read())
    async with asyncio.timeout(60):
        while len(running) == before or min(running[-1].produced.values()) < 2:
            await asyncio.sleep(0.005)
    return task


# --- readiness --------------------------------------------------------------------------------------


async def test_alive_and_ready(site: Site) -> None:
    alive = await site.http.get("/health")
    assert (alive.status_code, alive.json()) == (200, {"status": "alive"})
    ready = await site.http.get("/ready")
    assert ready.status_code == 200
    parts = ("engine", "database", "writes", "store", "room")
    assert ready.json() == {
        "status": "ready",
        **dict.fromkeys(("inference", "writes", "uploads"), "ok"),
        "checks": dict.fromkeys(parts, "ok"),
    }


@pytest.mark.parametrize("part", ["engine", "database", "writes", "store", "room"])
async def test_ready_says_apart_what_cannot_be_done(
    tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreachable() -> None:
        raise ConnectionRefusedError(f"{tmp_path}")

    engine = FakeEngine(tiny.base())
    async with fake_site(tmp_path, engine) as site:
        if part == "engine":
            engine.die()
        elif part == "database":
            monkeypatch.setattr(site.services.database, "ping", unreachable)
        elif part == "writes":
            monkeypatch.setattr(site.services.database, "ping_write", unreachable)
        elif part == "room":
            monkeypatch.setattr(site.services.intake, "reserve", 1 << 60)
        else:
            shutil.rmtree(tmp_path / "quarantine")
        ready = await site.http.get("/ready")
        said = ready.json()
        serves = part not in ("engine", "database")
        assert ready.status_code == (200 if serves else 503)
        assert said["status"] == ("ready" if serves else "not ready")
        assert said["inference"] == ("ok" if serves else part)
        assert said["writes"] == (part if part in ("database", "writes") else "ok")
        assert said["uploads"] == part
        assert [name for name, found in said["checks"].items() if found != "ok"] == [part]
        assert str(tmp_path) not in ready.text
        assert (await site.http.get("/health")).status_code == 200


# --- drain ------------------------------------------------------------------------------------------


async def test_a_drain_refuses_what_comes_and_lets_what_runs_end(tmp_path: Path) -> None:
    engine = FakeEngine(tiny.base(), times=Times(step=0.01))
    async with fake_site(tmp_path, engine, drain_timeout=30) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        stream = await begun(site, key, tokens=100)
        draining = asyncio.create_task(drain(site.app))
        async with asyncio.timeout(60):
            while (ready := await site.http.get("/ready")).status_code == 200:
                await asyncio.sleep(0)
        assert ready.json()["checks"] == {"draining": "yes"}
        assert ready.json()["inference"] == "draining"
        error(await site.chat(key, "hi"), 503, "shutting_down")
        assert (await site.http.get("/health")).status_code == 200
        assert (await site.http.get("/v1/models", headers=bearer(key))).status_code == 200
        await draining
        assert '" 99"' in await stream


async def test_a_drain_that_takes_too_long_cuts_what_runs(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "DRAIN_TOLD_S", 0.1)
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    streams = [await begun(site, key) for _ in range(2)]
    with caplog.at_level(logging.INFO, services.__name__):
        await drain(site.app)
    for text in await asyncio.gather(*streams):
        assert '"finish_reason": "abort"' in text
        assert text.endswith("data: [DONE]")
    told = [record.message for record in caplog.records if record.name == services.__name__]
    run = "2 requests of 1 customers run"
    assert told[0] == f"draining: {run}; what runs is cut after DRAIN_TIMEOUT, 0.3 s"
    assert told[1] == f"still draining: {run}; 0.2 s are left"
    assert told[-2] == "cut 2 requests that were still running"
    assert told[-1].startswith("drained, after ")
    assert value(await samples(site), "loraplex_requests_total", tenant="acme", outcome="cut") == 2


async def test_the_first_signal_drains(tmp_path: Path) -> None:
    engine = FakeEngine(tiny.base(), times=Times(step=0.01))
    async with fake_site(tmp_path, engine, drain_timeout=30) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        stream = await begun(site, key, tokens=100)
        server = DrainingServer(uvicorn.Config(site.app), site.services.drain)
        server.started = True
        server.handle_exit(signal.SIGTERM, None)
        async with asyncio.timeout(60):
            while not site.services.draining:
                await asyncio.sleep(0)
        assert not server.should_exit
        assert '" 99"' in await stream
        async with asyncio.timeout(60):
            while not server.should_exit:
                await asyncio.sleep(0.01)


async def test_the_second_signal_does_not_wait(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    stream = await begun(site, key)
    server = DrainingServer(uvicorn.Config(site.app), site.services.drain)
    server.started = True
    server.handle_exit(signal.SIGTERM, None)
    async with asyncio.timeout(60):
        while not site.services.draining:
            await asyncio.sleep(0)
    assert not server.should_exit
    server.handle_exit(signal.SIGTERM, None)
    assert server.should_exit
    await asyncio.sleep(0)
    told = [line for line in caplog.messages if line.startswith("SIGTERM")]
    assert told == [
        "SIGTERM: the server drains; a second signal ends it at once",
        "SIGTERM again: the server does not wait for what runs",
    ]
    stream.cancel()


async def test_the_server_leaves_when_told_and_keeps_the_date() -> None:
    config = uvicorn.Config(lambda: None)
    config.load()

    async def drained() -> None:
        return

    server = DrainingServer(config, drained)
    serving = asyncio.create_task(server.main_loop())
    await asyncio.sleep(0)
    (date,) = (value for name, value in server.server_state.default_headers if name == b"date")
    server.server_state.default_headers = []
    async with asyncio.timeout(60):
        while not server.server_state.default_headers:
            await asyncio.sleep(0.01)
    assert parsedate_to_datetime(date.decode()).tzinfo is not None
    server.should_exit = True
    async with asyncio.timeout(60):
        await serving


async def test_who_waits_for_it_is_told_when_the_server_takes_connections() -> None:
    """A replica announces itself then: gateways ask it at once."""
    told: list[int] = []

    def listening() -> None:
        port = server.servers[0].sockets[0].getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), 60):
            told.append(port)
        server.should_exit = True

    async def drained() -> None:
        return

    config = uvicorn.Config(lambda: None, port=0, lifespan="off", log_config=None)
    server = DrainingServer(config, drained, listening)
    async with asyncio.timeout(60):
        await server.serve()
    assert len(told) == 1


# --- death ------------------------------------------------------------------------------------------


async def test_the_engines_death(tmp_path: Path) -> None:
    deaths: list[EngineDied] = []
    engine = FakeEngine(tiny.base(), max_running=1, times=Times(step=0.03))
    async with fake_site(tmp_path, engine, on_death=deaths.append, engine_restarts=0) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        stream = await begun(site, key)
        waiting = [asyncio.create_task(site.chat(key, "hi", stream=i > 0)) for i in range(2)]
        async with asyncio.timeout(60):
            while site.services.dispatcher.snapshot().queued != {"acme": 2}:
                await asyncio.sleep(0.005)
        engine.die()
        text = await stream
        assert '"code": "engine_stopped"' in text.replace('":"', '": "')
        assert text.endswith("data: [DONE]")
        for response in await asyncio.gather(*waiting):
            error(response, 503, "engine_stopped")
        async with asyncio.timeout(60):
            while not deaths:
                await asyncio.sleep(0.01)
        error(await site.chat(key, "hi"), 503, "engine_stopped")
        assert (await site.http.get("/ready")).status_code == 503
        assert len(deaths) == 1


async def test_an_engine_that_does_not_start_leaves_nothing_open(tmp_path: Path) -> None:
    async def fail(_: Settings) -> FakeEngine:
        raise ValueError("no such model")

    app = create_app(tiny.settings(tmp_path), start_engine=fail)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no such model"):
        async with app.router.lifespan_context(app):
            raise AssertionError("it started")
    async with fake_site(tmp_path) as site:
        assert (await site.http.get("/ready")).status_code == 200


# --- metrics ----------------------------------------------------------------------------------------


async def test_metrics_add_up(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2), "c": tiny.adapter(3)})
    for seed in (4, 5, 6):
        await site.upload("acme", "a", tiny.adapter(seed))
    usage: Counter[str] = Counter()
    for model in ("a", "b", "c", "a@1"):
        answered = await site.chat(key, "one two three", model=model, max_tokens=5)
        usage.update(answered.json()["usage"])
    await (await begun(site, key, tokens=7))
    await site.chat(key, "hi", model="nobody")
    await site.chat(key, "hi", n=100)
    stream = await begun(site, key, tokens=400)
    now = await samples(site)
    assert value(now, "loraplex_running", tenant="acme") == 1
    stream.cancel()
    assert await site.services.dispatcher.wait_until_idle(60)
    now = await samples(site)
    outcomes = {
        dict(labels)["outcome"]: count
        for (name, labels), count in now.items()
        if name == "loraplex_requests_total" and count
    }
    assert outcomes == {"completed": 5, "rejected": 2, "disconnected": 1}
    output = value(now, "loraplex_output_tokens_total", tenant="acme")
    assert usage["completion_tokens"] + 7 < output < usage["completion_tokens"] + 7 + 400
    assert value(now, "loraplex_prompt_tokens_total", tenant="acme") == usage["prompt_tokens"] + 3 + 3
    assert value(now, "loraplex_queue_seconds_count", tenant="acme") == 6
    assert value(now, "loraplex_time_to_first_token_seconds_count", tenant="acme") == 2
    gaps = value(now, "loraplex_inter_token_latency_seconds_count", tenant="acme")
    assert gaps == output - usage["completion_tokens"] - 2
    tiers = {tier: value(now, "loraplex_adapters", tier=tier) for tier in ("disk", "host", "gpu")}
    assert sum(tiers.values()) == 6, "versions are counted, not adapters"
    assert tiers["gpu"] == value(now, "loraplex_gpu_slots_used") <= value(now, "loraplex_gpu_slots") == 2
    assert value(now, "loraplex_host_slots") == 4
    assert (
        value(now, "loraplex_stage_seconds_count") == value(now, "loraplex_activation_seconds_count") - 1 >= 4
    )
    assert value(now, "loraplex_in_step_loads") == 0
    assert ("loraplex_running", frozenset({("tenant", "acme")})) not in now


async def test_only_so_many_tenants_have_a_label(tmp_path: Path) -> None:
    async with fake_site(tmp_path, metrics_tenants=2) as site:
        for i in range(4):
            await site.chat(await site.tenant(f"t{i}"), "hi", model=tiny.NAME)
        now = await samples(site)
        counts = {
            dict(labels)["tenant"]: count
            for (name, labels), count in now.items()
            if name == "loraplex_requests_total" and count
        }
        assert counts == {"t0": 1, "t1": 1, "other": 2}


# --- a crowd ----------------------------------------------------------------------------------------


async def test_fifty_clients_of_ten_adapters_in_two_slots_get_their_own(tmp_path: Path) -> None:
    times = Times(stage=0.01, activate=0.002, step=0.001, page=0.001)
    engine = FakeEngine(tiny.base(), gpu_slots=2, host_slots=4, max_running=8, times=times)
    async with fake_site(tmp_path, engine, slot_patience=0.05) as site:
        keys = [await site.tenant(f"t{i}", {"support": tiny.adapter(i)}) for i in range(10)]
        own = [await digest(site, f"t{i}", "support") for i in range(10)]
        assert len(set(own)) == 10
        order = random.Random(1)

        async def client(number: int) -> None:
            who = number % 10
            for turn in range(3):
                stream = (number + turn) % 2 == 0
                tokens = order.randint(1, 12)
                answered = await site.chat(
                    keys[who], "hi", model="support", max_tokens=tokens, stream=stream, n=1 + number % 2
                )
                assert answered.status_code == 200, answered.text
                assert own[who] in answered.text
                assert not any(other in answered.text for other in own if other != own[who])

        await asyncio.gather(*(client(number) for number in range(50)))
        assert await site.services.dispatcher.wait_until_idle(60)
        now = await samples(site)
        completed = [
            value(now, "loraplex_requests_total", tenant=f"t{i}", outcome="completed") for i in range(10)
        ]
        assert completed == [15] * 10
        assert engine.most_running <= 8
        assert value(now, "loraplex_evictions_total", tier="gpu") > 0


def in_flight(site: Site) -> int:
    now = site.services.dispatcher.snapshot()
    return sum(now.queued.values()) + sum(now.running.values())


async def test_a_client_is_not_kept_waiting_by_others_that_leave(site: Site) -> None:
    keys = {who: await site.tenant(who, {"a": tiny.adapter(i)}) for i, who in enumerate(("rude", "kind"))}
    rude = [asyncio.create_task(site.chat(keys["rude"], "hi", max_tokens=500)) for _ in range(20)]
    async with asyncio.timeout(60):
        while in_flight(site) < 20:
            await asyncio.sleep(0.01)
        for task in rude:
            task.cancel()
        results = await asyncio.gather(*rude, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError | httpx.HTTPError) for result in results)
        assert (await site.chat(keys["kind"], "hi", max_tokens=2)).status_code == 200
    assert await site.services.dispatcher.wait_until_idle(60)
    now = await samples(site)
    assert value(now, "loraplex_requests_total", tenant="rude", outcome="disconnected") == 20


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
async def test_a_load_balancer_may_ask_for_the_head_alone(site: Site, path: str) -> None:
    head, whole = await site.http.head(path), await site.http.get(path)
    assert (head.status_code, head.content) == (whole.status_code, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]


@pytest.mark.parametrize("way", ["fails", "hangs"])
async def test_the_page_of_metrics_is_there_while_the_database_is_not(
    site: Site, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the last counts of what only the database knows."""
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    before = await samples(site)
    assert (
        value(before, "loraplex_adapters", tier="gpu") + value(before, "loraplex_adapters", tier="disk") == 1
    )

    @asynccontextmanager
    async def away() -> AsyncIterator[None]:
        if way == "hangs":
            await asyncio.Event().wait()
        raise DatabaseUnavailable("The database does not answer.")
        yield

    await site.chat(key, "hi", model="a", max_tokens=2)
    if way == "hangs":
        monkeypatch.setattr("server.http.operations.CHECK_SECONDS", 0.2)
    monkeypatch.setattr(site.services.database, "read", away)
    during = await samples(site)
    told = [name for name in before if name[0] == "loraplex_adapters"]
    assert sum(during[name] for name in told) == 1
    for name in ("loraplex_quarantined_versions", "loraplex_differing_versions"):
        assert value(during, name) == value(before, name) == 0
    assert value(during, "loraplex_requests_total", tenant="acme", outcome="completed") == 1
