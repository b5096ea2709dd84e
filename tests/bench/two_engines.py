"""``python -m tests.bench.two_engines``: the same requests to one engine, then to two behind a gateway.

``--customers`` with an adapter each send ``--requests`` in all, the popular ones more than the others (Zipf,
exponent 1), eight at a time. What one engine says, the two have to say too, and with nothing in memory at the
start both together may load 1.1 times as many adapters as were asked for. The engines have no model, or with
``--real`` are vLLM's on the demo's base in float32. They share the data folder: one process becomes a fleet.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tests.bench.losses import Process, check, customer, prepared, started, until
from tests.bench.workload import zipf

PROMPTS = ("Name a colour.", "What is the time?", "Count to ten.", "Who are you?", "Say something new.")
AT_ONCE, TOKENS = 8, 12
MOST_LOADS = 1.1  # for each adapter that was asked for
SLOTS = 8


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    customer: int
    prompt: str


@dataclass(frozen=True, slots=True)
class Seen:
    """``answers`` in the order of the requests; ``loads`` by engine."""

    answers: list[str]
    loads: list[int]
    seconds: float


async def asked(server: Process, asks: Sequence[Ask], keys: Sequence[dict[str, str]]) -> list[str]:
    """What ``server`` answers."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one(ask: Ask) -> str:
        messages = [{"role": "user", "content": ask.prompt}]
        sent = {
            "model": "a",
            "messages": messages,
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        async with room:
            answer = await server.http.post("/v1/chat/completions", json=sent, headers=keys[ask.customer])
        check(answer.status_code == 200, answer.text)
        return str(answer.json()["choices"][0]["message"]["content"])

    return list(await asyncio.gather(*map(one, asks)))


async def seen(
    server: Process, engines: Sequence[Process], asks: Sequence[Ask], keys: Sequence[dict[str, str]]
) -> Seen:
    """The answers of ``server``, and what ``engines`` have loaded for them."""
    loads = "loraplex_stage_seconds_count"
    before, began = [await one.metric(loads) for one in engines], time.monotonic()
    answers = await asked(server, asks, keys)
    took = time.monotonic() - began
    after = [await one.metric(loads) for one in engines]
    return Seen(answers, [round(now - then) for now, then in zip(after, before, strict=True)], took)


class Runs:
    """``one``, then ``two``: each starts what it needs, and ends it."""

    def __init__(self, folder: Path, customers: int, *, real: bool) -> None:
        self._customers = customers
        self._real = real
        self._settings = {"DATA_DIR": str(folder), "GPU_SLOTS": str(SLOTS), "HOST_SLOTS": str(customers + 8)}
        self._keys: list[dict[str, str]] = []

    async def one(self, asks: Sequence[Ask]) -> Seen:
        """One engine; makes the customers first, so that theirs are in its memory."""
        settings, folders = await prepared(self._customers, real=self._real)
        self._settings |= settings
        server = await self._started("all")
        try:
            await until(server.is_ready, "one process is ready")
            for number, folder in enumerate(folders):
                self._keys.append(await customer(server, f"c{number}", folder))
            return await seen(server, [server], asks, self._keys)
        finally:
            await server.end()

    async def two(self, asks: Sequence[Ask]) -> Seen:
        """Two engines with nothing in memory, and a gateway."""
        servers = [await self._started(role) for role in ("replica", "replica", "gateway")]
        *replicas, gateway = servers

        async def known() -> bool:
            return await gateway.metric("loraplex_replica_up{") == len(replicas)

        try:
            for one in servers:
                await until(one.is_ready, "a process is ready")
            await until(known, "the gateway knows both replicas")
            return await seen(gateway, replicas, asks, self._keys)
        finally:
            for one in servers:
                await one.end()

    async def _started(self, role: str) -> Process:
        return await started(self._settings | {"ROLE": role}, real=self._real)


async def compare(requests: int, customers: int, *, real: bool) -> bool:
    """Whether all was as it has to be; prints what was seen."""
    rng = random.Random(1)
    asks = [Ask(number, rng.choice(PROMPTS)) for number in islice(zipf(customers, 1.0, rng), requests)]
    placed = len({ask.customer for ask in asks})
    folder = Path(tempfile.mkdtemp(prefix="loraplex-two-"))
    try:
        runs = Runs(folder, customers, real=real)
        one, two = await runs.one(asks), await runs.two(asks)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    others = [number for number in range(requests) if one.answers[number] != two.answers[number]]
    distinct = len(set(one.answers))
    print(f"{requests} requests of {placed} of {customers} customers, {distinct} different answers")
    print(f"one engine: {one.seconds:.0f} s; two behind a gateway: {two.seconds:.0f} s")
    for number in others[:5]:
        print(f"{asks[number]}: {one.answers[number]!r}, by two engines {two.answers[number]!r}")
    print(f"other answers: {len(others)}")
    loads = sum(two.loads)
    parts = " + ".join(map(str, two.loads))
    print(f"loads: {parts} = {loads / placed:.2f} for each adapter that was asked for, at most {MOST_LOADS}")
    return not others and distinct > 1 and loads <= MOST_LOADS * placed and min(two.loads) > 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.two_engines", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--customers", type=int, default=40)
    parser.add_argument("--real", action="store_true", help="on vLLM")
    options = parser.parse_args()
    held = asyncio.run(compare(options.requests, options.customers, real=options.real))
    raise SystemExit(0 if held else 1)


if __name__ == "__main__":
    main()
