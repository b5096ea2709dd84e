"""Replicas that end and come back, as the same or as others; and what gateways then say of the fleet."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from adapters.database.rows import ReplicaRow
from server.fleet.replica import FORGOTTEN
from tests.support import tiny
from tests.support.fakes import NATURAL_LENGTH, FakeEngine
from tests.support.fleet import Fleet, fleet, replica
from tests.support.site import bearer


def up(page: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith("loraplex_replica_up{")]


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
    async with fleet(tmp_path) as made:
        killed, other = made.replicas
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
        newer = FakeEngine(tiny.base(), max_model_len=128)
        newer.version = "fake 2"
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
