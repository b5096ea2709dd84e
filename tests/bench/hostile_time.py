"""Hostile input for a long time: ``python -m tests.bench.hostile_time 60``, or ``make attack MINUTES=60``.

Every kind of ``hostile.py`` comes again and again in random order, with keys and without, beside the controls
of ``attack.py`` and a crowd that holds ``CROWD`` connections and asks without a key. What counts is what an
attack leaves behind: the slope of the API process's memory, which is that of a line through the mean of each
half minute after a warm-up.

``ENGINE=fake`` is as for ``attack.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from server.demo.base import CHECKOUT
from tests.bench.attack import EVERY, Controls, Seen, attacked, kinds_of
from tests.bench.hostile import Kind
from tests.bench.hostile_wire import Outcomes, Victim, attacker

WARM_UP = 0.25  # of the time, until allocator and caches have their size
SLOPE = 1.0  # percent that the memory may grow by, over what is measured
PATIENCE = 120.0  # seconds for one attack
CROWD, PAUSE = 2000, 60.0  # connections, and seconds between two requests on each
MEAN = 30.0  # seconds
OUT = CHECKOUT / "bench-results" / "attack-long.md"


@dataclass
class Long:
    """``memory`` has (seconds since the start, MiB of the API process)."""

    attacks: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    peak: float = 0.0

    def note(self, kind: Kind, outcomes: Outcomes) -> None:
        self.attacks[kind.name] += 1
        self.wrong += [f"{kind.name}: {name}" for name in outcomes if name not in kind.right]


def growth(memory: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """By how many percent of its mean a straight line through ``memory`` grows, from first to last.

    With twice its standard error, by what the means of ``MEAN`` seconds leave beside the line: single
    measurements follow each other too closely to be taken for so many.
    """
    means = _means(memory)
    times, sizes = zip(*means, strict=True)
    middle, mean = sum(times) / len(times), sum(sizes) / len(sizes)
    spread = sum((t - middle) ** 2 for t in times)
    slope = sum((t - middle) * (size - mean) for t, size in means) / spread if spread else 0.0
    left = sum((size - mean - slope * (t - middle)) ** 2 for t, size in means)
    error = (left / (len(means) - 2) / spread) ** 0.5 if len(means) > 2 and spread else 0.0
    whole = 100 * (memory[-1][0] - memory[0][0]) / mean
    return float(slope * whole), float(2 * error * whole)


def _means(memory: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    pieces: dict[int, list[tuple[float, float]]] = {}
    for at, size in memory:
        pieces.setdefault(int(at // MEAN), []).append((at, size))
    sums = [(len(piece), [sum(column) for column in zip(*piece, strict=True)]) for piece in pieces.values()]
    return [(at / count, size / count) for count, (at, size) in sums]


def report(long: Long, quiet: Seen, seen: Seen, minutes: float) -> tuple[str, list[str]]:
    """Lines for the operator, and what was missed."""
    late = [(at, size) for at, size in long.memory if at >= WARM_UP * long.memory[-1][0]]
    grew, doubt = growth(late)
    differ = [
        prompt for prompt, texts in seen.answers.items() if not texts <= quiet.answers.get(prompt, set())
    ]
    misses = [f"memory grew by {grew:.1f} ± {doubt:.1f} %"] if grew > SLOPE else []
    misses += [f"answers differ for {len(differ)} prompts"] if differ else []
    misses += sorted(set(long.wrong))
    counted = ", ".join(f"{count} × {name}" for name, count in sorted(long.attacks.items()))
    lines = [
        f"{minutes:.0f} minutes, {sum(long.attacks.values())} attacks: {counted}",
        f"memory of the API process, after the first {WARM_UP:.0%}: {late[0][1]:.0f} MiB at first, "
        f"{late[-1][1]:.0f} at last, {max(size for _, size in late):.0f} at most; a line through it grows by "
        f"{grew:+.2f} ± {doubt:.2f} %",
        f"gap of the control stream: {seen.p99() * 1e3:.0f} ms at p99, {quiet.p99() * 1e3:.0f} in peace",
        f"missed: {'; '.join(misses)}" if misses else "met",
    ]
    return "\n".join(f"- {line}" for line in lines), misses


async def crowded(port: int) -> None:
    """``CROWD`` connections that stay, each of which asks without a key once in ``PAUSE`` seconds."""
    async with asyncio.TaskGroup() as group:
        for number in range(CROWD):
            group.create_task(_stays(port, number * PAUSE / CROWD))


async def _stays(port: int, late: float) -> None:
    await asyncio.sleep(late)
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                while True:
                    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n")
                    await reader.readuntil(b"}}")
                    await asyncio.sleep(PAUSE)
            finally:
                writer.close()
        await asyncio.sleep(1)


async def attack(victim: Victim, kinds: Sequence[Kind], until: float, seed: int) -> Long:
    """All of ``kinds`` again and again until the monotonic clock shows ``until``, beside a crowd."""
    long, crowd = Long(), asyncio.create_task(crowded(victim.port))
    try:
        await _attack(victim, kinds, until, random.Random(seed), long)
        return long
    finally:
        crowd.cancel()
        await asyncio.gather(crowd, return_exceptions=True)


async def _attack(
    victim: Victim, kinds: Sequence[Kind], until: float, rng: random.Random, long: Long
) -> None:
    while time.monotonic() < until:
        for kind in rng.sample(kinds, len(kinds)):
            try:
                long.note(kind, await asyncio.wait_for(kind.attack(victim), PATIENCE))
            except Exception as exc:
                long.wrong.append(f"{kind.name}: {type(exc).__name__}")
            if time.monotonic() > until:
                return


async def measure(minutes: float, seed: int, engine: str) -> tuple[str, list[str]]:
    work, memory = Path(tempfile.mkdtemp(prefix="attack-")), list[tuple[float, float]]()
    kinds, fake = kinds_of(engine)
    try:
        async with attacked(work, fake=fake) as (server, victim), attacker() as apart:
            controls = Controls(server, victim.control)
            running = asyncio.create_task(controls.run())
            await asyncio.sleep(5)  # the first answers are slower
            quiet = controls.seen = Seen()
            await asyncio.sleep(15)
            while not quiet.answers.keys() >= EVERY:
                await asyncio.sleep(0.1)
            seen = controls.seen = Seen()
            began = time.monotonic()
            attacking = asyncio.create_task(apart.run(attack, victim, kinds, began + 60 * minutes, seed))
            while not attacking.done():
                await asyncio.sleep(1)
                memory.append((time.monotonic() - began, await asyncio.to_thread(server.api_memory)))
            long = await attacking
            long.memory = memory
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            return report(long, quiet, seen, minutes)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Attack for a long time, and look at what stays behind.")
    parser.add_argument("minutes", type=float)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    said, misses = asyncio.run(measure(given.minutes, given.seed, os.environ.get("ENGINE", "real")))
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(said + "\n")
    print(f"{said}\n\nwritten to {OUT}")
    return int(bool(misses))


if __name__ == "__main__":
    sys.exit(main())
