"""The engine's processes are killed and stopped under a server, and the server under its engine.

Each server is a process of its own on the real model, in float32, where an answer that goes on in another
engine is equal to one that nobody disturbed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.engine.processes import Running, Which, gone, server, starting
from tests.engine.reference import ATTENTION, Reference, Spec
from tests.support.collector import Collector, collector
from tests.support.follow import COUNTS, Followed, Sent, agree, look_up, spans, spans_agree, used

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(1800)]

STALL = 30.0  # a step beside others' work takes less
WAIT = 300.0  # for what comes anyway, in seconds
FLOAT32 = {"ENGINE_ARGS": '{"max_num_seqs": 8, "dtype": "float32"}'}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG: dict[str, Any] = {"temperature": 0, "max_tokens": 80, "logit_bias": {"2": -100}}
STORY: dict[str, Any] = {"prompt": "Once upon a time there was a parcel", **LONG}
COUNT: dict[str, Any] = {"messages": [{"role": "user", "content": "Count to a hundred."}], **LONG}
A_FEW = 4
STREAM = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def adapter(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "a"
    return reference.make(Spec(seed=5, rank=8, targets=ATTENTION), folder)


@dataclass(frozen=True)
class Said:
    """What came back: a status, the text, a log-probability for each token if asked for, and the usage."""

    status: int
    text: str
    log_probs: tuple[float, ...] = ()
    usage: tuple[int, int] = (0, 0)
    code: str | None = None
    finish: str | None = None

    def equals(self, other: Said) -> bool:
        """Whether the two are one answer; log-probabilities may differ by float32's rounding."""
        close = len(self.log_probs) == len(other.log_probs) and all(
            abs(a - b) < 1e-3 for a, b in zip(self.log_probs, other.log_probs, strict=True)
        )
        mine = self.status, self.text, self.usage, self.code, self.finish
        return close and mine == (other.status, other.text, other.usage, other.code, other.finish)


async def ask(
    running: Running,
    headers: dict[str, str],
    path: str,
    body: dict[str, Any],
    goes: asyncio.Event | None = None,
) -> Said:
    """An answer to its end, streamed or not. Of a stream ``goes`` is set once it has a few tokens."""
    if not body.get("stream"):
        return _read([(await running.http.post(path, json=body, headers=headers)).json()])
    async with running.http.stream("POST", path, json=body, headers=headers) as answer:
        if answer.status_code != 200:
            await answer.aread()
            return _read([answer.json()])
        chunks: list[dict[str, Any]] = []
        async for chunk in _chunks(answer):
            chunks.append(chunk)
            if goes is not None and len(chunks) == A_FEW:
                goes.set()
        return _read(chunks)


