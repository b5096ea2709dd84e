"""A warm stream while ten cold adapters of rank 64, about 76 MB each, arrive half a second apart."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

from tests.bench.adapters import Adapter, of_rank
from tests.bench.client import Client, Record
from tests.bench.scenario import Goal, Measure, Round, Scenario, Values
from tests.bench.servers import LARGE, MAX_MODEL_LEN, Server
from tests.bench.stats import gaps, median, percentile
from tests.bench.workload import prompt, warm

(WARM,) = of_rank(16, 1, first=300)
COLD = of_rank(64, 10, first=301)
BETWEEN = 0.5  # seconds
# Tokens of a cold request: few, since it is its load that is measured. On CPU each token of a prompt costs
# bare vLLM about as much as a step of the warm stream.
INPUT, OUTPUT = 2, 2
STREAM_INPUT = 16
STREAM = MAX_MODEL_LEN - 2 * STREAM_INPUT  # more tokens than the warm stream can get to


async def measure(server: Server, client: Client, round_: Round) -> Values:
    await warm(server, client, [WARM])
    stream = asyncio.create_task(
        client.ask(WARM, prompt(STREAM_INPUT, random.Random(1)), STREAM, label="stream")
    )
    try:
        await asyncio.sleep(1)
        quiet_from = time.perf_counter()
        await asyncio.sleep(round_.seconds(8, 3))
        storm_from = time.perf_counter()
        cold = await _storm(server, client, round_)
        storm_to = time.perf_counter()
        # What is left when nothing has to be loaded: the steps that the requests themselves make longer.
        await _storm(server, client, round_)
        again_to = time.perf_counter()
        if stream.done():
            raise RuntimeError(f"the warm stream ended before the storm did: {stream.result().error}")
    finally:
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)
    (record,) = client.labelled("stream")
    quiet = gaps(record.chunks, quiet_from, storm_from)
    storm, again = parts(record.chunks, storm_from, storm_to, again_to)
    return {
        "quiet_median": median(quiet) * 1000,
        "quiet_p99": percentile(quiet, 99) * 1000,
        "p99": percentile(storm, 99) * 1000,
        "max": max(storm) * 1000,
        "again_p99": percentile(again, 99) * 1000,
        "p99_to_quiet_p99": percentile(storm, 99) / percentile(quiet, 99),
        "max_to_quiet_median": max(storm) / median(quiet),
        "p99_to_again": percentile(storm, 99) / percentile(again, 99),
        "cold_first_token": median(r.to_first_token for r in cold),
    }


def parts(
    chunks: Sequence[float], storm_from: float, storm_to: float, again_to: float
) -> tuple[list[float], list[float]]:
    """The gaps of the storm and those after it; one that goes on when a part ends belongs to that part."""
    times = [*(t for t in chunks if t < again_to), again_to]
    storm_over = min(t for t in times if t >= storm_to)
    return gaps(times, storm_from, storm_over), gaps([t for t in times if t >= storm_over])


async def _storm(server: Server, client: Client, round_: Round) -> list[Record]:
    arrivals = enumerate(_cold(round_))
    return await asyncio.gather(*(_arrive(server, client, one, i * BETWEEN) for i, one in arrivals))


async def _arrive(server: Server, client: Client, adapter: Adapter, after: float) -> Record:
    await asyncio.sleep(after)
    arrival = time.perf_counter()
    await server.load(adapter)
    words = prompt(INPUT, random.Random(adapter.seed))
    return await client.ask(adapter, words, OUTPUT, label="cold", arrival=arrival)


def _cold(round_: Round) -> tuple[Adapter, ...]:
    return COLD[: round_.count(len(COLD), 3)]


SCENARIO = Scenario(
    "storm",
    (
        Measure("quiet_median", "gap before the storm, median", "ms"),
        Measure("quiet_p99", "gap before the storm, p99", "ms"),
        Measure("p99", "gap in the storm, p99", "ms", Goal("ratio", "≤", 0.7)),
        Measure("max", "gap in the storm, max", "ms"),
        Measure("again_p99", "gap beside the same requests without loads, p99", "ms"),
        Measure("p99_to_quiet_p99", "p99 in the storm to p99 before it", "×", Goal("value", "≤", 1.25)),
        Measure("max_to_quiet_median", "max in the storm to median before it", "×", Goal("value", "≤", 2)),
        Measure("p99_to_again", "p99 in the storm to that without loads", "×"),
        Measure("cold_first_token", "cold adapters' first token, median", "s"),
    ),
    lambda round_: (WARM, *_cold(round_)),
    measure,
    setups=(LARGE,),
)
