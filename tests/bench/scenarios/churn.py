"""32 adapters of ranks 8 to 64 for 16 clients, with host memory for 8 of them and for all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace

from tests.bench.adapters import mixed
from tests.bench.client import Client, Record
from tests.bench.scenario import Goal, Measure, Round, Scenario, Values
from tests.bench.servers import LARGE, Server
from tests.bench.stats import percentile, tokens_between, waiting_between
from tests.bench.workload import closed_loop, prompt, uniform, warm, zipf

ADAPTERS = mixed(32)
CLIENTS = 16
INPUT, OUTPUT = 8, 16  # tokens
POPULARITIES = ("uniform", "zipf")
HOST_SLOTS = (8, 32)


async def measure(server: Server, client: Client, round_: Round) -> Values:
    await warm(server, client, ADAPTERS)
    values: Values = {}
    for name in POPULARITIES:
        cell = await _cell(client, round_, name)
        values |= {f"{name}_{server.setup.host_slots}_{key}": value for key, value in cell.items()}
    return values


async def _cell(client: Client, round_: Round, name: str) -> Values:
    rng = round_.rng()
    adapters = _popularity(name, round_)

    async def ask(number: int) -> Record:
        return await client.ask(ADAPTERS[next(adapters)], prompt(INPUT, rng), OUTPUT, label=name)

    # Drained, so that the requests that waited longest are among those counted.
    async with closed_loop(CLIENTS, ask, drain=True):
        await asyncio.sleep(round_.seconds(2, 1))
        start = time.perf_counter()
        await asyncio.sleep(round_.seconds(15, 5))
        end = time.perf_counter()
    records = client.labelled(name)
    latencies = [r.duration for r in waiting_between(records, start, end)]
    return {
        "tokens_per_s": tokens_between(records, start, end) / (end - start),
        "p99": percentile(latencies, 99),
    }


def _popularity(name: str, round_: Round) -> Iterator[int]:
    rng = round_.rng(1)
    return uniform(len(ADAPTERS), rng) if name == "uniform" else zipf(len(ADAPTERS), 1.0, rng)


def _measures() -> tuple[Measure, ...]:
    rows = []
    for host_slots in HOST_SLOTS:
        for name in POPULARITIES:
            key, where = f"{name}_{host_slots}", f"{name}, {host_slots} host slots"
            rows += [
                Measure(f"{key}_tokens_per_s", where, "tok/s", Goal("ratio", "≥", 1.3)),
                Measure(f"{key}_p99", f"{where}: latency p99", "s", Goal("ratio", "≤", 0.7)),
            ]
    return tuple(rows)


SCENARIO = Scenario(
    "churn",
    _measures(),
    lambda _: ADAPTERS,
    measure,
    setups=tuple(replace(LARGE, host_slots=host_slots) for host_slots in HOST_SLOTS),
    runs=2,
)
