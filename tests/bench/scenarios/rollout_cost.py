"""What rollouts cost requests: processor time of the API process by request, on the tests' fake engine.

One server answers clients who do not pause, in short blocks of three kinds: nobody looks at rollouts,
somebody does and there is none, and there is one, with a new version that gets half of the requests. Three
blocks beside each other, in an order drawn by chance, have one of each kind and are compared with each other
only, so that neither a machine that gets slower nor two processes that differ are taken for what rollouts
cost. The fake engine takes no time, so all that is measured is Loraplex.

Blocks of seconds differ by more than what is to be measured where others use the machine. So the two parts of
what a rollout costs are also measured each by itself: a look, which is bounded however many requests ended,
and one request at a time to an adapter with a rollout and to one without, in turns drawn by chance, a few
milliseconds apart. ``whole_most`` is both at the load at which a core of the API process has nothing left.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import httpx

from server import __main__, app
from server.accounts.usage import Usage
from server.app import create_app
from server.demo.process import free_port
from server.rollouts import runner
from server.settings import Settings
from tests.bench.scenario import Goal, Measure, Round, Simulation, Values
from tests.bench.servers import processor_s
from tests.bench.stats import bootstrap, median, middle, percent_more
from tests.support import tiny
from tests.support.fakes import FakeEngine
from tests.support.forks import PROCESSES
from tests.support.site import ADMIN_KEY, bearer

ADAPTER = "/admin/v1/tenants/acme/adapters/a"
ADMIN = bearer(ADMIN_KEY)
CLIENTS = 8
TOKENS = 16
THREES = 24
PAIRS = 3000
BLOCK_S = 2 * runner.LOOK_EVERY_S  # the clients' part of a block, with two looks
WRITTEN_S = 0.5  # after which the last requests of a block are in the database
# A round lasts so long at least, so that looks and writes of what it left are in it.
SETTLE_S = 2 * runner.LOOK_EVERY_S + 0.5
LOOKED_AT = (0, 10, 100, 1000)
KINDS = ("none", "idle", "during")
# Guards that never end a rollout of equal versions within a round.
BODY = {"version": 2, "steps": [50, 100], "hold": "1d", "guards": {"probes": False}}


def serve(settings: Settings, looks: Event) -> None:
    """The process of a server; while ``looks`` is not set nobody looks whether there is a rollout."""
    engine = FakeEngine(tiny.base())

    async def start(_: Settings) -> FakeEngine:
        return engine

    look = runner.Runner.look

    async def look_if_wanted(self: runner.Runner) -> bool:
        return looks.is_set() and await look(self)

    runner.Runner.look = look_if_wanted  # type: ignore[method-assign]
    gc.freeze()
    app.create_app = partial(create_app, start_engine=start)  # type: ignore[assignment, arg-type]
    raise SystemExit(__main__._serve(settings))


class Served:
    """A server process, with a customer whose adapter has two equal versions; ``looks`` as in ``serve``."""

    def __init__(self, process: Any, http: httpx.AsyncClient, looks: Event) -> None:
        self.process = process
        self.http = http
        self.looks = looks
        self.key = ""
        self.asked = 0

    async def prepare(self) -> None:
        async with asyncio.timeout(120):
            while not await self._ready():
                await asyncio.sleep(0.1)
        await self.http.post("/admin/v1/tenants", json={"id": "acme"}, headers=ADMIN)
        for _ in range(2):
            files = {p.name: p.read_bytes() for p in tiny.adapter(1).iterdir() if "adapter" in p.name}
            (await self.http.post(f"{ADAPTER}/versions", files=files, headers=ADMIN)).raise_for_status()
        await self.http.patch(ADAPTER, json={"live": 1}, headers=ADMIN)
        self.key = (await self.http.post("/admin/v1/tenants/acme/keys", json={}, headers=ADMIN)).json()["key"]

    async def _ready(self) -> bool:
        try:
            return (await self.http.get("/ready")).status_code == 200
        except httpx.TransportError:
            return False

    async def round(self, requests: int) -> float:
        """Milliseconds of processor time by request."""
        before, began = processor_s(self.process.pid), time.monotonic()
        left = iter(range(requests))

        async def client() -> None:
            for _ in left:
                await self._ask()

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        await asyncio.sleep(max(0.0, SETTLE_S - (time.monotonic() - began)))
        await asyncio.sleep(SETTLE_S / 2)
        return 1000 * (processor_s(self.process.pid) - before) / requests

    async def block(self, seconds: float) -> float:
        """Milliseconds of processor time by request of clients who do not pause for so long."""
        before, until, asked = processor_s(self.process.pid), time.monotonic() + seconds, self.asked

        async def client() -> None:
            while time.monotonic() < until:
                await self._ask()

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        await asyncio.sleep(WRITTEN_S)
        return 1000 * (processor_s(self.process.pid) - before) / (self.asked - asked)

    async def _ask(self) -> None:
        self.asked += 1
        body = _body("a", self.asked)
        answer = await self.http.post("/v1/chat/completions", json=body, headers=bearer(self.key))
        answer.raise_for_status()

    async def begin(self) -> str:
        return await begun(self.http, ADAPTER, ADMIN)

    async def end(self, one: str) -> None:
        seen = (await self.http.get(one, headers=ADMIN)).json()
        assert seen["state"] == "running", seen
        assert seen["numbers"]["new"]["requests"] > 0, seen
        await self.http.patch(one, json={"action": "roll_back"}, headers=ADMIN)


def _body(adapter: str, number: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": "hi"}]
    return {"model": adapter, "messages": turns, "max_tokens": TOKENS, "user": str(number)}


async def begun(http: httpx.AsyncClient, adapter: str, admin: dict[str, str]) -> str:
    """The address of a new rollout of version 2 that has its first share; ``admin``: headers with a key."""
    answer = await http.post(f"{adapter}/rollouts", json=BODY, headers=admin)
    answer.raise_for_status()
    one = f"{adapter}/rollouts/{answer.json()['id']}"
    async with asyncio.timeout(120):
        while (await http.get(one, headers=admin)).json()["share"] == 0:
            await asyncio.sleep(0.1)
    return one


@contextlib.asynccontextmanager
async def served(folder: Path, **settings: Any) -> AsyncIterator[Served]:
    """A server with these settings, until the block ends."""
    port = free_port(0)
    made = tiny.settings(folder, port=port, log_level="error", drain_timeout=0.1, **settings)
    looks = PROCESSES.Event()
    looks.set()
    process = PROCESSES.Process(target=serve, args=(made, looks))
    process.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            one = Served(process, http, looks)
            await one.prepare()
            yield one
    finally:
        process.kill()
        process.join()


async def looks(times: int) -> Values:
    """Milliseconds of processor time that one look takes, by how many requests have ended since the last."""
    with tempfile.TemporaryDirectory() as folder:
        async with tiny.fake_site(Path(folder), FakeEngine(tiny.base())) as site:
            await site.tenant("acme", {"a": tiny.adapter(1)})
            await site.upload("acme", "a", tiny.adapter(1))
            await site.admin.patch(ADAPTER, json={"live": 1})
            judge = site.services.judge
            took = {"look_none": await _timed(runner.Runner(judge).look, times)}
            made = await site.admin.post(f"{ADAPTER}/rollouts", json=BODY)
            assert made.status_code == 201, made.text
            await asyncio.sleep(SETTLE_S)
            look, draw, number = judge.look, random.Random(1), 0

            async def nothing(_: Any) -> None:
                """The server's own looks would take what is to be measured."""

            judge.look = nothing

            async def one() -> None:
                (stored,) = await judge.rows.active()
                await look(stored)

            for many in LOOKED_AT:
                found = []
                for _ in range(times):
                    for _ in range(many):
                        number += 1
                        site.services.usage_writer.record(_ended(draw.choice((1, 2)), number))
                    await site.services.usage_writer.flush()
                    found.append(await _timed(one, 1))
                took[f"look_{many}"] = median(found)
    return took


