"""Prompts that a rollout keeps and replays: whose, how long, unreadable where they lie, what they show."""

from __future__ import annotations

import asyncio
import logging
import re
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from server.errors import Unavailable
from server.rollouts.sampler import Sampler
from tests.service.http.test_api import error
from tests.service.rollouts.test_rollouts import ADAPTER, QUICK, ROLLOUTS, adapter, begun, has_ended, until
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.fleet import Fleet, fleet
from tests.support.site import Site, waits_at_most
from tests.support.tiny import fake_site

KEY = "a key of the tests that is long enough"
SECRET = "the aardvark's account is 4711"
STEPS = {"steps": [50, 100], "hold": 0}
# Guards that real requests decide at once, beside those under test.
OTHERS = QUICK["guards"] | {"length": None, "finish": None, "min_samples": 1}  # type: ignore[operator]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path, FakeEngine(tiny.base()), rollout_key=KEY) as site:
        yield site


def sampler_of(site: Site) -> Sampler:
    sampler: Sampler = site.services.judge.replayer.sampler
    sampler._every = 0.001
    return sampler


async def two(site: Site, second: int, *, agrees: bool = True) -> str:
    """Versions 1, live, and 2; the customer's key."""
    key = await site.tenant("acme", {"a": tiny.adapter(1)}, sample_prompts=agrees)
    await site.upload("acme", "a", tiny.adapter(second))
    await site.admin.patch(ADAPTER, json={"live": 1})
    sampler_of(site)
    return key


def asking(site: Site, key: str) -> Callable[[int], Awaitable[None]]:
    async def ask(number: int) -> None:
        assert (await site.chat(key, SECRET, model="a", max_tokens=2)).status_code == 200
        site.services.judge.begun.set()  # to be looked at now

    return ask


async def stored(folder: Path) -> list[tuple[Any, ...]]:
    """Read in a thread: the server, in this process, may be writing."""

    def read() -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(f"file:{folder / 'loraplex.db'}?mode=ro", uri=True)) as database:
            return list(database.execute("SELECT sealed, result FROM rollout_prompts"))

    return await asyncio.to_thread(read)


def bytes_of(folder: Path) -> bytes:
    """All that the database has written, its log too."""
    return b"".join(path.read_bytes() for path in folder.glob("loraplex.db*"))


def replays(found: dict[str, Any]) -> Any:
    return (found["numbers"] or {}).get("replays")


