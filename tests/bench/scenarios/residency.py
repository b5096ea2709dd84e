"""Two hundred adapters in turn through eight slots for half an hour: does anything grow?

Every ten seconds the memory, threads and open files of Loraplex's two sides are counted: the process that
answers HTTP, and the engine with its workers. What counts is the slope after a third of the time, as least
squares have it, with its 95 % confidence interval. ``growth`` is 0 where that interval holds 0, else its
upper end as a share of the level. Not part of a full run; ``--minutes`` makes it shorter or longer.
"""

from __future__ import annotations

import asyncio
import time

from tests.bench.adapters import of_rank
from tests.bench.client import Client, Record
from tests.bench.scenario import Goal, Measure, Round, Scenario, Values
from tests.bench.servers import Server, Setup
from tests.bench.stats import median, slope
from tests.bench.workload import closed_loop, prompt, uniform

ADAPTERS = of_rank(8, 200, first=800)
CLIENTS = 16
INPUT, OUTPUT = 8, 8  # tokens
MINUTES = 30.0
EVERY = 10.0  # seconds
WARM_UP = 1 / 3  # of the time
HOUR = 3600.0
# What is counted of each side, and its unit. RSS is sampled and drawn too.
SIDES = ("api", "engine")
COUNTED = {"memory": "MiB", "threads": "", "files": ""}


async def measure(server: Server, client: Client, round_: Round) -> Values:
    rng = round_.rng()
    adapters = uniform(len(ADAPTERS), round_.rng(1))
    minutes = round_.minutes or round_.seconds(MINUTES, 1)

    async def ask(number: int) -> Record:
        return await client.ask(ADAPTERS[next(adapters)], prompt(INPUT, rng), OUTPUT, label="churn")

    begin = time.perf_counter()
    async with closed_loop(CLIENTS, ask, drain=True):
        while (now := time.perf_counter() - begin) < minutes * 60:
            client.samples.append({"seconds": now, **await asyncio.to_thread(server.footprint)})
            await asyncio.sleep(round_.seconds(EVERY, 1))
    steady = [s for s in client.samples if s["seconds"] >= WARM_UP * minutes * 60]
    hours = [s["seconds"] / HOUR for s in steady]
    values: Values = {"requests": len(client.records) / minutes}
    for side in SIDES:
        for what in COUNTED:
            counts = [s[f"{side}_{what}"] for s in steady]
            values |= {f"{side}_{what}_{key}": v for key, v in _trend(hours, counts).items()}
    return values


def _trend(hours: list[float], counts: list[float]) -> Values:
    level = median(counts)
    per_hour, error = slope(hours, counts)
    growth = 0.0 if per_hour - error <= 0 else (per_hour + error) / level * 100
    return {"level": level, "slope": per_hour, "error": error, "growth": growth}


def _measures() -> tuple[Measure, ...]:
    rows = [Measure("requests", "requests a minute")]
    for side in SIDES:
        for what, unit in COUNTED.items():
            key, where = f"{side}_{what}", f"{side}, {what}"
            rows += [
                Measure(f"{key}_level", where, unit),
                Measure(f"{key}_slope", f"{where}: slope", f"{unit}/h"),
                Measure(f"{key}_error", f"{where}: slope, ±", f"{unit}/h"),
                Measure(f"{key}_growth", f"{where}: growth", "%/h", Goal("value", "≤", 1)),
            ]
    return tuple(rows)


SCENARIO = Scenario(
    "residency",
    _measures(),
    lambda _: ADAPTERS,
    measure,
    setups=(Setup(gpu_slots=8, host_slots=32, max_lora_rank=8),),
    servers=("loraplex",),
    runs=1,
    longest=None,
)