async def pairs(many: int) -> Values:
    """What a rollout adds to one request's processor time, in ms, without looks: the mean of the middle 80 %.

    The client is in this process too; ``none`` of ``measure`` is a request without it.
    """
    draw, asked = random.Random(1), 0
    with tempfile.TemporaryDirectory() as folder:
        async with tiny.fake_site(Path(folder), FakeEngine(tiny.base()), gpu_slots=4, host_slots=8) as site:
            key = await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(1)})
            for name in "ab":
                await site.upload("acme", name, tiny.adapter(2))
                await site.admin.patch(ADAPTER.removesuffix("a") + name, json={"live": 1})
            await begun(site.admin, ADAPTER, ADMIN)

            async def nothing(_: Any) -> None:
                """Looks are measured by ``looks``."""

            site.services.judge.look = nothing  # type: ignore[method-assign]

            async def took(name: str) -> float:
                nonlocal asked
                asked += 1
                before = time.process_time()
                answer = await site.http.post(
                    "/v1/chat/completions", json=_body(name, asked), headers=bearer(key)
                )
                answer.raise_for_status()
                return 1000 * (time.process_time() - before)

            for _ in range(100):  # warm, and both versions of both in slots
                await took("a")
                await took("b")
            gc.freeze()
            found, alone = [], []
            for _ in range(many):
                taken = {name: await took(name) for name in draw.sample("ab", 2)}
                found.append(taken["a"] - taken["b"])
                alone.append(taken["b"])
    kept = middle(found)
    low, high = bootstrap(kept)
    return {
        "pair_alone": median(alone),
        "pair_more": sum(kept) / len(kept),
        "pair_least": low,
        "pair_most": high,
    }


