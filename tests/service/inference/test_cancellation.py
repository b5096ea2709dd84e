"""A client may leave at any moment: every scenario is cancelled after each of its loop steps in turn.

What must hold afterwards: nobody waits, nothing runs, the plan adds up, the request was counted once, and
the only slot and the only place in the engine serve the next customer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from adapters.model import BaseModel
from server.http.middleware import ClientLeft, while_connected
from server.http.streams import LeasedResponse
from server.inference.completion import Completion
from tests.support.clock import VirtualLoop, run
from tests.support.world import BASE, World, read

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

Victim = Callable[[World], Awaitable[object]]


class Connected:
    """A request whose client stays, or leaves when it is told to."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}


async def routed(world: World, who: str, **fields: Any) -> object:
    """As the routes do it: opened while the client is there, then read to the end and closed."""
    work = world.open(who, **fields)
    return await read(await while_connected(Connected(), work, Completion.discard))  # type: ignore[arg-type]


VICTIMS: dict[str, Victim] = {
    "a stream": lambda world: world.ask("victim"),
    "a document": lambda world: world.ask("victim", stream=False),
    "two choices": lambda world: world.ask("victim", n=2),
    "the base model": lambda world: world.ask("victim", model="base-model"),
    "a stream by its route": lambda world: routed(world, "victim"),
    "a document by its route": lambda world: routed(world, "victim", stream=False),
    "an unknown model": lambda world: world.ask("victim", model="nobody"),
}


async def cancelled_at(
    step: int, victim: Victim, *, crowded: bool, insist: int = 0, base: BaseModel = BASE
) -> tuple[bool, dict[str, int], int]:
    """Runs ``victim`` and cancels it after ``step`` steps of the loop, and ``insist`` times more.

    Returns whether it was still there to be cancelled, the outcomes counted, and how many asked.
    """
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    limits = {"slot_patience": 0.1}
    async with World(gpu_slots=1, host_slots=1, max_running=2, limits=limits, base=base) as world:
        others = [asyncio.create_task(world.ask(who, max_tokens=6)) for who in ("one", "two") if crowded]
        if crowded:
            await asyncio.sleep(0.2)
        began = False

        async def begin() -> object:
            nonlocal began
            began = True
            return await victim(world)

        task = asyncio.create_task(begin())
        for again in range(insist + 1):
            loop.at_step(loop.steps + 1 + step + again, task.cancel)
        await asyncio.wait([task])
        reached = task.cancelled()
        if not reached and (error := task.exception()) is not None:
            assert type(error).__name__ == "ModelNotFound", error
        loop.forget_actions()
        assert await world.dispatcher.wait_until_idle(60)
        await asyncio.gather(*others)
        world.check_idle()
        assert ("embedding" if base.pooling else '"next-a"') in await asyncio.wait_for(world.ask("next"), 60)
        world.check_idle()
        return reached, world.outcomes(), began + len(others) + 1


crowds = pytest.mark.parametrize("crowded", [False, True], ids=["alone", "in a queue"])


@crowds
@pytest.mark.parametrize("insist", [0, 2], ids=["once", "thrice"])
@pytest.mark.parametrize("victim", VICTIMS.values(), ids=VICTIMS)
def test_cancelled_at_every_step(victim: Victim, insist: int, crowded: bool) -> None:
    every_step(victim, insist=insist, crowded=crowded)


