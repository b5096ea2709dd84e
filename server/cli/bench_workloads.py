"""The workloads of ``loraplex bench --workload``: those of ``make bench``, with one's own keys and models.

Each is made of phases, which the report tells apart. The first model is the busy one: the first ``--model``,
or the first of the first key.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from server.cli.bench_load import Asked, Load, Shot
from server.cli.client import RemoteError

CLIENTS = 16
NOISY_CLIENTS = 30
WEIGHTED_CLIENTS = 8  # of each model
LONG = 16  # times the longest answer of the others
TIMES = 3.0  # what a server can do
LATER_S = 2.0
ROUNDS = 4
# Seconds between two arrivals of a storm, at most.
BETWEEN_S = 0.5

# Asks once, for so many tokens at most, and returns when that has ended.
Ask = Callable[[Asked, int], Coroutine[Any, Any, Shot]]


@dataclass(slots=True)
class Bench:
    """What a workload is run with; ``phases`` is what it leaves, in order."""

    ask: Ask
    choices: Sequence[Asked]
    load: Load
    rng: random.Random
    phases: dict[str, list[Shot]]

    async def closed(self, phase: str, clients: Sequence[Iterator[Asked]]) -> None:
        """Each of ``clients`` asks, and again as soon as it is answered, until ``load.seconds`` are over."""
        shots = self.phases.setdefault(phase, [])
        ends = time.monotonic() + self.load.seconds

        async def one(picks: Iterator[Asked]) -> None:
            while True:
                shots.append(await self.ask(next(picks), self.load.max_tokens))
                if shots[-1].error is not None:
                    await asyncio.sleep(0.1)  # a refusal is no reason to ask a thousand times
                if time.monotonic() >= ends:
                    return

        await asyncio.gather(*map(one, clients))

    async def each(self, phase: str, models: Sequence[Asked], apart: float | None = None) -> None:
        """One request of each of ``models``: one after the other, or ``apart`` seconds after each other."""
        shots = self.phases.setdefault(phase, [])
        if apart is None:
            for asked in models:
                shots.append(await self.ask(asked, self.load.max_tokens))
            return

        async def later(asked: Asked, after: float) -> Shot:
            await asyncio.sleep(after)
            return await self.ask(asked, self.load.max_tokens)

        shots += await asyncio.gather(*(later(asked, at * apart) for at, asked in enumerate(models)))


async def overhead(bench: Bench) -> None:
    """The first model, with one client and with sixteen."""
    for clients in (1, CLIENTS):
        await bench.closed(f"{clients} clients", [itertools.repeat(bench.choices[0])] * clients)


async def cold(bench: Bench) -> None:
    """Each model once, one after the other, and once more."""
    await bench.each("first time", bench.choices)
    await bench.each("again", bench.choices)


async def storm(bench: Bench) -> None:
    """The first model alone, and then beside all others, which come half a second apart, or closer."""
    busy, others = bench.choices[0], bench.choices[1:]
    await bench.closed("quiet", [itertools.repeat(busy)])
    beside = bench.closed("in the storm", [itertools.repeat(busy)])
    apart = min(BETWEEN_S, bench.load.seconds / len(others))  # all while the busy client asks
    await asyncio.gather(beside, bench.each("others", others, apart))


async def churn(bench: Bench) -> None:
    """Sixteen clients over all models: all alike, and the first ones most often (``--skew``)."""
    alike = replace(bench.load, skew=0.0)
    for phase, load in (("uniform", alike), ("zipf", bench.load)):
        picks = load.picks(bench.choices, bench.rng)
        await bench.closed(phase, [picks] * CLIENTS)


async def noisy(bench: Bench) -> None:
    """One client for each model but the first; then also thirty clients for the first."""
    await _beside(bench, NOISY_CLIENTS, "the noisy one")


async def limited(bench: Bench) -> None:
    """The same with sixteen clients, for a first key with limits: its refusals are among its errors."""
    await _beside(bench, CLIENTS, "the limited one")


async def _beside(bench: Bench, clients: int, who: str) -> None:
    quiet = [itertools.repeat(asked) for asked in bench.choices[1:]]
    await bench.closed("alone", quiet)
    loud = [itertools.repeat(bench.choices[0])] * clients
    await asyncio.gather(bench.closed(f"beside {who}", quiet), bench.closed(who, loud))


async def starvation(bench: Bench) -> None:
    """Sixteen clients keep all models but the last busy, for which somebody asks four times meanwhile."""
    *busy, last = bench.choices
    clients = [itertools.repeat(busy[number % len(busy)]) for number in range(CLIENTS)]
    others = bench.each("the last model", [last] * ROUNDS, bench.load.seconds / ROUNDS)
    await asyncio.gather(bench.closed("busy models", clients), others)


async def hog(bench: Bench) -> None:
    """One answer of each model but the last, sixteen times as long as ``--max-tokens``, and then the last."""
    *busy, last = bench.choices
    asking = [asyncio.create_task(bench.ask(asked, LONG * bench.load.max_tokens)) for asked in busy]
    await asyncio.sleep(min(LATER_S, bench.load.seconds))
    await bench.each("the last model", [last])
    bench.phases["long answers"] = list(await asyncio.gather(*asking))


async def weights(bench: Bench) -> None:
    """Eight clients for each model, a phase each: tokens a second are their customers' shares."""
    models = (
        bench.closed(f"{number} {asked.model}", [itertools.repeat(asked)] * WEIGHTED_CLIENTS)
        for number, asked in enumerate(bench.choices, 1)
    )
    await asyncio.gather(*models)


async def overload(bench: Bench) -> None:
    """As many requests as can be answered; then three times as many, and the last model beside them."""
    *models, last = bench.choices
    picks = replace(bench.load, skew=0.0).picks(models, bench.rng)
    await bench.closed("as many as it can", [picks] * (4 * CLIENTS))
    good = sum(shot.error is None for shot in bench.phases["as many as it can"])
    load = replace(bench.load, rate=TIMES * max(1, good) / bench.load.seconds, burst=1.0)
    asking = [
        asyncio.create_task(bench.ask(next(picks), bench.load.max_tokens))
        async for _ in load.due(bench.rng, time.monotonic())
    ]
    await bench.each("one more", [last])
    bench.phases["three times as many"] = list(await asyncio.gather(*asking))


# By name: what it does, and how many models it needs.
WORKLOADS: dict[str, tuple[Callable[[Bench], Awaitable[None]], int]] = {
    "overhead": (overhead, 1),
    "cold": (cold, 1),
    "storm": (storm, 2),
    "churn": (churn, 2),
    "noisy": (noisy, 2),
    "limited": (limited, 2),
    "starvation": (starvation, 2),
    "hog": (hog, 2),
    "weights": (weights, 2),
    "overload": (overload, 2),
}


def checked(name: str, choices: Sequence[Asked]) -> Callable[[Bench], Awaitable[None]]:
    """The workload of that name; RemoteError where there are too few models for it."""
    made, least = WORKLOADS[name]
    if len(choices) < least:
        said = f"{name} needs {least} models, and the keys have {len(choices)}."
        raise RemoteError("too_few_models", f"{said} Name more with --model, or give more keys.")
    return made
