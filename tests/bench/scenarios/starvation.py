"""Sixteen clients keep four adapters busy; every ten seconds somebody asks for a fifth.

Bare vLLM is watched for a minute, not for ever: what has not come by then counts as never.
"""

from __future__ import annotations

import asyncio
import time

from tests.bench.adapters import of_rank
from tests.bench.client import Client, Record
from tests.bench.scenario import Goal, Measure, Round, Scenario, Values
from tests.bench.servers import SLOT_PATIENCE, Server
from tests.bench.stats import median, percentile, tokens_between
from tests.bench.workload import closed_loop, prompt, warm

HOT = of_rank(16, 4, first=400)
(COLD,) = of_rank(16, 1, first=404)
CLIENTS = 16
INPUT, OUTPUT = 16, (10, 60)  # tokens
EVERY = 10.0  # seconds
WATCHED = 60.0  # seconds from the first cold request


async def measure(server: Server, client: Client, round_: Round) -> Values:
    rng = round_.rng()
    await warm(server, client, [COLD, *HOT])

    async def hot(number: int) -> Record:
        adapter = HOT[number % len(HOT)]
        return await client.ask(adapter, prompt(INPUT, rng), rng.randint(*OUTPUT), label="hot")

    async def cold(after: float) -> None:
        await asyncio.sleep(after)
        await client.ask(COLD, prompt(INPUT, rng), 8, label="cold")

    async with closed_loop(CLIENTS, hot):
        await asyncio.sleep(3)
        start = time.perf_counter()
        asked = [asyncio.create_task(cold(i * EVERY)) for i in range(round_.count(4, 1))]
        try:
            await asyncio.wait(asked, timeout=round_.seconds(WATCHED, 15))
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        end = time.perf_counter()
    waits = [r.to_first_token for r in client.labelled("cold")]
    hot_records = client.labelled("hot")
    hot_p90 = percentile([r.duration for r in hot_records if r.end is not None], 90)
    return {
        "cold_median": median(waits),
        "cold_max": max(waits),
        "hot_p90": hot_p90,
        "cold_max_to_bound": max(waits) / (2 * SLOT_PATIENCE + hot_p90),
        "hot_tokens_per_s": tokens_between(hot_records, start, end) / (end - start),
    }


SCENARIO = Scenario(
    "starvation",
    (
        Measure("cold_median", "cold adapter's first token, median", "s"),
        Measure("cold_max", "cold adapter's first token, max", "s"),
        Measure("hot_p90", "hot request's duration, p90", "s"),
        Measure(
            "cold_max_to_bound",
            "cold max to 2 × slot_patience + hot p90",
            "×",
            Goal("value", "≤", 1),
        ),
        Measure("hot_tokens_per_s", "hot adapters", "tok/s"),
    ),
    lambda _: (*HOT, COLD),
    measure,
    once=("vllm",),
)