@crowds
def test_embeddings_cancelled_at_every_step(crowded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.fakes.push_of", lambda _: 0.5)  # here adapters have no files
    every_step(lambda world: world.ask("victim"), crowded=crowded, base=replace(BASE, pooling=True))


def every_step(victim: Victim, **how: Any) -> None:
    step, seen = 0, set()
    while True:
        reached, outcomes, asked = run(cancelled_at(step, victim, **how))
        assert sum(outcomes.values()) == asked, f"step {step}: {outcomes} of {asked}"
        seen |= outcomes.keys()
        if not reached:
            break
        step += 1
        assert step < 2000
    assert step > 1, "nothing was ever cancelled"
    assert "completed" in seen


async def cancelled_aside_at(step: int, *, stream: bool) -> tuple[bool, dict[str, int], int]:
    """The same for a long answer that is put aside for two others in turn."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    limits = {"slot_patience": 0.1, "preempt_after": 0.1}
    async with World(gpu_slots=1, host_slots=2, max_running=2, limits=limits) as world:
        victim = asyncio.create_task(world.ask("victim", max_tokens=30, stream=stream))
        await asyncio.sleep(0.2)
        others = [asyncio.create_task(world.ask(who, max_tokens=6)) for who in ("one", "two")]
        loop.at_step(loop.steps + 1 + step, victim.cancel)
        await asyncio.wait([victim])
        reached = victim.cancelled()
        loop.forget_actions()
        assert await world.dispatcher.wait_until_idle(60)
        await asyncio.gather(*others)
        preempted = world.dispatcher.snapshot().preemptions
        world.check_idle()
        assert world.engine.paused == []
        return reached, world.outcomes(), preempted


@pytest.mark.parametrize("stream", [True, False])
def test_cancelled_at_every_step_of_being_put_aside(stream: bool) -> None:
    step, most = 0, 0
    while True:
        reached, outcomes, preempted = run(cancelled_aside_at(step, stream=stream))
        assert sum(outcomes.values()) == 3, f"step {step}: {outcomes}"
        assert outcomes["completed"] >= (2 if reached else 3)
        most = max(most, preempted)
        if not reached:
            break
        step += 1
        assert step < 3000
    assert most >= 1, "nothing was put aside"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_it_waits(stream: bool) -> None:
    async def scenario() -> None:
        async with World() as world, world.busy("other", 60):
            client = Connected()
            work = while_connected(client, world.open("acme", stream=stream), Completion.discard)  # type: ignore[arg-type]
            waiting = asyncio.create_task(work)
            await asyncio.sleep(0.2)
            assert world.dispatcher.snapshot().queued == {"acme": 1}
            client.left.set()
            with pytest.raises(ClientLeft):
                await waiting
            assert world.dispatcher.snapshot().queued == {}
            assert world.outcomes() == {"disconnected": 1}

    run(scenario())


def test_a_client_that_leaves_while_its_document_is_written() -> None:
    async def scenario() -> None:
        async with World() as world:
            client = Connected()
            work = while_connected(
                client, world.open("acme", stream=False, max_tokens=100), Completion.discard
            )  # type: ignore[arg-type]
            waiting = asyncio.create_task(work)
            await asyncio.sleep(1.0)
            client.left.set()
            with pytest.raises(ClientLeft):
                await waiting
            world.check_idle()
            assert world.outcomes() == {"disconnected": 1}
            text = world.metrics.render().decode()
            (line,) = [row for row in text.splitlines() if row.startswith("loraplex_output_tokens_total")]
            assert 10 < float(line.split()[-1]) < 100, "what was produced for nobody is counted"

    run(scenario())


def test_a_stream_that_nobody_reads_gives_its_place_back() -> None:
    async def scenario() -> None:
        async with World() as world:
            opened = await world.open("acme", max_tokens=100)
            assert opened.stream is not None
            assert len(world.engine.running) == 1
            await opened.stream.aclose()
            await opened.stream.aclose()
            world.check_idle()
            assert world.outcomes() == {"disconnected": 1}

    run(scenario())


@pytest.mark.parametrize("version", ["2.3", "2.4"], ids=str)
@pytest.mark.parametrize("sent", [0, 1, 4])
def test_a_response_that_cannot_be_sent_gives_its_place_back(sent: int, version: str) -> None:
    async def scenario() -> None:
        async with World() as world:
            opened = await world.open("acme", max_tokens=100)
            assert opened.stream is not None
            log: dict[str, Any] = {}
            left = sent

            async def send(message: dict[str, Any]) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    raise OSError("the connection is gone")

            response = LeasedResponse(opened.stream, opened.lease, log, client_timeout=60, keepalive=15)
            with contextlib.suppress(Exception, BaseExceptionGroup):
                await response({"type": "http", "asgi": {"spec_version": version}}, Connected().receive, send)
            world.check_idle()
            assert world.outcomes() == {"disconnected": 1}
            assert log["outcome"] == "disconnected"

    run(scenario())
