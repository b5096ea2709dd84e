"""Four customers generate a thousand tokens each in all four slots, and a fifth asks for an adapter on disk.

Waiting for a slot to be free would take minutes. What the four get must be what they would have got alone, so
they are asked again without the fifth and compared; in float32, since in bfloat16 the batch that a token is
computed in can change it. A server whose fifth customer got nothing has nothing to be compared.
"""

from __future__ import annotations

import asyncio
import math
import random
import time

from tests.bench.adapters import Adapter, of_rank
from tests.bench.client import Client, Record
from tests.bench.scenario import Goal, Measure, Round, Scenario, Values
from tests.bench.servers import PREEMPT_AFTER, SLOT_PATIENCE, Server, Setup
from tests.bench.stats import gaps
from tests.bench.workload import prompt, warm

FOUR = of_rank(16, 4, first=700)
(FIFTH,) = of_rank(16, 1, first=704)
INPUT, OUTPUT = 16, 1_000  # tokens
FIFTH_OUTPUT = 8
BETWEEN = 2.0  # seconds from the first tokens of the four to the fifth's request
WATCHED = 45.0  # seconds; what has not come by then counts as never
LOAD = 3.0  # seconds that a cold adapter may take once it has a slot
BOUND = SLOT_PATIENCE + PREEMPT_AFTER + LOAD


async def measure(server: Server, client: Client, round_: Round) -> Values:
    await warm(server, client, FOUR)
    tokens = round_.count(OUTPUT, 300)

    def start(label: str) -> list[asyncio.Task[Record]]:
        return [asyncio.create_task(_ask(client, adapter, tokens, label)) for adapter in FOUR]

    tasks = start("four")
    try:
        while not all(r.chunks for r in client.labelled("four")):
            await asyncio.sleep(0.05)
        await asyncio.sleep(BETWEEN)
        tasks.append(asyncio.create_task(_arrive(server, client)))
        await asyncio.wait(tasks[-1:], timeout=WATCHED)
        (fifth,) = client.labelled("fifth")
        if not fifth.chunks:
            return {"first_token": math.inf, "unchanged": math.nan, "longest_gap": math.nan}
        four = await asyncio.gather(*tasks[: len(FOUR)])
        tasks = start("alone")
        alone = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "first_token": fifth.to_first_token,
        "unchanged": sum(a.text == b.text and not a.error for a, b in zip(four, alone, strict=True)),
        "longest_gap": max(max(gaps(r.chunks)) for r in four),
        "four_duration": max(r.duration for r in four),
        "alone_duration": max(r.duration for r in alone),
    }


async def _ask(client: Client, adapter: Adapter, tokens: int, label: str) -> Record:
    words = prompt(INPUT, random.Random(adapter.seed))
    return await client.ask(adapter, words, tokens, label=label)


async def _arrive(server: Server, client: Client) -> Record:
    arrival = time.perf_counter()
    await server.load(FIFTH)
    words = prompt(INPUT, random.Random(FIFTH.seed))
    return await client.ask(FIFTH, words, FIFTH_OUTPUT, label="fifth", arrival=arrival)


SCENARIO = Scenario(
    "hog",
    (
        Measure("first_token", "the fifth adapter's first token", "s", Goal("value", "≤", BOUND)),
        Measure("unchanged", "of the four answers, as without the fifth", "", Goal("value", "≥", len(FOUR))),
        Measure("longest_gap", "longest pause in one of the four answers", "s"),
        Measure("four_duration", "the four answers beside the fifth", "s"),
        Measure("alone_duration", "the four answers without the fifth", "s"),
    ),
    lambda _: (*FOUR, FIFTH),
    measure,
    setups=(Setup(dtype="float32"),),
    runs=1,
)
