"""Three customers with weights 4, 2 and 1, each with more clients than the server has places.

Bare vLLM knows no weights and is not asked.
"""

from __future__ import annotations

import asyncio
import time

from tests.bench.adapters import Adapter
from tests.bench.client import Client, Record
from tests.bench.scenario import Goal, Measure, Round, Scenario, Values
from tests.bench.scenarios.noisy import CROWDED
from tests.bench.servers import Server
from tests.bench.stats import tokens_between, weight_error
from tests.bench.workload import closed_loop, prompt, warm

CUSTOMERS = tuple(Adapter(16, 600 + i, weight) for i, weight in enumerate((4.0, 2.0, 1.0)))
CLIENTS_EACH = 8
INPUT, OUTPUT = 8, 8  # tokens: many small requests, so that shares are not cut off by a request's length


async def measure(server: Server, client: Client, round_: Round) -> Values:
    rng = round_.rng()
    await warm(server, client, CUSTOMERS)

    async def ask(number: int) -> Record:
        adapter = CUSTOMERS[number % len(CUSTOMERS)]
        return await client.ask(adapter, prompt(INPUT, rng), OUTPUT, label="backlogged")

    async with closed_loop(CLIENTS_EACH * len(CUSTOMERS), ask):
        await asyncio.sleep(round_.seconds(3, 1))
        start = time.perf_counter()
        await asyncio.sleep(round_.seconds(40, 6))
        end = time.perf_counter()
    records = client.labelled("backlogged")
    served = [tokens_between([r for r in records if r.adapter == a.name], start, end) for a in CUSTOMERS]
    total = max(1.0, sum(served))
    return {
        "error": weight_error(served, [a.weight for a in CUSTOMERS]),
        **{f"share_{a.weight:g}": tokens / total for a, tokens in zip(CUSTOMERS, served, strict=True)},
    }


SCENARIO = Scenario(
    "weights",
    (
        Measure("error", "largest distance from 4:2:1", "", Goal("value", "≤", 0.10)),
        *(Measure(f"share_{a.weight:g}", f"share of weight {a.weight:g}") for a in CUSTOMERS),
    ),
    lambda _: CUSTOMERS,
    measure,
    setups=(CROWDED,),
    runs=2,
    servers=("loraplex",),
)
