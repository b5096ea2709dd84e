"""A version out of service: refused, shown, audited, counted, kept over a restart, and released."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.errors import StorageBusy, StorageFull
from adapters.model import Version
from adapters.store.quarantine import Quarantine
from server.engine.calls import Answer, Call
from server.errors import Internal
from server.http import services as of_services
from server.publishing import quarantine as use_case
from server.publishing.quarantine import quarantine
from tests.service.http.test_api import error
from tests.service.publishing.test_upload import URL, files
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

ADAPTER = "/admin/v1/tenants/acme/adapters/a"


def engine(step: float = 0.001) -> FakeEngine:
    """``step`` is in seconds, for a token."""
    return FakeEngine(tiny.base(), times=Times(step=step))


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path, engine()) as site:
        await two_versions(site)
        yield site


async def two_versions(site: Site) -> None:
    await site.admin.post("/admin/v1/tenants", json={"id": "acme"})
    for seed in (1, 2):
        assert (await site.admin.post(URL, files=files(seed))).status_code == 201


async def key(site: Site, *scopes: str) -> dict[str, str]:
    body = {"scopes": scopes} if scopes else {}
    return bearer((await site.admin.post("/admin/v1/tenants/acme/keys", json=body)).json()["key"])


async def ask(site: Site, headers: dict[str, str], model: str = "a", **more: Any) -> Any:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4} | more
    return await site.http.post("/v1/chat/completions", json=body, headers=headers)


async def out(site: Site, number: int, *reasons: str) -> None:
    version = await site.services.publishing.catalog.version("acme", "a", number)
    for reason in reasons or ("it made NaN",):
        await quarantine(site.services.publishing.quarantine, site.services.dispatcher, version, reason)


def _outcomes(page: str) -> dict[str, int]:
    """How many requests ended how, of all tenants, on a page of metrics."""
    found = re.findall(r'^loraplex_requests_total\{outcome="(\w+)",[^}]*\} (\d+)', page, re.MULTILINE)
    return {outcome: int(count) for outcome, count in found if int(count)}


async def shown(site: Site) -> dict[int, Any]:
    versions = (await site.admin.get(ADAPTER)).json()["versions"]
    return {version["version"]: version["quarantine"] for version in versions}


async def test_a_quarantined_version_is_refused_with_the_reason_and_shown(site: Site) -> None:
    headers = await key(site)
    assert (await ask(site, headers)).status_code == 200
    await out(site, 2, "it made NaN", "the engine died")
    for model in ("a", "a@2"):
        refused = error(await ask(site, headers, model), 409, "adapter_quarantined")
        assert "it made NaN" in refused["message"]
    rows = (await site.admin.get("/admin/v1/requests", params={"limit": 2})).json()["data"]
    assert [(row["adapter"], row["version"], row["outcome"], row["code"]) for row in rows] == [
        ("a", 2, "quarantined", "adapter_quarantined")
    ] * 2, "the operator is asked which one it was"
    counted = _outcomes((await site.http.get("/metrics")).text)
    assert counted == {"completed": 1, "quarantined": 2}, "the alert on errors is of others"
    assert (await ask(site, headers, "a@1")).status_code == 200
    found = await shown(site)
    assert found[1] is None
    assert found[2]["reason"] == "it made NaN", "the first reason stays"
    assert "loraplex_quarantined_versions 1.0" in (await site.http.get("/metrics")).text
    for path in ("warm", "verify"):
        error(await site.admin.post(f"{ADAPTER}/{path}"), 409, "adapter_quarantined")


def written_at_the_fourth_time(monkeypatch: pytest.MonkeyPatch, fails: Exception) -> list[str]:
    """The reasons with which a row was to be written so far; one that ``fails`` is tried again at once."""
    plain, tried = Quarantine.put, list[str]()

    async def put(rows: Quarantine, version: Version, reason: str) -> bool:
        tried.append(reason)
        if len(tried) < 4:
            raise fails
        return await plain(rows, version, reason)

    monkeypatch.setattr(Quarantine, "put", put)
    monkeypatch.setattr(use_case, "AGAIN_S", 0.01)
    return tried


async def test_what_makes_nan_while_the_database_is_busy_is_quarantined_after_all(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = written_at_the_fourth_time(monkeypatch, StorageBusy("Something holds the database."))
    version = await site.services.publishing.catalog.version("acme", "a", 2)
    for _ in range(20):  # answers, each of which says so
        site.services.engine.on_fault(version.key, "it made NaN")
    async with asyncio.timeout(60):
        while not (await shown(site))[2]:
            await asyncio.sleep(0.01)
    assert tried == ["it made NaN"] * 4
    assert caplog.text.count("its row waits") == 1
    error(await ask(site, await key(site)), 409, "adapter_quarantined")


async def test_a_version_is_out_of_service_while_its_row_waits_for_the_database(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also its waiting and running requests, its pin, and the same files under another name."""
    plain, free = Quarantine.put, asyncio.Event()

    async def full(rows: Quarantine, version: Version, reason: str) -> bool:
        if not free.is_set():
            raise StorageFull("The disk is full.")
        return await plain(rows, version, reason)

    monkeypatch.setattr(Quarantine, "put", full)
    monkeypatch.setattr(use_case, "AGAIN_S", 0.01)
    assert (await site.admin.post(URL.replace("/a/", "/b/"), files=files(2))).status_code == 201
    headers, dispatcher = await key(site), site.services.dispatcher
    version = await site.services.publishing.catalog.version("acme", "a", 2)
    site.services.engine.times.step = 0.05
    runs = asyncio.create_task(ask(site, headers, "a@2", max_tokens=2000))
    async with asyncio.timeout(60):
        while not dispatcher.open_leases():
            await asyncio.sleep(0.01)
    site.services.engine.on_fault(version.key, "it made NaN")
    for model in ("a", "a@2", "b"):
        refused = error(await ask(site, headers, model), 409, "adapter_quarantined")
        assert "it made NaN" in refused["message"]
    assert "it made NaN" in (await runs).text
    error(await site.admin.post(f"{ADAPTER}/warm"), 409, "adapter_quarantined")
    dispatcher.pin(version, True)
    assert all(slot.version != version.key for slot in dispatcher.snapshot().slots)
    assert not (await shown(site))[2], "the row is not there yet"
    site.services.engine.times.step = 0.001
    assert (await ask(site, headers, "a@1")).status_code == 200
    free.set()
    async with asyncio.timeout(60):
        while not (await shown(site))[2] or dispatcher.out_of_service.has(version):
            await asyncio.sleep(0.01)
    error(await ask(site, headers), 409, "adapter_quarantined")
    assert (await site.admin.patch(ADAPTER, json={"quarantined": False})).status_code == 200
    assert (await ask(site, headers)).status_code == 200, "from then on the row decides"


