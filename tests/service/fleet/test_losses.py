"""Replicas and gateways that freeze, drain, start again or die under answers, over real connections."""

from __future__ import annotations

import asyncio

import pytest

from tests.support import tiny
from tests.support.fleet import Fleet
from tests.support.fleet_answers import body, read, told, two, usage

__all__ = ["two"]


class TestLosses:
    @pytest.mark.parametrize("how", ["kill", "freeze", "drain"])
    async def test_a_stream_goes_on_elsewhere_and_is_whole(self, two: Fleet, how: str) -> None:
        key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)})
        wanted = told(await read(two.gateway, key, body(60)))
        reading = asyncio.create_task(read(two.gateway, key, body(60)))
        await two.until(lambda: any(one.said > 10 for one in two.replicas))
        hit = two.busy()
        if how == "kill":
            await hit.kill()
        elif how == "freeze":
            hit.freeze()
        else:
            draining = asyncio.create_task(hit.services.drain())
        assert told(await reading) == wanted
        assert two.other(hit).engine.calls, "it went on at the other one"
        await two.until(lambda: not two.other(hit).engine.running)
        rows = await usage(two)
        assert [(row["outcome"], row["requests"], row["output_tokens"]) for row in rows] == [
            ("completed", 2, 120)
        ]
        if how == "drain":
            await draining
            await two.until(lambda: not hit.engine.running)

    async def test_a_stream_leaves_a_replica_whose_engine_starts_again(self, two: Fleet) -> None:
        key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)})
        wanted = told(await read(two.gateway, key, body(60)))
        reading = asyncio.create_task(read(two.gateway, key, body(60)))
        await two.until(lambda: any(one.said > 10 for one in two.replicas))
        hit = two.busy()
        hit.engine.die()
        assert told(await reading) == wanted
        assert two.other(hit).engine.calls, "it went on at the other one"
        (row,) = await usage(two)
        assert (row["outcome"], row["output_tokens"]) == ("completed", 120)

    async def test_what_cannot_go_on_is_told_so(self, two: Fleet) -> None:
        key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)})
        reading = asyncio.create_task(read(two.gateway, key, body(60, presence_penalty=0.5)))
        await two.until(lambda: any(one.said > 10 for one in two.replicas))
        await two.busy().kill()
        text = await reading
        assert '"replica_lost"' in text
        assert text.endswith("data: [DONE]\n\n")
        (row,) = await usage(two)
        assert row["outcome"] == "failed"
        assert row["output_tokens"] >= 5

    async def test_what_cannot_go_on_elsewhere_ends_where_it_drains(self, two: Fleet) -> None:
        key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)})
        reading = asyncio.create_task(read(two.gateway, key, body(40, presence_penalty=0.5)))
        await two.until(lambda: any(one.said > 5 for one in two.replicas))
        hit = two.busy()
        draining = asyncio.create_task(hit.services.drain())
        assert told(await reading)[1]["completion_tokens"] == 40
        await draining

    async def test_a_document_is_begun_anew_and_paid_once(self, two: Fleet) -> None:
        key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)})
        asking = asyncio.create_task(
            two.gateway.chat(key, "hello there", model="a", max_tokens=40, presence_penalty=0.5)
        )
        await two.until(lambda: any(one.said > 10 for one in two.replicas))
        await two.busy().kill()
        answer = await asking
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 40
        (row,) = await usage(two)
        assert (row["outcome"], row["output_tokens"]) == ("completed", 40)

    async def test_the_last_replica_dies(self, two: Fleet) -> None:
        key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)})
        for one in two.replicas:
            await one.kill()
        answer = await two.gateway.chat(key, "hello", model="a", max_tokens=3)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "no_replica"
        assert "Retry-After" in answer.headers
        await two.until(lambda: all(one.lost for one in two.directory.all()))
        assert (await two.gateway.http.get("/ready")).status_code == 503

    async def test_a_frozen_replica_that_goes_on_is_used_again(self, two: Fleet) -> None:
        hit = two.replicas[0]
        hit.freeze()
        await two.until(lambda: any(one.lost for one in two.directory.all()))
        hit.freezer.going.set()
        await two.until(lambda: not any(one.lost for one in two.directory.all()))

    async def test_the_gateway_is_killed(self, two: Fleet) -> None:
        """Its connections break, and nothing is left in the replicas."""
        key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)})
        reading = asyncio.create_task(read(two.gateway, key, body(400)))
        await two.until(lambda: any(one.said > 3 for one in two.replicas))
        hit = two.busy()
        (run,) = hit.engine.running
        for known in two.directory.all():
            for call in list(known.calls):
                call._line._transport.abort()
                call._aborted = True
        await two.until(lambda: not hit.engine.running)
        assert sum(run.produced.values()) < 100, "it did not go on to its end, 400 tokens"
        await two.until(lambda: not hit.app.state.replica.calls)
        assert '"shutting_down"' in await reading
