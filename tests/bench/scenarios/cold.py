"""The first token of an adapter that is on disk only, on a server that has nothing else to do.

Bare vLLM's time contains the call that loads the adapter, since no request can name it before.
"""

from __future__ import annotations

import random
import time

from tests.bench.adapters import of_rank
from tests.bench.client import Client
from tests.bench.scenario import Goal, Measure, Round, Scenario, Values
from tests.bench.servers import LARGE, Server
from tests.bench.stats import median
from tests.bench.workload import prompt, warm

WARM = of_rank(64, 1, first=200)
COLD = of_rank(64, 6, first=201)


async def measure(server: Server, client: Client, round_: Round) -> Values:
    # The first load of a process imports and compiles what later ones find ready.
    await warm(server, client, WARM)
    times = []
    for adapter in COLD[: round_.count(len(COLD), 2)]:
        arrival = time.perf_counter()
        await server.load(adapter)
        words = prompt(8, random.Random(adapter.seed))
        record = await client.ask(adapter, words, 8, label="cold", arrival=arrival)
        times.append(record.to_first_token)
    return {"first_token": median(times), "slowest": max(times)}


SCENARIO = Scenario(
    "cold",
    (
        Measure("first_token", "cold adapter's first token, median", "s", Goal("ratio", "≤", 1.1)),
        Measure("slowest", "cold adapter's first token, slowest", "s"),
    ),
    lambda round_: (*WARM, *COLD[: round_.count(len(COLD), 2)]),
    measure,
    setups=(LARGE,),
)
