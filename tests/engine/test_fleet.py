"""Two real engines behind a gateway, as processes: the same answers as one, and none lost with a replica."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engine.processes import Running, gone, server, starting
from tests.engine.reference import ATTENTION, Reference, Spec
from tests.support.site import bearer

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(1800)]

FLEET = {
    "FLEET_KEY": "fleet-key-of-the-tests",
    "ENGINE_ARGS": '{"max_num_seqs": 4, "dtype": "float32"}',
    "DRAIN_TIMEOUT": "600",
}
TOKENS = 60
# How often each fault is tried; a replica that has ended is then replaced by a new one.
ROUNDS = int(os.environ.get("ROUNDS", "1"))
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Count to a hundred."}],
    "temperature": 0,
    "max_tokens": TOKENS,
    "logit_bias": {"0": -100, "2": -100},
    "logprobs": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}


class Answer:
    """A stream, as it is read: ``events`` so far."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.done = False
        self.longest = 0.0  # seconds between two events

    async def read(self, gateway: Running, key: dict[str, str], model: str) -> Answer:
        clock = asyncio.get_running_loop().time
        async with gateway.http.stream(
            "POST", "/v1/chat/completions", json={**BODY, "model": model}, headers=key
        ) as response:
            assert response.status_code == 200, await response.aread()
            last = clock()
            async for line in response.aiter_lines():
                if not line:
                    continue
                if self.events:
                    self.longest = max(self.longest, clock() - last)
                last = clock()
                if line == "data: [DONE]":
                    self.done = True
                    break
                self.events.append(json.loads(line.removeprefix("data: ")))
        return self

    @property
    def text(self) -> str:
        return "".join(
            choice["delta"].get("content") or "" for event in self.events for choice in event["choices"]
        )

    @property
    def logprobs(self) -> list[float]:
        return [
            token["logprob"]
            for event in self.events
            for choice in event["choices"]
            for token in (choice["logprobs"] or {}).get("content") or ()
        ]

    def check(self, wanted: Answer) -> None:
        assert self.done, self.events[-1:]
        assert self.text == wanted.text
        assert self.logprobs == pytest.approx(wanted.logprobs, abs=5e-3)
        assert len(self.logprobs) == TOKENS
        assert self.events[-1]["usage"]["completion_tokens"] == TOKENS
        assert len({(event["id"], event["created"]) for event in self.events}) == 1


async def test_no_answer_is_lost_with_a_replica(base_dir: Path, reference: Reference, tmp_path: Path) -> None:
    folder = await asyncio.to_thread(reference.make, Spec(seed=6, rank=8, targets=ATTENTION), tmp_path / "a")
    data = tmp_path / "data"
    data.mkdir()
    async with AsyncExitStack() as stack:

        async def replica() -> Running:
            return await stack.enter_async_context(starting(base_dir, data, ROLE="replica", **FLEET))

        replicas = [await replica() for _ in range(2)]
        await asyncio.gather(*(one.until_ready() for one in replicas))
        gateway = await stack.enter_async_context(server(base_dir, data, ROLE="gateway", **FLEET))
        _check_light(gateway)
        key = await gateway.tenant("acme")
        made = await gateway.upload("acme", "a", folder)
        assert made.status_code == 201, made.text
        wanted = await Answer().read(gateway, key, "a")
        assert wanted.text != (await Answer().read(gateway, key, base_dir.name)).text
        asked = 2

        async def hit(how: Callable[[Running], object]) -> Running:
            """Does ``how`` to a replica half-way through its answer, which is whole and equal."""
            nonlocal asked
            asked += 1
            answer = Answer()
            reading = asyncio.create_task(answer.read(gateway, key, "a"))
            while len(answer.events) < TOKENS // 3:
                assert not reading.done(), reading
                await asyncio.sleep(0.01)
            (busy,) = [one for one in replicas if await _runs(one)]
            how(busy)
            (await reading).check(wanted)
            print(f"{how.__name__}: longest pause {answer.longest:.1f} s")
            return busy

        async def replaced(one: Running) -> None:
            replicas.remove(one)
            replicas.append(await replica())
            await replicas[-1].until_ready()
            await _all_up(gateway, 2)

        for number in range(ROUNDS):
            await hit(stop)
            await _all_up(gateway, 2)
            killed = await hit(kill)
            await killed.exit_status()
            assert not await gone(_of_session(killed.process.pid), 240)
            if number < ROUNDS - 1:  # the last one is terminated with nowhere to go to: it ends its answer
                await replaced(killed)
            else:
                replicas.remove(killed)
            terminated = await hit(terminate)
            assert await terminated.exit_status() == 0
            if number < ROUNDS - 1:
                await replaced(terminated)
        assert '"replica_lost"' not in gateway.log.read_text()
        rows = (await gateway.http.get("/admin/v1/usage?by=outcome", headers=gateway.admin)).json()["data"]
        assert [(row["outcome"], row["requests"], row["output_tokens"]) for row in rows] == [
            ("completed", asked, asked * TOKENS)
        ]


def stop(one: Running) -> None:
    """For longer than a replica may be silent, and less than its engine."""
    one.process.send_signal(signal.SIGSTOP)
    asyncio.get_running_loop().call_later(8, one.process.send_signal, signal.SIGCONT)


def kill(one: Running) -> None:
    one.process.kill()


def terminate(one: Running) -> None:
    one.process.terminate()


def _of_session(leader: int) -> list[psutil.Process]:
    """What a server's process, which led a session of its own, has left."""
    found = []
    for one in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(one.pid) == leader:
                found.append(one)
    return found


def _check_light(gateway: Running) -> None:
    process = psutil.Process(gateway.process.pid)
    maps = {Path(one.path).name for one in process.memory_maps()}
    assert not any("torch" in name or "vllm" in name for name in maps)
    assert process.memory_info().rss < 200 << 20
    print(f"a gateway: ready after {gateway.started_in:.1f} s, {process.memory_info().rss >> 20} MiB")


async def _runs(replica: Running) -> bool:
    found = await replica.http.get("/internal/v1/state", headers=bearer(FLEET["FLEET_KEY"]))
    return bool(found.json()["report"]["running"])


async def _all_up(gateway: Running, number: int) -> None:
    async with asyncio.timeout(240):
        while True:
            page = (await gateway.http.get("/metrics")).text
            if (
                sum(
                    line.startswith("loraplex_replica_up{") and line.endswith(" 1.0")
                    for line in page.splitlines()
                )
                == number
            ):
                return
            await asyncio.sleep(0.2)
