"""What it costs to look at every step's logits for NaN: ``python -m tests.bench.nan_count``.

The same server on the demo's base is started with the count and without it, in turn, and asked by sixteen
clients for as many tokens each time; what is compared are tokens a second, each start with the one after it.
The goal is at most 1 %. Without the count a NaN stays where it was made: nobody should serve like that.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from server.demo.base import cache_folder, prepare
from tests.bench.client import Client
from tests.bench.scenario import Round
from tests.bench.servers import Loraplex, Setup
from tests.bench.workload import prompt

CLIENTS, REQUESTS = 16, 3  # of each client, the first of which warms
INPUT, OUTPUT = 16, 64  # tokens
MOST = 1.0  # percent
UNCOUNTED = "tests.bench.nan_uncounted"
COUNT = "VLLM_COMPUTE_NANS_IN_LOGITS"


class Counting(Loraplex):
    """Counts, or does not."""

    counts = True

    def command(self, port: int) -> list[str]:
        return super().command(port) if self.counts else [sys.executable, "-m", UNCOUNTED]

    def environment(self, port: int) -> dict[str, str]:
        return super().environment(port) | {COUNT: "1" if self.counts else "0"}


async def tokens_a_second(server: Counting, counts: bool) -> float:
    server.counts = counts
    async with server.running(Setup(dtype="float32")), Client(server) as client:
        began = 0.0
        for number in range(REQUESTS):
            rng = Round(number).rng()
            asked = (client.ask(None, prompt(INPUT, rng), OUTPUT) for _ in range(CLIENTS))
            records = await asyncio.gather(*asked)
            assert all(record.error is None for record in records), records[0].error
            began = began or time.perf_counter()
        return (REQUESTS - 1) * CLIENTS * OUTPUT / (time.perf_counter() - began)


async def measure(pairs: int) -> list[tuple[float, float]]:
    """(with, without) of each pair, in tokens a second; which comes first alternates."""
    work, found = Path(tempfile.mkdtemp(prefix="nan-count-")), []
    server = Counting(prepare(cache_folder()), work)
    try:
        await server.install(())
        for number in range(pairs):
            order = (True, False) if number % 2 else (False, True)
            told = {counts: await tokens_a_second(server, counts) for counts in order}
            found.append((told[True], told[False]))
            print(f"with {told[True]:.1f}, without {told[False]:.1f} tokens a second", flush=True)
    finally:
        await server.aclose()
        shutil.rmtree(work, ignore_errors=True)
    return found


def price(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Percent that the count costs, the mean over all pairs, and twice its standard error."""
    lost = [100 * (1 - counted / plain) for counted, plain in pairs]
    spread = statistics.stdev(lost) / len(lost) ** 0.5 if len(lost) > 1 else float("inf")
    return statistics.mean(lost), 2 * spread


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what the count of NaN costs.")
    parser.add_argument("--pairs", type=int, default=4)
    mean, doubt = price(asyncio.run(measure(parser.parse_args().pairs)))
    print(f"the count costs {mean:.2f} ± {doubt:.2f} % of the tokens a second; the goal is {MOST:g}")
    return int(mean - doubt > MOST)


if __name__ == "__main__":
    sys.exit(main())
