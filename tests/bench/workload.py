"""What is asked, of which adapter, and when. All choices come from a ``random.Random`` passed in."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tests.bench.adapters import Adapter
from tests.bench.client import Client, Record
from tests.bench.servers import Server

# Each is one token of the base model, with its leading space.
WORDS = """
    the of and to in is that for it as was with be by on not he his but at are this have from or had
    an they which one you were all her she there would their we him been has when who will no more
    if out so up said what its about than into them can only other time new some could these two may
    first then do any like my now over such our man me even most made after also did many off before
    must well back through years much where your way down should because long each just state those
    people too good world water school food
""".split()  # noqa: SIM905  a hundred lines as a list


def prompt(words: int, rng: random.Random) -> str:
    """About as many tokens as ``words``; random, so that no two requests share a prefix worth caching."""
    return " ".join(rng.choices(WORDS, k=words))


# Popularity: endless indices of adapters.


def identical() -> Iterator[int]:
    """One adapter only."""
    return itertools.repeat(0)


def distinct(count: int) -> Iterator[int]:
    """Each adapter in turn, so that each is as long ago as it can be."""
    return itertools.cycle(range(count))


def uniform(count: int, rng: random.Random) -> Iterator[int]:
    while True:
        yield rng.randrange(count)


def zipf(count: int, s: float, rng: random.Random) -> Iterator[int]:
    """Index k with probability proportional to 1 / (k + 1)^s."""
    cumulative = list(itertools.accumulate((k + 1) ** -s for k in range(count)))
    while True:
        yield rng.choices(range(count), cum_weights=cumulative)[0]


def gamma_arrivals(rate: float, cv: float, rng: random.Random) -> Iterator[float]:
    """Endless seconds since the start, ``rate`` a second on average.

    Gaps are Gamma distributed with coefficient of variation ``cv``: 1 is Poisson, more is burstier.
    """
    shape = 1 / cv**2
    at = 0.0
    while True:
        at += rng.gammavariate(shape, 1 / (rate * shape))
        yield at


def log_normal_lengths(median: float, sigma: float, longest: int, rng: random.Random) -> Iterator[int]:
    """Endless lengths in tokens, from 1 to ``longest``."""
    while True:
        yield min(longest, max(1, round(rng.lognormvariate(math.log(median), sigma))))


@dataclass(frozen=True, slots=True)
class Arrival:
    """One line of a trace: ``at`` in seconds since its start, lengths in tokens."""

    at: float
    input_length: int
    output_length: int
    model: str


def parse_trace(lines: Iterable[str]) -> list[Arrival]:
    """A trace of JSON lines with ``timestamp`` (ms), ``input_length``, ``output_length`` and ``model``.

    In order of time, which begins with the first request. Raises ValueError naming the line that is wrong.
    """
    arrivals = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            arrival = Arrival(
                float(row["timestamp"]) / 1000,
                int(row["input_length"]),
                int(row["output_length"]),
                str(row["model"]),
            )
        except (ValueError, KeyError, TypeError) as exc:
            raise ValueError(f"line {number} of the trace: {type(exc).__name__} {exc}") from exc
        if arrival.input_length < 1 or arrival.output_length < 1:
            raise ValueError(f"line {number} of the trace: lengths start at 1")
        arrivals.append(arrival)
    arrivals.sort(key=lambda a: a.at)
    start = arrivals[0].at if arrivals else 0.0
    return [Arrival(a.at - start, a.input_length, a.output_length, a.model) for a in arrivals]


async def warm(server: Server, client: Client, adapters: Sequence[Adapter | None]) -> None:
    """One short request for each adapter, one after the other; the last ones are the most recently used."""
    for adapter in adapters:
        if adapter is not None:
            await server.load(adapter)
        await client.ask(adapter, prompt(8, random.Random(0)), 2, label="warm-up")


@asynccontextmanager
async def closed_loop(
    clients: int, ask: Callable[[int], Awaitable[Record]], *, drain: bool = False
) -> AsyncIterator[None]:
    """``clients`` that ask, each with its number, again as soon as they are answered, inside the block.

    At its end what runs is given up, or with ``drain`` waited for. A refused client waits a little, as
    clients do, so that a server that refuses at once is not merely hammered.
    """
    stopping = False

    async def loop(number: int) -> None:
        while not stopping:
            if (await ask(number)).error is not None:
                await asyncio.sleep(0.5)

    tasks = [asyncio.create_task(loop(number)) for number in range(clients)]
    try:
        yield
        stopping = True
        if drain:
            await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


async def open_loop(
    arrivals: Sequence[Arrival], ask: Callable[[Arrival, float], Awaitable[Record]]
) -> list[Record]:
    """Asks at the times of ``arrivals``, whether answers come or not; ``ask`` gets the intended time too.

    Late by a busy client counts as waiting: a record's arrival is when it was meant.
    """
    start = time.perf_counter()

    async def one(arrival: Arrival) -> Record:
        await asyncio.sleep(start + arrival.at - time.perf_counter())
        return await ask(arrival, start + arrival.at)

    return await asyncio.gather(*(one(a) for a in arrivals))
