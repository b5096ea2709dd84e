"""Adapters for the benchmarks, made by PEFT once and kept: ``python -m tests.bench.adapters NAME ...``.

Random weights on all linear layers; what they say does not matter here, what they weigh does: in float32
about 1.2 MB for each unit of rank.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from adapters.model import WEIGHTS_FILE
from server.demo.base import CHECKOUT, cache_folder, prepare

RANKS = (8, 16, 32, 64)


@dataclass(frozen=True, slots=True, order=True)
class Adapter:
    """One customer's only adapter. ``weight`` is the customer's share, which bare vLLM does not know."""

    rank: int
    seed: int
    weight: float = 1.0

    @property
    def name(self) -> str:
        return f"r{self.rank}-{self.seed}"

    @property
    def folder(self) -> Path:
        return cache_folder() / "bench-adapters" / self.name


def of_rank(rank: int, count: int, first: int = 0) -> tuple[Adapter, ...]:
    return tuple(Adapter(rank, seed) for seed in range(first, first + count))


def mixed(count: int) -> tuple[Adapter, ...]:
    """Adapters of all ``RANKS`` in turn."""
    return tuple(Adapter(RANKS[i % len(RANKS)], i // len(RANKS)) for i in range(count))


async def make(adapters: Iterable[Adapter]) -> None:
    """Makes those that are not there, in a process of its own, which gives the memory of PEFT back."""
    missing = sorted({a.name for a in adapters if not (a.folder / WEIGHTS_FILE).is_file()})
    if not missing:
        return
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.bench.adapters", *missing),
        cwd=CHECKOUT,
        stdin=asyncio.subprocess.DEVNULL,
    )
    try:
        if await process.wait() != 0:
            raise RuntimeError("the adapters could not be made")
    finally:
        if process.returncode is None:
            process.terminate()


def _make(names: list[str]) -> None:
    from tests.engine.reference import ATTENTION, MLP, Reference, Spec

    reference = Reference(prepare(cache_folder()))
    for name in names:
        rank, seed = (int(part) for part in name.removeprefix("r").split("-"))
        folder = Adapter(rank, seed).folder
        partial = folder.with_name(f".{name}")
        shutil.rmtree(partial, ignore_errors=True)
        reference.make(Spec(seed=seed, rank=rank, targets=ATTENTION + MLP), partial)
        partial.rename(folder)


if __name__ == "__main__":
    _make(sys.argv[1:])
