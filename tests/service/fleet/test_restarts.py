"""Replicas that end and come back, as the same or as others; and what gateways then say of the fleet."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.database.rows import ReplicaRow
from adapters.errors import AdapterError, AdapterUnavailable, DatabaseUnavailable
from adapters.inspection.golden import Agreement, Golden
from adapters.model import Version
from server.errors import ServerError
from server.fleet import verifying
from server.fleet.replica import FORGOTTEN, Replica
from server.publishing.probe import Prober
from server.scheduling.refusals import engine_restarting
from tests.service.publishing.test_golden import URL, VERIFY, trained, upload
from tests.support import tiny
from tests.support.fake_answers import NATURAL_LENGTH
from tests.support.fakes import FakeEngine
from tests.support.fleet import FakeReplica, Fleet, fleet, replica
from tests.support.site import bearer


class Checks:
    """Of golden probes; each waits for ``going``."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.number = 0
        self.going = asyncio.Event()
        check = Prober.check

        async def held(prober: Prober, version: Version, golden: Golden) -> Agreement:
            self.number += 1
            await self.going.wait()
            return await check(prober, version, golden)

        patch.setattr(Prober, "check", held)


async def with_probes(made: Fleet) -> None:
    """A customer whose adapter came with golden probes."""
    await made.gateway.tenant("acme")
    assert (await upload(made.gateway, await trained(made.gateway))).status_code == 201


def another_kind() -> FakeEngine:
    made = FakeEngine(tiny.base())
    made.version = "fake 2"
    return made


async def unverified(one: FakeReplica) -> list[Version]:
    publishing = one.services.publishing
    return list(await publishing.catalog.unverified(publishing.prober.here))


def up(page: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith("loraplex_replica_up{")]


async def states(made: Fleet) -> dict[str, str]:
    """By replica, as operators see them."""
    shown = (await made.gateway.admin.get("/admin/v1/replicas")).json()["data"]
    return {one["id"]: one["state"] for one in shown}


async def server(made: Fleet) -> dict[str, Any]:
    return dict((await made.gateway.admin.get("/admin/v1/server")).json())


async def test_one_that_was_killed_and_started_again_counts_once(tmp_path: Path) -> None:
    async with fleet(tmp_path) as made:
        killed, other = made.replicas
        await killed.kill()
        async with replica(tmp_path, port=killed.port) as again:
            ids = sorted((again.id, other.id))
            await made.until(lambda: [one.id for one in made.directory.ready()] == ids)
            await made.until(lambda: [one.id for one in made.directory.all()] == ids)
            shown = (await made.gateway.admin.get("/admin/v1/replicas")).json()["data"]
            assert [(one["id"], one["state"]) for one in shown] == [(id_, "ready") for id_ in ids]
            page = (await made.gateway.http.get("/metrics")).text
            assert len(up(page)) == 2
            assert "loraplex_gpu_slots 4.0" in page


async def test_another_process_at_its_address_is_not_the_replica(tmp_path: Path) -> None:
    """The new one has not announced itself yet."""
    async with fleet(tmp_path) as made:
        ended, other = made.replicas
        gone = ended.id
        ended.app.state.replica._beating.cancel()
        ended.app.state.replica.id = "another"
        await made.until(lambda: [one.id for one in made.directory.all() if one.lost] == [gone])
        assert [one.id for one in made.directory.ready()] == [other.id]
        ended.app.state.replica.id = gone


async def test_one_that_has_long_been_silent_is_forgotten(tmp_path: Path) -> None:
    """By one that did its chores when it came, and does them again in an hour."""
    async with fleet(tmp_path) as made:
        await made.until(lambda: any(one.app.state.replica.holds_chores for one in made.replicas))
        (other,) = [one for one in made.replicas if one.app.state.replica.holds_chores]
        killed = made.other(other)
        await killed.kill()
        async with other.services.database.append() as session:
            (await session.get_one(ReplicaRow, killed.id)).beat_at -= FORGOTTEN + timedelta(seconds=1)
        await made.until(lambda: [one.id for one in made.directory.all()] == [other.id])


