"""A trace, replayed at its own pace: the one given with ``--trace``, or a bursty one made up here.

Not part of a full run. The trace's models, by popularity, are given adapters of all ranks in turn.
"""

from __future__ import annotations

import itertools
from collections import Counter

from tests.bench.adapters import Adapter, mixed
from tests.bench.client import Client, Record
from tests.bench.scenario import Measure, Round, Scenario, Values
from tests.bench.servers import LARGE, MAX_MODEL_LEN, Server
from tests.bench.stats import median, percentile
from tests.bench.workload import (
    Arrival,
    gamma_arrivals,
    log_normal_lengths,
    open_loop,
    parse_trace,
    prompt,
    warm,
    zipf,
)

RATE, CV = 0.5, 4.0  # requests a second; coefficient of variation of the time between them
MODELS = 16
LONGEST_INPUT = MAX_MODEL_LEN // 2


async def measure(server: Server, client: Client, round_: Round) -> Values:
    arrivals = _trace(round_)
    adapters = _adapters(arrivals)
    rng = round_.rng()
    prompts = {a: prompt(min(a.input_length, LONGEST_INPUT), rng) for a in arrivals}
    await warm(server, client, list(adapters.values()))

    async def ask(arrival: Arrival, at: float) -> Record:
        tokens = min(arrival.output_length, MAX_MODEL_LEN - LONGEST_INPUT - 64)
        return await client.ask(adapters[arrival.model], prompts[arrival], tokens, label="trace", arrival=at)

    records = await open_loop(arrivals, ask)
    first = [r.to_first_token for r in records]
    return {
        "first_median": median(first),
        "first_p99": percentile(first, 99),
        "p99": percentile([r.duration for r in records], 99),
    }


def _trace(round_: Round) -> list[Arrival]:
    if round_.trace is not None:
        return parse_trace(round_.trace.read_text(encoding="utf-8").splitlines())
    rng = round_.rng()
    rows = zip(
        gamma_arrivals(RATE, CV, rng),
        log_normal_lengths(32, 0.6, 128, rng),
        log_normal_lengths(16, 0.6, 64, rng),
        zipf(MODELS, 1.0, rng),
        strict=False,
    )
    seconds = round_.seconds(60, 8)
    return [
        Arrival(at, input_, output, f"model-{model}")
        for at, input_, output, model in itertools.takewhile(lambda row: row[0] < seconds, rows)
    ]


def _adapters(arrivals: list[Arrival]) -> dict[str, Adapter]:
    models = [model for model, _ in Counter(a.model for a in arrivals).most_common()]
    return dict(zip(models, mixed(len(models)), strict=True))


SCENARIO = Scenario(
    "replay",
    (
        Measure("first_median", "time to first token, median", "s"),
        Measure("first_p99", "time to first token, p99", "s"),
        Measure("p99", "latency, p99", "s"),
    ),
    lambda round_: tuple(_adapters(_trace(round_)).values()),
    measure,
    setups=(LARGE,),
)
