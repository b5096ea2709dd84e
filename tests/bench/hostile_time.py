"""Hostile input for a long time: ``python -m tests.bench.hostile_time 60``, or ``make attack MINUTES=60``.

Every kind of ``hostile.py`` comes again and again in random order, with keys and without, beside the controls
of ``attack.py``. What counts is what an attack leaves behind: the slope of the API process's memory, which is
that of a line through all that was measured after a warm-up.
"""

from __future__ import annotations

import argparse
import asyncio
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
from tests.bench.attack import EVERY, Controls, Seen, attacked
from tests.bench.hostile import KINDS, Kind
from tests.bench.hostile_wire import Outcomes, Victim

WARM_UP = 0.25  # of the time, until allocator and caches have their size
SLOPE = 1.0  # percent that the memory may grow by, over what is measured
PATIENCE = 120.0  # seconds for one attack
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


def growth(memory: Sequence[tuple[float, float]]) -> float:
    """By how many percent of its mean a straight line through ``memory`` grows, from first to last."""
    times, sizes = zip(*memory, strict=True)
    middle, mean = sum(times) / len(times), sum(sizes) / len(sizes)
    spread = sum((t - middle) ** 2 for t in times)
    slope = sum((t - middle) * (size - mean) for t, size in memory) / spread if spread else 0.0
    return float(100 * slope * (times[-1] - times[0]) / mean)


def report(long: Long, quiet: Seen, seen: Seen, minutes: float) -> tuple[str, list[str]]:
    """Lines for the operator, and what was missed."""
    late = [(at, size) for at, size in long.memory if at >= WARM_UP * long.memory[-1][0]]
    grew = growth(late)
    differ = [
        prompt for prompt, texts in seen.answers.items() if not texts <= quiet.answers.get(prompt, set())
    ]
    misses = [f"memory grew by {grew:.1f} %"] if grew > SLOPE else []
    misses += [f"answers differ for {len(differ)} prompts"] if differ else []
    misses += sorted(set(long.wrong))
    counted = ", ".join(f"{count} × {name}" for name, count in sorted(long.attacks.items()))
    lines = [
        f"{minutes:.0f} minutes, {sum(long.attacks.values())} attacks: {counted}",
        f"memory of the API process, after the first {WARM_UP:.0%}: {late[0][1]:.0f} MiB at first, "
        f"{late[-1][1]:.0f} at last, {max(size for _, size in late):.0f} at most; a line through it grows by "
        f"{grew:+.2f} %",
        f"gap of the control stream: {seen.p99() * 1e3:.0f} ms at p99, {quiet.p99() * 1e3:.0f} in peace",
        f"missed: {'; '.join(misses)}" if misses else "met",
    ]
    return "\n".join(f"- {line}" for line in lines), misses


async def attack(victim: Victim, until: float, rng: random.Random, long: Long) -> None:
    """In a loop of its own, so that what it costs to attack is not taken for the controls."""
    while time.monotonic() < until:
        for kind in rng.sample(KINDS, len(KINDS)):
            try:
                long.note(kind, await asyncio.wait_for(kind.attack(victim), PATIENCE))
            except Exception as exc:
                long.wrong.append(f"{kind.name}: {type(exc).__name__}")
            if time.monotonic() > until:
                return


async def measure(minutes: float, seed: int) -> tuple[str, list[str]]:
    work, long = Path(tempfile.mkdtemp(prefix="attack-")), Long()
    try:
        async with attacked(work) as (server, victim):
            controls = Controls(server, victim.control)
            running = asyncio.create_task(controls.run())
            await asyncio.sleep(5)  # the first answers are slower
            quiet = controls.seen = Seen()
            await asyncio.sleep(15)
            while not quiet.answers.keys() >= EVERY:
                await asyncio.sleep(0.1)
            seen = controls.seen = Seen()
            began = time.monotonic()
            work_of = attack(victim, began + 60 * minutes, random.Random(seed), long)
            attacking = asyncio.create_task(asyncio.to_thread(asyncio.run, work_of))
            while not attacking.done():
                await asyncio.sleep(1)
                long.memory.append((time.monotonic() - began, server.footprint()["api_memory"]))
            await attacking
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
    said, misses = asyncio.run(measure(given.minutes, given.seed))
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(said + "\n")
    print(f"{said}\n\nwritten to {OUT}")
    return int(bool(misses))


if __name__ == "__main__":
    sys.exit(main())
