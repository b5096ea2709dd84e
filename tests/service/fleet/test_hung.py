"""A replica that says nothing while the kernel goes on taking connections for it, as one that was stopped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.fleet import FakeReplica, Fleet, fleet
from tests.support.fleet_answers import body, read, told, usage
from tests.support.site import bearer

WITHIN_S = 60.0


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with fleet(tmp_path) as made:
        yield made


async def home(made: Fleet, key: str) -> tuple[FakeReplica, str]:
    """The replica that answers with the adapter ``a`` of this customer, and what that says."""
    said, _ = told(await read(made.gateway, key, body(60)))
    (found,) = [one for one in made.replicas if answered(one)]
    return found, said


def answered(replica: FakeReplica) -> int:
    """How many chats it was asked for."""
    return sum(call.kind == "chat" for call in replica.engine.calls)


async def test_what_is_sent_to_a_hung_replica_goes_elsewhere(two: Fleet) -> None:
    """Its order is in the kernel's hands: there is no answer to break off yet."""
    key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)})
    hung, said = await home(two, key)
    hung.freeze()
    async with asyncio.timeout(WITHIN_S):
        stream = asyncio.create_task(read(two.gateway, key, body(60)))
        counted = await two.gateway.http.post(
            "/tokenize", json={"model": "a", "prompt": "one two"}, headers=bearer(key)
        )
        assert told(await stream)[0] == said
    assert counted.json()["count"] == 3, counted.text
    assert (answered(hung), answered(two.other(hung))) == (1, 1), "it has not begun there"
    (row,) = await usage(two)
    assert (row["outcome"], row["requests"], row["output_tokens"]) == ("completed", 2, 120)


async def test_an_upload_to_a_hung_replica_is_to_be_sent_again(two: Fleet) -> None:
    await two.gateway.tenant("acme")
    for one in two.replicas:
        one.freeze()
    async with asyncio.timeout(WITHIN_S):
        answer = await two.gateway.upload("acme", "a", tiny.adapter(1))
    assert answer.status_code == 503, answer.text
    assert answer.json()["error"]["code"] == "replica_lost"


async def test_an_answer_that_is_whole_does_not_wait_for_the_end_of_its_connection(two: Fleet) -> None:
    key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)})
    for one in two.replicas:
        one.freezer.before_the_end = True
    async with asyncio.timeout(WITHIN_S):
        assert told(await read(two.gateway, key, body(5)))[1]["completion_tokens"] == 5
    await two.until(lambda: not two.gateway.services.dispatcher.open_leases(), WITHIN_S)
    (row,) = await usage(two)
    assert (row["outcome"], row["output_tokens"]) == ("completed", 5)


async def test_an_answer_goes_back_to_a_replica_that_is_well_again(two: Fleet) -> None:
    key = await two.gateway.tenant("acme", {"a": tiny.adapter(1)})
    wanted = told(await read(two.gateway, key, body(200)))
    async with asyncio.timeout(WITHIN_S):
        reading = asyncio.create_task(read(two.gateway, key, body(200)))
        await two.until(lambda: any(one.said > 5 for one in two.replicas), WITHIN_S)
        first = two.busy()
        second = two.other(first)
        first.freeze()
        await two.until(lambda: second.said > 5, WITHIN_S)
        first.freezer.going.set()
        await two.until(lambda: not any(one.lost for one in two.directory.all()), WITHIN_S)
        await second.kill()
        assert told(await reading) == wanted
    rows = await usage(two)
    assert [(row["outcome"], row["requests"]) for row in rows] == [("completed", 2)]
    await two.until(lambda: not first.engine.running, WITHIN_S)


async def test_replicas_are_not_blamed_for_what_a_gateway_did_not_hear(tmp_path: Path) -> None:
    """It was stopped, or had no processor, for longer than a replica may be silent."""
    async with fleet(tmp_path, replica_stall=2.0) as made:
        key = await made.gateway.tenant("acme", {"a": tiny.adapter(1)})
        _, said = await home(made, key)
        for one in made.replicas:
            one.freezer.slow = 0.2  # the gateway waits for an answer every other moment
        async with asyncio.timeout(WITHIN_S):
            reading = asyncio.create_task(read(made.gateway, key, body(60)))
            await made.until(lambda: any(one.said > 5 for one in made.replicas), WITHIN_S)
            for _ in range(2):
                time.sleep(2.3)  # everything in this process stands still, which is the point
                await asyncio.sleep(0.07)
            assert told(await reading)[0] == said
        assert not any(one.lost for one in made.directory.all())
        assert sum(map(answered, made.replicas)) == 2, "it has stayed where it was"