async def test_another_version_of_its_files_does_not_put_it_back_while_its_row_waits(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does one that is gone, which has no row to wait for."""

    async def busy(_rows: Quarantine, _version: Version, _reason: str) -> bool:
        raise StorageBusy("Something holds the database.")

    monkeypatch.setattr(Quarantine, "put", busy)
    headers, services = await key(site), site.services
    version = await services.publishing.catalog.version("acme", "a", 2)
    services.engine.on_fault(version.key, "it made NaN")
    others = set(services.tasks)
    services.engine.on_fault(f"acme/gone@{version.digest}", "it made NaN, too")
    (other,) = services.tasks - others
    await other
    assert "it made NaN." in error(await ask(site, headers, "a@2"), 409, "adapter_quarantined")["message"]


async def test_an_operator_takes_the_only_version_out_of_service_and_nobody_else(site: Site) -> None:
    """What runs on it ends, with the reason."""
    headers, owner, url = await key(site), await key(site, "adapters:write"), f"{ADAPTER}/versions/2"
    assert (await site.admin.delete(f"{ADAPTER}/versions/1")).status_code == 204
    for body in ({"quarantined": True}, {"quarantined": True, "reason": "it is mine"}):
        refused = await site.http.patch("/v1/adapters/a/versions/2", json=body, headers=owner)
        error(refused, 403, "permission_denied", "quarantined")
    for body in ({"reason": "it ends the engine"}, {"quarantined": False, "reason": "it is well"}):
        assert (await site.admin.patch(url, json=body)).status_code == 422
    assert (await site.admin.patch(f"{ADAPTER}/versions/9", json={"quarantined": True})).status_code == 404
    site.services.engine.times.step = 0.05
    runs = asyncio.create_task(ask(site, headers, max_tokens=2000))
    async with asyncio.timeout(60):
        while not site.services.dispatcher.open_leases():
            await asyncio.sleep(0.01)
    taken = await site.admin.patch(url, json={"quarantined": True, "reason": "it ends the engine"})
    assert taken.status_code == 200, taken.text
    assert (await shown(site))[2]["reason"] == "it ends the engine"
    assert "it ends the engine" in (await runs).text
    assert "it ends the engine" in error(await ask(site, headers), 409, "adapter_quarantined")["message"]
    site.services.engine.times.step = 0.001
    assert (await site.admin.patch(url, json={"quarantined": False})).status_code == 200
    assert (await ask(site, headers)).status_code == 200


async def test_what_the_last_engine_was_lost_to_is_out_of_service_after_the_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ends in the same moment, when that was one loss too many."""
    plain = Quarantine.put

    async def slow(rows: Quarantine, version: Version, reason: str) -> bool:
        await asyncio.sleep(1)
        return await plain(rows, version, reason)

    monkeypatch.setattr(Quarantine, "put", slow)
    monkeypatch.setattr(of_services, "LASTING_S", 60.0)
    async with fake_site(tmp_path, engine()) as site:
        await two_versions(site)
        version = await site.services.publishing.catalog.version("acme", "a", 2)
        site.services.engine.on_fault(version.key, "it ended the engine")
    async with fake_site(tmp_path, engine()) as site:
        error(await ask(site, await key(site)), 409, "adapter_quarantined")


async def test_a_defect_while_its_row_is_written_is_logged_and_it_stays_out_of_service(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written_at_the_fourth_time(monkeypatch, ZeroDivisionError("a defect"))
    version = await site.services.publishing.catalog.version("acme", "a", 2)
    site.services.engine.on_fault(version.key, "it made NaN")
    headers = await key(site)
    error(await ask(site, headers), 409, "adapter_quarantined")
    async with asyncio.timeout(60):
        while not (await shown(site))[2]:
            await asyncio.sleep(0.01)
    assert caplog.text.count("its row waits") == 1
    assert "ZeroDivisionError: a defect" in caplog.text
    error(await ask(site, headers), 409, "adapter_quarantined")


@pytest.mark.parametrize("url", [ADAPTER, f"{ADAPTER}/versions/2"])
async def test_an_operator_releases_it_and_nobody_else(site: Site, url: str) -> None:
    headers = await key(site)
    await out(site, 2)
    owner = await key(site, "adapters:write")
    refused = await site.http.patch("/v1/adapters/a", json={"quarantined": False}, headers=owner)
    error(refused, 403, "permission_denied", "quarantined")
    released = await site.admin.patch(url, json={"quarantined": False})
    assert released.status_code == 200, released.text
    assert await shown(site) == {1: None, 2: None}
    assert (await ask(site, headers)).status_code == 200
    assert (await site.admin.patch(url, json={"quarantined": False})).status_code == 200, "again"
    changes = {
        row["action"]: row for row in (await site.admin.get("/admin/v1/audit?tenant=acme")).json()["data"]
    }
    assert changes["version.quarantine"]["after"]["reason"] == "it made NaN"
    assert changes["version.release"]["before"]["reason"] == "it made NaN"
    assert changes["version.release"]["target"] == "a@2"


@pytest.mark.parametrize("change", [{"live": 9}, {"split": {"1": 50, "9": 50}}])
async def test_a_change_that_is_refused_releases_nothing(site: Site, change: dict[str, Any]) -> None:
    await out(site, 2)
    refused = await site.admin.patch(ADAPTER, json={"quarantined": False, **change})
    error(refused, 404, "version_not_found", *change)
    assert (await shown(site))[2] is not None


async def test_a_rollout_keeps_the_split_and_the_quarantine(site: Site) -> None:
    await out(site, 2)
    assert (await site.admin.post(URL, files=files(3))).status_code == 201
    assert (await site.admin.post(f"{ADAPTER}/rollouts", json={"version": 1})).status_code == 201
    await out(site, 3)
    refused = await site.admin.patch(ADAPTER, json={"quarantined": False, "split": None})
    error(refused, 409, "rollout_running")
    assert (await shown(site))[3] is not None


async def test_the_version_that_is_made_live_is_the_one_that_is_released(site: Site) -> None:
    for number in (1, 2):
        await out(site, number)
    changed = await site.admin.patch(ADAPTER, json={"live": 1, "quarantined": False})
    assert changed.status_code == 200, changed.text
    quarantined = await shown(site)
    assert (quarantined[1], bool(quarantined[2])) == (None, True)
    assert (await ask(site, await key(site))).status_code == 200


async def test_releasing_a_version_that_is_not_there(site: Site) -> None:
    missing = await site.admin.patch(f"{ADAPTER}/versions/9", json={"quarantined": False})
    error(missing, 404, "version_not_found")


async def test_the_same_files_do_not_come_back_by_another_upload(site: Site) -> None:
    await out(site, 2)
    error(await site.admin.post(URL, files=files(2)), 409, "adapter_quarantined")
    error(await site.admin.post(URL.replace("/a/", "/b/"), files=files(2)), 409, "adapter_quarantined")
    assert (await site.admin.post(URL, files=files(3))).status_code == 201
    await site.admin.post("/admin/v1/tenants", json={"id": "other"})
    others = await site.admin.post(URL.replace("acme", "other"), files=files(2))
    assert others.status_code == 201, "another customer learns nothing"


async def test_a_split_goes_on_without_it(site: Site) -> None:
    headers = await key(site)
    await site.admin.patch(ADAPTER, json={"split": {"1": 1, "2": 99}})
    await out(site, 2)
    answers = [await ask(site, headers, user=f"u{n}") for n in range(8)]
    assert {answer.status_code for answer in answers} == {200}
    await out(site, 1)
    error(await ask(site, headers), 409, "adapter_quarantined")


async def test_running_requests_end_with_an_error(tmp_path: Path) -> None:
    async with fake_site(tmp_path, engine(step=0.05)) as site:
        await two_versions(site)
        headers = await key(site)
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 200}
        body |= {"model": "a", "stream": True}
        async with site.http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            lines = response.aiter_lines()
            await anext(lines)
            await out(site, 2)
            async with asyncio.timeout(60):
                rest = [line async for line in lines if line.startswith("data: {")]
        last = json.loads(rest[-1].removeprefix("data: "))
        assert "it made NaN" in last["error"]["message"]


async def test_what_waits_is_refused_at_once(tmp_path: Path) -> None:
    slow = FakeEngine(tiny.base(), times=Times(step=0.2), max_running=1)
    async with fake_site(tmp_path, slow) as site:
        await two_versions(site)
        headers = await key(site)
        runs = asyncio.create_task(ask(site, headers, "a@1", max_tokens=200))
        waits = [asyncio.create_task(ask(site, headers, "a@2", stream=stream)) for stream in (True, False)]
        async with asyncio.timeout(60):
            while site.services.dispatcher.snapshot().queued != {"acme": 2}:
                await asyncio.sleep(0.01)
        await out(site, 2)
        async with asyncio.timeout(60):
            for refused in await asyncio.gather(*waits):
                assert "it made NaN" in error(refused, 409, "adapter_quarantined")["message"]
        assert not runs.done()
        runs.cancel()


async def test_the_guilty_one_of_two_suspects_is_found_also_after_a_restart(tmp_path: Path) -> None:
    def lived(step: float) -> FakeEngine:
        return FakeEngine(tiny.base(), times=Times(step=step, start=0.1))

    first = lived(0.05)
    async with fake_site(tmp_path, first, engine_restarts=5) as site:
        await two_versions(site)
        headers = await key(site)
        asking = [asyncio.create_task(ask(site, headers, f"a@{n}", max_tokens=400)) for n in (1, 2)]
        async with asyncio.timeout(60):
            while len(first.running) < 2:
                await asyncio.sleep(0.01)
        first.times.step = 0.001
        first.die()
        assert [answer.status_code for answer in await asyncio.gather(*asking)] == [200, 200]
    second = lived(0.05)
    async with fake_site(tmp_path, second, engine_restarts=5) as site:
        guilty = asyncio.create_task(ask(site, headers, "a@2", max_tokens=500))
        async with asyncio.timeout(60):
            while not second.running:
                await asyncio.sleep(0.01)
        apart = asyncio.create_task(ask(site, headers, "a@1", max_tokens=4))
        await asyncio.sleep(0.3)
        assert len(second.running) == 1, "suspects run apart"
        second.die()
        assert "twice in a row" in error(await guilty, 409, "adapter_quarantined")["message"]
        assert (await apart).status_code == 200
        assert list(await shown(site)) == [1, 2]
        assert {n: bool(said) for n, said in (await shown(site)).items()} == {1: False, 2: True}


async def test_losses_of_an_earlier_process_count(tmp_path: Path) -> None:
    """Nobody is a suspect any more, but one version was there each time, and seldom otherwise."""

    async def die_while_both_run(site: Site, engine: FakeEngine) -> list[httpx.Response]:
        headers = await key(site)
        asking = [asyncio.create_task(ask(site, headers, f"a@{n}", max_tokens=400)) for n in (1, 2)]
        async with asyncio.timeout(60):
            while len(engine.running) < 2:
                await asyncio.sleep(0.01)
        engine.times.step = 0.001
        engine.die()
        return list(await asyncio.gather(*asking))

    first, second = (FakeEngine(tiny.base(), times=Times(step=0.05, start=0.1)) for _ in range(2))
    async with fake_site(tmp_path, first) as site:
        await two_versions(site)
        keys = [(await site.services.publishing.catalog.version("acme", "a", n)).key for n in (1, 2)]
        assert [answer.status_code for answer in await die_while_both_run(site, first)] == [200, 200]
    with closing(sqlite3.connect(tmp_path / "loraplex.db")) as database, database:
        ((value,),) = database.execute("SELECT value FROM meta WHERE key = 'losses'")
        (loss,) = json.loads(value)
        assert loss["ran"].keys() == set(keys)
        assert abs(time.time() - loss["at"]) < 300
        seldom = {keys[0]: [1.0, 1.0], keys[1]: [0.01, None]}
        losses = json.dumps([loss | {"ran": seldom, "at": time.time() - 10}] * 2)
        database.execute("UPDATE meta SET value = ? WHERE key = 'losses'", (losses,))
        database.execute("UPDATE meta SET value = '[]' WHERE key = 'suspects'")
    async with fake_site(tmp_path, second) as site:
        kept, refused = await die_while_both_run(site, second)
        assert kept.status_code == 200
        said = error(refused, 409, "adapter_quarantined")["message"]
        assert "each time the engine was lost, 3 times" in said
        async with asyncio.timeout(60):
            while not (await shown(site))[2]:
                await asyncio.sleep(0.01)
        assert not (await shown(site))[1]


async def test_a_restart_keeps_it(tmp_path: Path) -> None:
    async with fake_site(tmp_path, engine()) as site:
        await two_versions(site)
        await site.admin.patch(ADAPTER, json={"pinned": True})
        await out(site, 2)
    async with fake_site(tmp_path, engine()) as site:
        headers = await key(site)
        error(await ask(site, headers), 409, "adapter_quarantined")
        assert (await shown(site))[2]["reason"] == "it made NaN"
        await site.admin.patch(ADAPTER, json={"quarantined": False})
        assert (await ask(site, headers)).status_code == 200


async def test_a_version_whose_answer_was_no_number_is_quarantined_by_the_engine(site: Site) -> None:
    headers = await key(site)
    version = await site.services.publishing.catalog.version("acme", "a", 2)
    faulty = site.services.engine.on_fault
    faulty(version.key, "an answer of its was not a number")
    faulty(site.services.engine.base.name, "the base is nobody's version")
    faulty("nobody/a@0", "it is gone")
    async with asyncio.timeout(60):
        while (await ask(site, headers)).status_code == 200:
            await asyncio.sleep(0.01)
    refused = error(await ask(site, headers), 409, "adapter_quarantined")
    assert "an answer of its was not a number" in refused["message"]
    assert (await ask(site, headers, "a@1")).status_code == 200


async def test_the_request_whose_answer_was_no_number_is_told_so(tmp_path: Path) -> None:
    """Its version is out of service before the answer has come to its end."""
    with_nan = NotFinite(tiny.base())
    async with fake_site(tmp_path, with_nan) as site:
        await two_versions(site)
        headers = await key(site)
        with_nan.fails = site
        error(await ask(site, headers), 500, "adapter_not_finite")
        error(await ask(site, headers), 409, "adapter_quarantined")


class NotFinite(FakeEngine):
    """Answers on the site ``fails`` are not numbers; each ends when all that follows has happened."""

    fails: Site | None = None
    on_fault: Callable[[str, str], None]  # as the app sets it

    async def answer(self, call: Call, request: Any) -> Answer:
        if self.fails is None:
            return await super().answer(call, request)
        call.failure = Internal("It is not a number.", code="adapter_not_finite")
        self.on_fault(call.model, "NaN")
        async with asyncio.timeout(60):
            while self.fails.services.tasks:
                await asyncio.sleep(0.005)
        raise call.failure