async def _timed(work: Callable[[], Awaitable[None]], times: int) -> float:
    began = time.process_time()
    for _ in range(times):
        await work()
    return 1000 * (time.process_time() - began) / times


def _ended(version: int, number: int) -> Usage:
    return Usage(
        at=datetime.now(UTC),
        tenant="acme",
        key=None,
        adapter="a",
        version=version,
        endpoint="chat",
        outcome="completed",
        request_id=str(number),
        output_tokens=TOKENS,
        first_token_seconds=0.1,
        seconds=1.0,
        finish="length",
    )


async def measure(seconds: float, threes: int) -> Values:
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    draw = random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
        async with served(Path(folder)) as one:
            for kind in KINDS:  # warm, with both versions in slots
                await _block(one, kind, seconds)
            for _ in range(threes):
                for kind in draw.sample(KINDS, len(KINDS)):
                    found[kind].append(await _block(one, kind, seconds))
    return {kind: median(found[kind]) for kind in KINDS} | {
        name: value
        for kind, than in (("idle", "none"), ("during", "idle"))
        for name, value in _more(kind, found[kind], found[than]).items()
    }


async def _block(one: Served, kind: str, seconds: float) -> float:
    if kind == "none":
        one.looks.clear()
    rollout = await one.begin() if kind == "during" else None
    took = await one.block(seconds)
    if rollout is not None:
        await one.end(rollout)
    one.looks.set()
    return took


def _more(kind: str, these: list[float], those: list[float]) -> Values:
    """In percent, by the mean of neighbours' ratios, and what 95 % of its bootstrap lies between."""
    found = percent_more([math.log(a / b) for a, b in zip(these, those, strict=True)])
    return {f"{kind}_{name}": value for name, value in zip(("more", "least", "most"), found, strict=True)}


def simulate(round_: Round) -> Values:
    alone = asyncio.run(looks(round_.count(15, 2))) | asyncio.run(pairs(round_.count(PAIRS, 100)))
    found = alone | asyncio.run(measure(round_.seconds(BLOCK_S, 3.0), round_.count(THREES, 2)))
    look = 100 * max(found[f"look_{many}"] for many in LOOKED_AT) / (1000 * runner.LOOK_EVERY_S)
    return found | {"whole_most": look + 100 * max(0.0, found["pair_most"]) / found["none"]}


SCENARIO = Simulation(
    "rollout-cost",
    (
        Measure("look_none", "a look, every two seconds, without a rollout", "ms"),
        *(
            Measure(
                f"look_{many}",
                f"a look at a rollout, {many} requests since the last",
                "ms",
                Goal("value", "≤", 40),
            )
            for many in LOOKED_AT
        ),
        Measure("pair_alone", "a request without a rollout, its client's part included", "ms"),
        Measure("pair_more", "a request with a rollout: more than without, looks apart", "ms"),
        Measure("pair_least", "… 95 % interval, from  ", "ms"),
        Measure("pair_most", "… to  ", "ms"),
        Measure(
            "whole_most",
            "the largest look and that, of a core that requests fill",
            "%",
            Goal("value", "≤", 2),
        ),
        Measure("none", "nobody looks at rollouts: processor time by request", "ms"),
        Measure("idle", "no rollout: processor time by request", "ms"),
        Measure("during", "beside a rollout: processor time by request", "ms"),
        Measure("idle_more", "no rollout: more than where nobody looks", "%"),
        Measure("idle_least", "… 95 % interval, from", "%"),
        Measure("idle_most", "… to", "%", Goal("value", "≤", 2)),
        Measure("during_more", "beside a rollout: more than without one", "%"),
        Measure("during_least", "… 95 % interval, from ", "%"),
        Measure("during_most", "… to ", "%", Goal("value", "≤", 2)),
    ),
    simulate,
    settings={"threes": THREES, "pairs": PAIRS, "seconds": BLOCK_S, "tokens": TOKENS, "clients": CLIENTS},
    runs=1,
    longest=3600.0,
)