async def test_a_gateway_says_what_the_replicas_of_now_are(tmp_path: Path) -> None:
    """As in an update, replica by replica, to another engine and a smaller context."""
    async with fleet(tmp_path, replicas=1) as made:
        (old,) = made.replicas
        key = await made.gateway.tenant("acme", {"a": tiny.adapter(1)}, limits={"tokens_per_minute": 300})

        async def shown() -> int:
            return int((await made.gateway.http.get("/v1/me", headers=bearer(key))).json()["max_model_len"])

        assert (await server(made))["capacity"]["max_model_len"] == await shown() == 512
        newer = another_kind()
        newer.max_model_len = 128
        async with replica(tmp_path, engine=newer) as new:
            await made.until(lambda: len(made.directory.ready()) == 2)
            assert await shown() == 128, "what fits one of them fits all"
            await old.kill()
            await made.until(lambda: [one.id for one in made.directory.ready()] == [new.id])
            assert (await server(made))["engine"] == "fake 2"
            answer = await made.gateway.chat(key, "hello there", model="a")
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == NATURAL_LENGTH, "no length was filled in"
        await made.until(lambda: not made.directory.ready())
        assert await shown() == 128, "it is remembered"


async def test_another_engine_is_verified_before_it_takes_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, though two of its kind start at the same time; and not again where it has been."""
    async with fleet(tmp_path, replicas=1) as made, AsyncExitStack() as stack:
        (old,) = made.replicas
        await with_probes(made)
        checks = Checks(monkeypatch)
        new = [replica(tmp_path, engine=another_kind()) for _ in range(2)]
        ids = {old.id} | {(await stack.enter_async_context(each)).id for each in new}
        await made.until(lambda: checks.number > 0)
        await made.until(lambda: {one.id for one in made.directory.all() if one.said} == ids)
        assert [one.id for one in made.directory.ready()] == [old.id]
        checks.going.set()
        await made.until(lambda: {one.id for one in made.directory.ready()} == ids)
        assert checks.number == 1
        shown = (await made.gateway.admin.get(VERIFY.removesuffix("/verify"))).json()["versions"][0]["report"]
        assert (shown["golden"]["matches"], shown["golden"]["engine"]) == (True, "fake 2")
        assert [found["engine"] for found in shown["golden_elsewhere"]] == ["fake 1"]
        assert not await unverified(old), "what was found on one kind says nothing of the other"


async def test_a_replica_that_is_verified_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To operators, monitors and who asks it; and takes nothing, also of a gateway that knows no other."""
    async with fleet(tmp_path, replicas=1) as made:
        (old,) = made.replicas
        await with_probes(made)
        checks = Checks(monkeypatch)
        async with replica(tmp_path, engine=another_kind()) as new:
            of_new = f'{{replica="{new.id}"}} '
            await made.until(lambda: any(one.id == new.id and one.said for one in made.directory.all()))
            await made.until(lambda: checks.number > 0)
            assert await states(made) == {old.id: "ready", new.id: "verifying"}
            seen = (await made.gateway.admin.get("/admin/v1/residency")).json()["replicas"]
            assert {one["id"]: one["state"] for one in seen} == {old.id: "ready", new.id: "verifying"}
            page = (await made.gateway.http.get("/metrics")).text
            assert f"loraplex_replica_verifying{of_new}1.0" in page
            assert f"loraplex_replica_up{of_new}0.0" in page
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{new.port}") as http:
                told = await http.get("/ready")
                assert (told.status_code, told.json()["checks"]["engine"]) == (503, "verifying")
                assert (await http.get("/health")).status_code == 200
            await old.kill()
            await made.until(lambda: not made.directory.ready())
            assert (await made.gateway.http.get("/ready")).status_code == 503
            checks.going.set()
            await made.until(lambda: [one.id for one in made.directory.ready()] == [new.id])
            assert (await states(made))[new.id] == "ready"
            page = (await made.gateway.http.get("/metrics")).text
            assert f"loraplex_replica_verifying{of_new}0.0" in page


