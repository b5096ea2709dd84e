"""One customer with thirty clients beside nine with one each, on a server that is too small for them.

At most four sequences run at once, so that all ten customers always have something waiting or running, and
equal shares are what fairness means. The nine are first measured without the tenth.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractAsyncContextManager

from tests.bench.adapters import Adapter, of_rank
from tests.bench.client import Client, Record
from tests.bench.scenario import Goal, Measure, Round, Scenario, Values
from tests.bench.servers import Server, Setup
from tests.bench.stats import jain, percentile, tokens_between, waiting_between
from tests.bench.workload import closed_loop, prompt, warm

CROWDED = Setup(max_num_seqs=4)
NOISY, *QUIET = of_rank(16, 10, first=500)
NOISY_CLIENTS = 30
INPUT, OUTPUT = 8, 8  # tokens: many small requests, so that shares are not cut off by a request's length


async def measure(server: Server, client: Client, round_: Round) -> Values:
    rng = round_.rng()
    await warm(server, client, [NOISY, *QUIET])

    def asking(label: str, clients: list[Adapter]) -> AbstractAsyncContextManager[None]:
        async def ask(number: int) -> Record:
            return await client.ask(clients[number], prompt(INPUT, rng), OUTPUT, label=label)

        return closed_loop(len(clients), ask, drain=True)

    async with asking("alone", QUIET):
        await asyncio.sleep(round_.seconds(10, 4))
    async with asking("noisy", [NOISY] * NOISY_CLIENTS + QUIET):
        await asyncio.sleep(round_.seconds(3, 1))
        start = time.perf_counter()
        await asyncio.sleep(round_.seconds(24, 6))
        end = time.perf_counter()
    together = client.labelled("noisy")
    served = {
        a.name: tokens_between([r for r in together if r.adapter == a.name], start, end)
        for a in (NOISY, *QUIET)
    }
    alone_p99 = percentile([r.to_first_token for r in client.labelled("alone")], 99)
    quiet = waiting_between([r for r in together if r.adapter != NOISY.name], start, end)
    noisy_p99 = percentile([r.to_first_token for r in quiet], 99)
    return {
        "jain": jain(list(served.values())),
        "noisy_share": served[NOISY.name] / max(1.0, sum(served.values())),
        "alone_p99": alone_p99,
        "noisy_p99": noisy_p99,
        "noisy_to_alone": noisy_p99 / alone_p99,
    }


SCENARIO = Scenario(
    "noisy",
    (
        Measure("jain", "Jain index of tokens served", "", Goal("value", "≥", 0.95)),
        Measure("noisy_share", "the noisy customer's share of tokens"),
        Measure("alone_p99", "quiet customers' first token alone, p99", "s"),
        Measure("noisy_p99", "quiet customers' first token beside the noisy one, p99", "s"),
        Measure("noisy_to_alone", "p99 beside the noisy one to p99 alone", "×", Goal("value", "≤", 2)),
    ),
    lambda _: (NOISY, *QUIET),
    measure,
    setups=(CROWDED,),
    once=("vllm",),
    runs=2,
)
