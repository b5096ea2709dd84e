"""Adapters for the benchmarks, made once and kept: ``python -m tests.bench.adapters NAME ...``.

Random weights on all linear layers, in PEFT's format; what they say does not matter here, what they weigh
does: in float32 about 1.2 MB for each unit of rank.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from server.demo.base import CHECKOUT, cache_folder, prepare

RANKS = (8, 16, 32, 64)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALPHA = 16
# Of the weights of A, and of what B makes of them: enough to change every layer, and still in language.
SPREAD, EFFECT = 0.02, 1.5
SPARE = 2 << 30  # bytes that stay free on the disk


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
    """Makes those that are not there, in a process of its own, which can be stopped.

    Raises RuntimeError where that fails, or where the disk has no room for them twice (Loraplex has its own).
    """
    missing = {a.name: a for a in adapters if not (a.folder / WEIGHTS_FILE).is_file()}
    if not missing:
        return
    needed = 2 * sum(a.rank for a in missing.values()) * 1_250_000 + SPARE
    if (free := shutil.disk_usage(cache_folder()).free) < needed:
        raise RuntimeError(f"the adapters need {needed >> 20} MiB of disk, and {free >> 20} MiB are free")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.bench.adapters", *sorted(missing)),
        cwd=CHECKOUT,
        stdin=asyncio.subprocess.DEVNULL,
    )
    try:
        if await process.wait() != 0:
            raise RuntimeError("the adapters could not be made")
    finally:
        if process.returncode is None:
            process.terminate()


def target_shapes(base: Path) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of each of the base model's linear layers, by name."""
    with safe_open(base / "model.safetensors", "np") as weights:
        names = [name.removesuffix(".weight") for name in weights.keys()]  # noqa: SIM118
        targets = [name for name in names if name.rsplit(".", 1)[-1] in TARGETS]
        return {name: tuple(weights.get_slice(f"{name}.weight").get_shape()) for name in targets}


def write(
    folder: Path, rank: int, seed: int, shapes: Mapping[str, tuple[int, int]], dtype: str = "float32"
) -> None:
    """What PEFT's ``save_pretrained`` would write, for a new random adapter on the layers of ``shapes``."""
    rng = np.random.default_rng(seed)
    sizes = {"A": SPREAD, "B": EFFECT / (ALPHA / rank * rank**0.5)}
    tensors = {
        f"base_model.model.{layer}.lora_{side}.weight": (
            size * rng.standard_normal(shape, np.float32)
        ).astype(dtype)
        for layer, (outputs, inputs) in shapes.items()
        for (side, size), shape in zip(sizes.items(), ((rank, inputs), (outputs, rank)), strict=True)
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": ALPHA,
        "target_modules": sorted({layer.rsplit(".", 1)[-1] for layer in shapes}),
        "bias": "none",
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _make(names: list[str]) -> None:
    shapes = target_shapes(prepare(cache_folder()))
    for name in names:
        rank, seed = (int(part) for part in name.removeprefix("r").split("-"))
        folder = Adapter(rank, seed).folder
        partial = folder.with_name(f".{name}")
        shutil.rmtree(partial, ignore_errors=True)
        write(partial, rank, seed, shapes)
        partial.rename(folder)


if __name__ == "__main__":
    _make(sys.argv[1:])