async def test_a_replica_is_verified_though_the_database_fails_a_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with fleet(tmp_path, replicas=1) as made:
        await with_probes(made)
        checks = Checks(monkeypatch)
        checks.going.set()

        async def away(_: Any) -> list[Version]:
            raise DatabaseUnavailable("The database does not answer.")

        monkeypatch.setattr(verifying, "unverified", away)
        async with replica(tmp_path, engine=another_kind()):
            await made.until(lambda: len(made.directory.ready()) == 2)
            assert checks.number == 1
        assert "how many versions are not yet verified cannot be told" in caplog.text


async def test_one_alone_is_verified_for_a_shorter_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet(tmp_path, replicas=1) as made:
        (old,) = made.replicas
        await with_probes(made)
        checks = Checks(monkeypatch)
        monkeypatch.setattr(verifying, "ALONE_S", 0.05)
        monkeypatch.setattr(verifying, "LOOK_EVERY_S", 0.02)
        async with replica(tmp_path, engine=another_kind()) as new:
            await made.until(lambda: checks.number > 0)
            old.app.state.replica._beating.cancel()
            await old.services.replicas.leave(old.id)
            await made.until(lambda: new.id in [one.id for one in made.directory.ready()])
            checks.going.set()


async def test_a_replica_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with fleet(tmp_path, replicas=1) as made:
        await with_probes(made)
        checks = Checks(monkeypatch)
        monkeypatch.setattr(verifying, "VERIFY_S", 0.05)  # the old one takes requests meanwhile
        async with replica(tmp_path, engine=another_kind()) as new:
            await made.until(lambda: len(made.directory.ready()) == 2)
            assert "requests come all the same; not yet verified: 1" in caplog.text
            late = new.services.metrics._verified.labels("late")
            assert late._value == 1
            assert await unverified(new)
            checks.going.set()
            async with asyncio.timeout(60):
                while await unverified(new):
                    await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("wrong", "late"),
    [
        (engine_restarting(), 2),
        (DatabaseUnavailable("It is away."), 2),
        (AdapterUnavailable("There is no room."), 0),
    ],
)
async def test_what_broke_off_is_late_and_what_is_not_possible_is_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wrong: AdapterError | ServerError,
    late: int,
) -> None:
    async with fleet(tmp_path, replicas=1) as made:
        await with_probes(made)
        golden = await trained(made.gateway, 2)
        assert (await upload(made.gateway, golden, 2, URL.replace("/a/", "/b/"))).status_code == 201

        async def fails(*_: object) -> Agreement:
            raise wrong

        monkeypatch.setattr(Prober, "check", fails)
        async with replica(tmp_path, engine=another_kind()) as new:
            await made.until(lambda: len(made.directory.ready()) == 2)
            counted = new.services.metrics._verified
            assert (counted.labels("late")._value, counted.labels("not_possible")._value) == (late, 2 - late)
            assert ("not yet verified: 2" in caplog.text) == (late == 2)
            assert ("verifying golden probes breaks off at acme/a@1" in caplog.text) == (late == 2)


async def test_chores_do_not_verify_what_the_replica_is_verifying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, chores = asyncio.Event(), Replica._do_chores

    async def seen(one: Replica) -> None:
        await chores(one)
        done.set()

    async with fleet(tmp_path, replicas=1) as made:
        (old,) = made.replicas
        await with_probes(made)
        old.app.state.replica._beating.cancel()
        await asyncio.wait([old.app.state.replica._beating])
        await old.services.replicas.release(old.id)
        checks = Checks(monkeypatch)
        monkeypatch.setattr(Replica, "_do_chores", seen)
        async with replica(tmp_path, engine=another_kind()):
            await made.until(lambda: checks.number > 0)
            await made.until(lambda: done.is_set() or checks.number > 1)
            assert checks.number == 1
            checks.going.set()