async def test_equal_versions_do_not_drift_and_nothing_stays(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("server", "adapters", "loraplex"):
        caplog.set_level(logging.DEBUG, logger=name)
    key = await two(site, 1)
    id_ = await begun(site, guards=OTHERS | {"changed": 0.5, "drift": 0.1, "divergence": 0.1}, **STEPS)
    ended = await until(site, id_, has_ended, asking(site, key))
    assert (ended["state"], await adapter(site)) == ("completed", (2, None)), ended
    shown = replays(ended)
    assert shown["prompts"] >= 5
    assert shown | {"prompts": 0, "tokens": 0} == {
        "prompts": 0, "failed": 0, "tokens": 0, "changed": 0, "drift": 0, "divergence": 0, "largest_drift": 0
    }  # fmt: skip
    assert await stored(tmp_path) == [], "all of it went with the rollout"
    written = bytes_of(tmp_path)
    assert SECRET.encode() not in written
    assert b"aardvark" not in written
    assert caplog.records
    assert "aardvark" not in caplog.text
    metrics = (await site.http.get("/metrics")).text
    (counted,) = re.findall(r'loraplex_rollout_replays_total\{outcome="compared"\} (\S+)', metrics)
    assert float(counted) >= shown["prompts"], "the last ones may have come too late to be taken in"
    assert re.search(r"loraplex_rollout_replay_tokens_total [1-9]", metrics)
    usage = (await site.admin.get("/admin/v1/usage?tenant=acme&by=endpoint")).json()["data"]
    requests = (await site.admin.get("/admin/v1/requests?tenant=acme&limit=1000")).json()["data"]
    assert {row["endpoint"] for row in usage} == {"chat"}, "nobody is billed for a replay"
    assert {row["endpoint"] for row in requests} == {"chat"}


async def test_another_adapter_drifts_and_goes_back(site: Site) -> None:
    key = await two(site, 2)
    id_ = await begun(site, guards=OTHERS | {"drift": 0.0001}, **STEPS)
    ended = await until(site, id_, has_ended, asking(site, key))
    assert (ended["state"], ended["reason"]) == (
        "rolled_back",
        "the new version gives its tokens other probabilities",
    )
    shown = replays(ended)
    assert shown["drift"] > 0
    assert shown["divergence"] > 0
    assert ended["decisions"][-1]["numbers"]["replays"] == shown


async def kept(site: Site, key: str) -> str:
    """A rollout with a prompt that waits; nobody replays it."""

    async def never(_: Any) -> None:
        return

    site.services.judge.replayer.replay = never
    id_ = await begun(site, **STEPS | {"hold": 3600})
    await until(site, id_, lambda found: found["share"] == 50)
    async with asyncio.timeout(60):
        while not await site.services.judge.replayer.sampler.prompts.waiting():
            await asking(site, key)(0)
            await asyncio.sleep(0.05)
    return id_


async def test_a_kept_prompt_is_unreadable_and_goes_when_the_rollout_ends(site: Site, tmp_path: Path) -> None:
    key = await two(site, 2)
    id_ = await kept(site, key)
    ((sealed, result), *_) = await stored(tmp_path)
    assert (result, b"aardvark" in sealed) == (None, False)
    assert b"aardvark" not in bytes_of(tmp_path)
    assert (await site.admin.post("/admin/v1/backup", json={})).status_code == 201
    copies = [path for path in site.services.settings.backup_dir.rglob("*") if path.is_file()]
    assert copies
    assert not any(b"aardvark" in path.read_bytes() for path in copies)
    cipher = sampler_of(site).cipher
    assert cipher is not None
    assert SECRET in str(cipher.open(id_, sealed))
    assert cipher.open("another rollout", sealed) is None
    await site.admin.patch(f"{ROLLOUTS}/{id_}", json={"action": "roll_back"})
    assert await stored(tmp_path) == []
    await asking(site, key)(0)
    await asyncio.sleep(0.1)
    assert await stored(tmp_path) == []


async def test_it_goes_with_the_consent_and_with_the_tenant(site: Site, tmp_path: Path) -> None:
    key = await two(site, 2)
    await kept(site, key)
    changed = await site.admin.patch("/admin/v1/tenants/acme", json={"sample_prompts": False})
    assert (changed.json()["sample_prompts"], await stored(tmp_path)) == (False, [])
    for _ in range(5):
        await asking(site, key)(0)
    await asyncio.sleep(0.1)
    assert await stored(tmp_path) == [], "and no other one is kept"
    await site.admin.patch("/admin/v1/tenants/acme", json={"sample_prompts": True})
    async with asyncio.timeout(60):
        while not await stored(tmp_path):
            await asking(site, key)(0)
            await asyncio.sleep(0.05)
    await site.admin.delete("/admin/v1/tenants/acme")
    assert await stored(tmp_path) == []


async def test_it_goes_at_a_start_with_another_key_or_none(tmp_path: Path) -> None:
    async def start(key: str | None) -> int:
        async with fake_site(tmp_path, FakeEngine(tiny.base()), rollout_key=key) as site:
            site.services.judge.replayer.replay = lambda _: asyncio.sleep(0)
            return int(await site.services.judge.replayer.sampler.prompts.waiting())

    async with fake_site(tmp_path, FakeEngine(tiny.base()), rollout_key=KEY) as site:
        key = await two(site, 2)
        await kept(site, key)
    assert await stored(tmp_path)
    assert await start("another key of the tests, long enough") == 0
    async with fake_site(tmp_path, FakeEngine(tiny.base()), rollout_key=KEY) as site:
        sampler_of(site)
        site.services.judge.replayer.replay = lambda _: asyncio.sleep(0)
        async with asyncio.timeout(60):
            while not await stored(tmp_path):
                await asking(site, key)(0)
                await asyncio.sleep(0.05)
    assert await start(None) == 0


async def test_nothing_is_kept_of_who_has_not_agreed(site: Site, tmp_path: Path) -> None:
    key = await two(site, 2, agrees=False)
    refused = await site.admin.post(ROLLOUTS, json=QUICK | {"guards": {"drift": 0.1}})
    error(refused, 422, "unprocessable", "guards.drift")
    id_ = await begun(site, guards=OTHERS, **STEPS)
    ended = await until(site, id_, has_ended, asking(site, key))
    assert (ended["state"], replays(ended), await stored(tmp_path)) == ("completed", None, [])


async def test_without_a_key_nothing_is_kept_and_such_guards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rollout_key"):
        tiny.settings(tmp_path, rollout_key="short")
    async with fake_site(tmp_path / "none", FakeEngine(tiny.base())) as site:
        await two(site, 2)
        refused = await site.admin.post(ROLLOUTS, json=QUICK | {"guards": {"changed": 0.1}})
        error(refused, 422, "unprocessable", "guards.changed")
        assert "LORAPLEX_ROLLOUT_KEY" in refused.json()["error"]["message"]


async def test_a_rollout_whose_prompts_are_no_longer_kept_says_so(site: Site) -> None:
    key = await two(site, 2)
    id_ = await begun(site, guards=OTHERS | {"changed": 0.9}, **STEPS)
    await until(site, id_, lambda found: found["share"] == 50)
    await site.admin.patch("/admin/v1/tenants/acme", json={"sample_prompts": False})
    for _ in range(60):
        await asking(site, key)(0)
    found = await until(site, id_, lambda found: "no longer kept" in (found["waits_for"] or ""))
    assert found["state"] == "running"


async def test_a_replay_that_breaks_off_is_tried_again_and_then_given_up(site: Site) -> None:
    key = await two(site, 2)
    engine: Any = site.services.engine
    whole = engine.answer

    async def broken(call: Any, request: Any) -> Any:
        if call.kind == "completion":
            raise RuntimeError(f"it chokes on {SECRET}")
        return await whole(call, request)

    engine.answer = broken
    id_ = await begun(site, **STEPS | {"hold": 3600})
    found = await until(site, id_, replays, asking(site, key))
    engine.answer = whole
    assert (replays(found)["prompts"], replays(found)["failed"] > 0) == (0, True)
    after = await until(site, id_, lambda found: replays(found)["prompts"])
    assert replays(after)["failed"] >= replays(found)["failed"]


async def test_replays_go_on_beside_others_who_always_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of a replay's answers waits longer for its turn than the queue lasts."""
    monkeypatch.setattr("server.rollouts.replay.ANSWER_TOKENS", 4)
    monkeypatch.setattr("server.rollouts.replay.ASK_AGAIN_S", 0.05)
    engine = FakeEngine(tiny.base(), times=Times(step=0.002), max_running=1)
    async with fake_site(tmp_path, engine, rollout_key=KEY) as site:
        key = await two(site, 2)
        replayer = site.services.judge.replayer
        replay = replayer.replay
        id_ = await kept(site, key)
        waits_at_most(site, 0.3)
        other, refusals = await site.tenant("globex", base_allowed=True), 0

        async def flood() -> None:
            while True:
                await site.chat(other, "word " * 20, model=tiny.NAME, max_tokens=20)

        flooding = [asyncio.create_task(flood()) for _ in range(3)]
        opened = replayer._completions.answers.open

        async def counted(order: Any) -> Any:
            nonlocal refusals
            try:
                return await opened(order)
            except Unavailable:
                refusals += order.tenant.background
                raise

        monkeypatch.setattr(replayer._completions.answers, "open", counted)
        replayer.replay = replay
        site.services.judge.begun.set()
        shown = replays(await until(site, id_, replays))
        for task in flooding:
            task.cancel()
        await asyncio.gather(*flooding, return_exceptions=True)
    assert (shown["failed"], shown["prompts"]) == (0, 1)
    assert refusals, "it never had to wait that long"


async def test_a_gateway_replays_at_its_replicas(tmp_path: Path) -> None:
    async with fleet(tmp_path, 2, rollout_key=KEY) as found:
        assert isinstance(found, Fleet)
        site = found.gateway
        key = await two(site, 2)
        id_ = await begun(site, **STEPS | {"hold": 3600})
        shown = replays(await until(site, id_, replays, asking(site, key)))
        assert (shown["failed"], shown["prompts"] > 0, shown["drift"] > 0) == (0, True, True)
