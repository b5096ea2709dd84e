"""What traces cost requests: processor time of the API process by token, on the tests' fake engine.

Three servers take turns, so that a machine that gets slower favours none: one without traces, one that keeps
one trace in a hundred, one that keeps all. A collector takes what they send. The fake engine takes no time,
so all that is measured is Loraplex.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.scenario import Goal, Measure, Round, Simulation, Values
from tests.bench.scenarios.rollout_cost import CLIENTS, TOKENS, served
from tests.bench.stats import median
from tests.support.collector import Collector, collector

REQUESTS, ROUNDS = 400, 12
SHARES: dict[str, float | None] = {"off": None, "one": 0.01, "all": 1.0}


def traced(store: Collector, share: float | None) -> dict[str, Any]:
    """The settings of a server that keeps this share of its traces; none where it makes no traces."""
    return {} if share is None else {"traces_url": store.url, "traces_share": share}


async def measure(requests: int, rounds: int) -> Values:
    found: dict[str, list[float]] = {kind: [] for kind in SHARES}
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = stack.enter_context(collector())
        servers = {
            kind: await stack.enter_async_context(served(folder / kind, **traced(store, share)))
            for kind, share in SHARES.items()
        }
        for one in servers.values():
            await one.round(requests)  # warm
        for number in range(rounds):
            for kind in list(servers) if number % 2 == 0 else list(servers)[::-1]:
                found[kind].append(await servers[kind].round(requests))
        assert len(store.spans) >= requests * rounds, "the collector got too little"

    def more(kind: str) -> float:
        pairs = zip(found[kind], found["off"], strict=True)
        return 100 * (median([a / b for a, b in pairs]) - 1)

    by_thousand = {kind: median(values) / TOKENS for kind, values in found.items()}
    return by_thousand | {"one_more": more("one"), "all_more": more("all")}


def simulate(round_: Round) -> Values:
    return asyncio.run(measure(round_.count(REQUESTS, 40), round_.count(ROUNDS, 1)))


SCENARIO = Simulation(
    "trace-cost",
    (
        Measure("off", "without traces: processor time by 1,000 tokens", "s"),
        Measure("one", "one trace in a hundred: processor time by 1,000 tokens", "s"),
        Measure("all", "all traces: processor time by 1,000 tokens", "s"),
        Measure("one_more", "one trace in a hundred: more than without", "%", Goal("value", "≤", 5)),
        Measure("all_more", "all traces: more than without", "%"),
    ),
    simulate,
    settings={"requests": REQUESTS, "rounds": ROUNDS, "tokens": TOKENS, "clients": CLIENTS},
    runs=1,
    longest=3600.0,
)