async def _chunks(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def _read(chunks: list[dict[str, Any]]) -> Said:
    text, log_probs, usage, code, finish = "", [], (0, 0), None, None
    for chunk in chunks:
        code = chunk["error"]["code"] if "error" in chunk else code
        if (used := chunk.get("usage")) is not None:
            usage = used["prompt_tokens"], used["completion_tokens"]
        for choice in chunk.get("choices", ()):
            text += choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get(
                "content", ""
            )
            log_probs += (choice.get("logprobs") or {}).get("token_logprobs", ())
            finish = choice.get("finish_reason") or finish
    return Said(0 if code else 200, text, tuple(log_probs), usage, code, finish)


async def until(running: Running, *, runs: int, waits: int = 0) -> None:
    """Wait until exactly so many sequences run and so many requests wait."""
    async with asyncio.timeout(WAIT):
        while True:
            shown = (await running.http.get("/admin/v1/residency", headers=running.admin)).json()
            if [sum(shown[what].values()) for what in ("running", "queued")] == [runs, waits]:
                return
            await asyncio.sleep(0.05)


async def checks(running: Running) -> tuple[int, dict[str, str]]:
    ready = await running.http.get("/ready")
    return ready.status_code, ready.json()["checks"]


async def service_again(running: Running, headers: dict[str, str], since: float, times: int) -> float:
    """Seconds from ``since`` until the base model answers, and the engine has come back so often; looks at
    what the server says meanwhile."""
    async with asyncio.timeout(WAIT):
        while True:
            status, said = await checks(running)
            if said.get("engine") == "restarting":
                assert status == 503
                assert (await running.http.get("/health")).status_code == 200
            elif status == 200 and running.log.read_text().count("the engine is back") >= times:
                one = await ask(
                    running, headers, COMPLETIONS, {"model": "base", "prompt": "Hi", "max_tokens": 1}
                )
                assert one.status == 200
                return time.monotonic() - since
            await asyncio.sleep(0.1)


def resumable(text: dict[str, str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Requests whose answers can go on in another engine; ``text`` has undisturbed answers, by name."""
    adapter = {"model": "a", **STORY}
    requests = {
        "base": (CHAT, {"model": "base", **COUNT, **STREAM}),
        "adapter with log-probabilities": (COMPLETIONS, {**adapter, **STREAM, "logprobs": 1}),
        "adapter not streamed": (COMPLETIONS, adapter),
    }
    if text:  # one that stops far behind the moment of the fault
        said = text["base"]
        requests["stop string"] = (CHAT, {"model": "base", **COUNT, **STREAM, "stop": [late_in(said)]})
    return requests


def late_in(text: str) -> str:
    """A piece of ``text`` that is not there before its second half, or as late as there is one."""
    starts = range(len(text) * 3 // 4, 0, -1)
    pieces = (text[start : start + 12] for start in starts)
    return max(pieces, key=text.find)


FOR_NOBODY = {
    "two choices": (COMPLETIONS, {"model": "base", "n": 2, **STORY, "temperature": 0.9, "stream": True}),
    "seeded": (CHAT, {"model": "a", **COUNT, "temperature": 0.9, "seed": 7, "stream": True}),
    "not streamed": (COMPLETIONS, {"model": "base", "n": 2, **STORY, "temperature": 0.9}),
}


async def followed(running: Running, store: Collector, status: int, sent: Sent) -> Followed:
    """A request of ``acme``'s adapter, by its id in the log, the rows, the metrics, the usage and the trace:
    its numbers are the same everywhere. It is the only one of its outcome yet."""
    async with httpx.AsyncClient(base_url=running.http.base_url, headers=running.admin, timeout=120) as admin:
        found = await look_up(admin, status, sent, running.lines)
        counted = await used(admin, "acme", found.row)
    agree(found)
    spans_agree(found, await spans(store, found))
    assert found.exemplars, "no metric has its trace"
    assert counted["requests"] == 1
    for name in COUNTS:
        assert counted[name] == found.row[name], name
    return found


async def lose(running: Running, how: str) -> float:
    """Make the fault; when it was made."""
    processes = {"core": [running.core], "worker": [running.worker], "hang": [running.core, running.worker]}
    assert running.process.returncode is None, "the server has ended by itself"
    for one in [find() for find in processes[how]]:
        one.send_signal(signal.SIGSTOP if how == "hang" else signal.SIGKILL)
    return time.monotonic()


async def disturbed(
    running: Running,
    headers: dict[str, str],
    how: str,
    right: dict[str, Said],
    short: Said,
    lost: Sent,
    times: int,
) -> float:
    """Lose the engine, for the ``times``-th time, under nine sequences and three waiting requests; seconds
    until service again.

    ``lost`` is the one with a seed, which cannot go on.
    """
    seeded = asyncio.Event()
    texts = {name: said.text for name, said in right.items()}
    asked = resumable(texts)
    going = {name: asyncio.create_task(ask(running, headers, *one)) for name, one in asked.items()}
    mine: dict[str, Any] = {"seeded": (lost.headers, seeded)}
    broken = {}
    for name, one in FOR_NOBODY.items():
        more, goes = mine.get(name, ({}, None))
        broken[name] = asyncio.create_task(ask(running, headers | more, *one, goes))
    await until(running, runs=9)
    quick = {"model": "a", **STORY, "max_tokens": 8}
    waiting = [asyncio.create_task(ask(running, headers, COMPLETIONS, quick)) for _ in range(3)]
    await until(running, runs=9, waits=3)
    async with asyncio.timeout(WAIT):
        await seeded.wait()
    family = [running.core(), running.worker()]
    at = await lose(running, how)
    again = await service_again(running, headers, at, times)
    assert not await gone(family, WAIT), "the lost engine's processes are still there"
    for name, said in zip(broken, await asyncio.gather(*broken.values()), strict=True):
        assert said.code == "engine_restarting", (name, said)
    for name, said in zip(going, await asyncio.gather(*going.values()), strict=True):
        assert said.equals(right[name]), (name, said, right[name])
    for said in await asyncio.gather(*waiting):
        assert said.equals(short), said
    return again


async def test_an_engine_that_is_lost_again_and_again(base_dir: Path, adapter: Path, tmp_path: Path) -> None:
    settings = {"ENGINE_STALL": str(STALL), "ENGINE_RESTARTS": "4", "MAX_RUNNING": "9"}
    settings["QUEUE_TIMEOUT"] = "300"
    settings |= {"SERVED_MODEL_NAME": "base", "ENGINE_ARGS": '{"max_num_seqs": 9, "dtype": "float32"}'}
    settings["TRACES_SHARE"] = "0"  # of clients' traces those that they keep
    with collector() as store:
        async with server(base_dir, tmp_path, **settings, TRACES_URL=store.url) as running:
            await _lost_again_and_again(running, adapter, store)


async def _lost_again_and_again(running: Running, adapter: Path, store: Collector) -> None:
    headers = await running.tenant("acme")
    made = await running.upload("acme", "a", adapter)
    assert made.status_code == 201, made.text
    whole = Sent()
    said = await ask(running, headers | whole.headers, CHAT, {"model": "a", **COUNT, "stream": True})
    found = await followed(running, store, said.status, whole)
    assert (found.row["outcome"], found.row["output_tokens"]) == ("completed", LONG["max_tokens"])
    of_engine = await asyncio.to_thread(store.of, whole.trace, "llm_request", 60)
    assert of_engine["llm_request"].attributes["gen_ai.usage.completion_tokens"] == LONG["max_tokens"]
    right: dict[str, Said] = {}
    for _ in range(2):  # what is to stop is known only once it has been said
        for name, one in resumable({name: said.text for name, said in right.items()}).items():
            if name not in right:
                right[name] = await ask(running, headers, *one)
    assert right["stop string"].finish == "stop"
    assert right["base"].text != right["adapter not streamed"].text
    short = await ask(running, headers, COMPLETIONS, {"model": "a", **STORY, "max_tokens": 8})
    for times, how in enumerate(("worker", "hang", "core"), 1):
        lost = Sent()
        again = await disturbed(running, headers, how, right, short, lost, times)
        # `make chaos` bounds it, on a machine that does nothing else.
        print(f"{how}: service again after {again:.1f} s; the first start took {running.started_in:.1f} s")
        if how == "worker":
            found = await followed(running, store, 200, lost)
            assert found.row["code"] == found.line["code"] == "engine_restarting"
            assert 0 < found.row["output_tokens"] < LONG["max_tokens"]
    family = running.family()
    goes = asyncio.Event()
    last = asyncio.create_task(ask(running, headers, CHAT, {"model": "base", **COUNT, **STREAM}, goes))
    async with asyncio.timeout(WAIT):
        await goes.wait()
    await lose(running, "worker")
    assert await once_more(running) == 1
    assert (await last).code == "engine_stopped"
    assert not await gone(family, WAIT), "the engine's processes outlived the server"


async def once_more(running: Running) -> int:
    """The status with which the server ends after a loss too many: each start is lost at once.

    How many there may be is tested on the fake engine: here one more start might fail by a port that another
    process has taken, or the first loss be ten minutes ago, and count no more.
    """
    async with asyncio.timeout(WAIT):
        while running.process.returncode is None:
            await asyncio.sleep(0.5)
            with contextlib.suppress(AssertionError, psutil.NoSuchProcess):  # there is none just now
                running.core().kill()
    return running.process.returncode


async def test_limits_hold_while_the_engine_hangs(base_dir: Path, tmp_path: Path) -> None:
    settings = {"SERVED_MODEL_NAME": "base", "QUEUE_TIMEOUT": "3", "DRAIN_TIMEOUT": "4", "MAX_RUNNING": "2"}
    settings["ENGINE_STALL"] = "3600"  # it is never started again
    async with server(base_dir, tmp_path, **settings) as running:
        headers = await running.tenant("acme")
        running_one, leaves = (
            asyncio.create_task(
                ask(running, headers, CHAT, {"model": "base", **COUNT, **STREAM, "max_tokens": 460})
            )
            for _ in range(2)
        )
        await until(running, runs=2)
        family = running.family()
        await lose(running, "hang")
        began = time.monotonic()
        async with asyncio.timeout(WAIT):
            waited = await ask(running, headers, CHAT, {"model": "base", **COUNT})
        assert waited.code == "queue_timeout"
        assert time.monotonic() - began > 2.5
        leaves.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leaves
        await until(running, runs=1)  # a client that left does not keep its place
        running.process.terminate()
        began = time.monotonic()
        assert await running.exit_status(within=WAIT) == 0
        print(f"drained in {time.monotonic() - began:.1f} s")
        assert not await gone(family, WAIT), "the engine's processes outlived the server"
        with contextlib.suppress(httpx.TransportError):
            await running_one


# The seconds from an engine's first process until it has nearly started, by how its server ends meanwhile.
# One that is killed leaves the end to the guard, which finds the youngest processes by what they were started
# with. Those that were forked do not show that, so these are not, and start more slowly.
NEARLY_STARTED = {signal.SIGTERM: 3.0, signal.SIGKILL: 8.0}


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
async def test_the_server_ends_while_its_engine_is_started_again(
    base_dir: Path, tmp_path: Path, ending: signal.Signals
) -> None:
    settings = {"SERVED_MODEL_NAME": "base", "DRAIN_TIMEOUT": "2"}
    forked: Which = "all" if ending is signal.SIGTERM else "first"
    async with server(base_dir, tmp_path, forked=forked, **settings) as running:
        headers = await running.tenant("acme")
        going = asyncio.create_task(
            ask(running, headers, CHAT, {"model": "base", **COUNT, **STREAM, "max_tokens": 460})
        )
        await until(running, runs=1)
        known = running.family()
        await lose(running, "core")
        await running.next_child(known)
        await asyncio.sleep(random.uniform(0.0, NEARLY_STARTED[ending]))
        family = running.family()
        began = time.monotonic()
        running.process.send_signal(ending)
        status = await running.exit_status(within=WAIT)
        assert status == (0 if ending is signal.SIGTERM else -9), running.log.read_text()[-3000:]
        print(f"ended in {time.monotonic() - began:.1f} s")
        assert not await gone(family, WAIT), "the engine's processes outlived the server"
        with contextlib.suppress(httpx.TransportError):
            assert (await going).code is not None


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("moment", [0.0, 0.25, 1.0])
async def test_the_server_ends_while_it_starts(
    base_dir: Path, tmp_path: Path, moment: float, ending: signal.Signals
) -> None:
    """``moment`` is a part of the time from the engine's first process until it has nearly started."""
    forked: Which = "all" if ending is signal.SIGTERM else "server"
    async with starting(base_dir, tmp_path, forked=forked) as running:
        await running.next_child()
        await asyncio.sleep(moment * NEARLY_STARTED[ending])
        family = running.family()
        running.process.send_signal(ending)
        await running.exit_status(within=WAIT)
        assert not await gone(family, WAIT), "the engine's processes outlived the server"
