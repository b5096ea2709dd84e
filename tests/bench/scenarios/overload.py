"""Three times as many requests as can be served, for five minutes, of twenty customers.

What can be served is measured first, with more clients than the engine has places, since long queues share
loads. Then requests come at three times that rate, whether answers come or not. At the end all that still
wait hang up, and one more customer asks: how long that takes is the recovery. Not part of a full run;
``--minutes`` makes it shorter or longer.
"""

from __future__ import annotations

import asyncio
import itertools
import time

from tests.bench.adapters import of_rank
from tests.bench.client import Client, Record
from tests.bench.scenario import Goal, Measure, Round, Scenario, Values
from tests.bench.servers import Server, Setup
from tests.bench.workload import closed_loop, gamma_arrivals, prompt, uniform

SETUP = Setup(max_num_seqs=8)
*ADAPTERS, LAST = of_rank(8, 21, first=1100)
INPUT, OUTPUT = 8, 16  # tokens
CLIENTS = 8 * SETUP.max_num_seqs
TIMES = 3.0
MINUTES = 5.0
EVERY = 2.0  # seconds
RECOVERY = 10.0  # seconds
# From here on queues are as full as they get.
WARM_UP = 1 / 2  # of the time
REFUSALS = (429, 503)


async def measure(server: Server, client: Client, round_: Round) -> Values:
    rng = round_.rng()
    adapters = uniform(len(ADAPTERS), round_.rng(1))
    seconds = 60 * (round_.minutes or round_.seconds(MINUTES, 0.5))

    async def ask(label: str) -> Record:
        return await client.ask(ADAPTERS[next(adapters)], prompt(INPUT, rng), OUTPUT, label=label)

    async with closed_loop(CLIENTS, lambda _: ask("capacity")):
        await asyncio.sleep(round_.seconds(30, 10))
    capacity = sum(r.error is None and r.end is not None for r in client.records) / round_.seconds(30, 10)

    begin = time.perf_counter()
    times = gamma_arrivals(TIMES * capacity, 1, round_.rng(2))
    arrivals = itertools.takewhile(lambda at: at < seconds, times)
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(_watch(server, client, round_.seconds(EVERY, 0.5)))
        asking = []
        for at in arrivals:
            await asyncio.sleep(begin + at - time.perf_counter())
            asking.append(group.create_task(ask("overload")))
        for task in (watching, *asking):
            task.cancel()
    asked = client.labelled("overload")
    answered = [r for r in asked if r.status is not None]
    after = await asyncio.wait_for(client.ask(LAST, prompt(INPUT, rng), OUTPUT, label="after"), 6 * RECOVERY)
    served = sum(r.status == 200 and r.end is not None for r in answered)
    return {
        "offered": len(asked) / seconds / capacity,
        "served": served / seconds / capacity,
        "refused": sum(r.status in REFUSALS for r in answered) / len(asked),
        "unexpected": sum(not _expected(r) for r in answered),
        "api_memory": _growth(client.samples, "api_memory", seconds),
        "engine_memory": _growth(client.samples, "engine_memory", seconds),
        "recovery": after.to_first_token,
    }


def _expected(record: Record) -> bool:
    if record.status in REFUSALS:
        return record.retry_after is not None and record.retry_after >= 1
    return record.status == 200 and record.error is None


async def _watch(server: Server, client: Client, every: float) -> None:
    begin = time.perf_counter()
    while True:
        now = time.perf_counter() - begin
        client.samples.append({"seconds": now, **await asyncio.to_thread(server.footprint)})
        await asyncio.sleep(every)


def _growth(samples: list[dict[str, float]], what: str, seconds: float) -> float:
    """Most memory in the last quarter to most in the one before."""
    before = [s[what] for s in samples if WARM_UP <= s["seconds"] / seconds < WARM_UP + 0.25]
    last = [s[what] for s in samples if s["seconds"] / seconds >= WARM_UP + 0.25]
    return max(last) / max(before)


SCENARIO = Scenario(
    "overload",
    (
        Measure("offered", "requests, to what can be served", "×"),
        Measure("served", "answers, to what can be served", "×"),
        Measure("refused", "share refused with 429 or 503"),
        Measure("unexpected", "other ends, or without Retry-After", "", Goal("value", "≤", 0)),
        Measure("api_memory", "API, memory: last quarter to the one before", "×", Goal("value", "≤", 1.02)),
        Measure("engine_memory", "engine, memory: the same", "×", Goal("value", "≤", 1.02)),
        Measure("recovery", "first token once the others hung up", "s", Goal("value", "≤", RECOVERY)),
    ),
    lambda _: (*ADAPTERS, LAST),
    measure,
    setups=(SETUP,),
    servers=("loraplex",),
    runs=1,
    longest=None,
)
