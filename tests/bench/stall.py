"""How long staging keeps Python's lock: ``python -m tests.bench.stall``, half a minute, 1 GB of disk.

On one GPU vLLM's worker shares its process with the scheduler, so a thread that stages an adapter takes
turns with them for Python's lock. Here a thread stages adapters of rank 64 of an 8B Llama, by vLLM's own code
and the worker's reader, beside a loop that only looks at the clock; the same loop looks alone, too. What
counts is the longest time between two looks, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from adapters.worker.extension import read_with
from adapters.worker.host_memory import BufferPool, Loader, stay_beside_the_engine
from tests.bench.adapters import TARGETS, write
from tests.bench.card import CARD, SMALL, Size

RANK, LOADS = 64, 5
DTYPE = torch.bfloat16
NOTED_S = 0.0002
LATE_S = 0.002  # a quarter of a step of an 8B model on a GPU


def stage(folder: Path) -> int:
    """Reads the adapter and scales it; how many layers it has."""
    helper = PEFTHelper.from_local_dir(str(folder), None)
    lora = LoRAModel.from_local_checkpoint(
        str(folder), set(TARGETS), helper, lora_model_id=1, device="cpu", dtype=DTYPE
    )
    for weights in lora.loras.values():
        weights.optimize()
    return len(lora.loras)


def looks_beside(action: Callable[[], None]) -> list[float]:
    """Seconds between two looks at the clock, those above ``NOTED_S``, while a thread does ``action``."""
    failed: list[BaseException] = []

    def run() -> None:
        stay_beside_the_engine()
        try:
            action()
        except BaseException as exc:
            failed.append(exc)

    thread = threading.Thread(target=run)
    gaps, last = [0.0], time.perf_counter()
    thread.start()
    while thread.is_alive():
        now = time.perf_counter()
        if now - last >= NOTED_S:
            gaps.append(now - last)
        last = now
    thread.join()
    if failed:
        raise failed[0]
    return gaps


def measure(size: Size, root: Path) -> str:
    """A table in Markdown, in ms."""
    read_with(Loader(BufferPool(3, 1), DTYPE))
    rows = ["| beside the loop | seconds | waits above 2 ms | longest, ms |", "| --- | ---: | ---: | ---: |"]
    layers = size.depth * len(TARGETS)

    def loads(folder: Path) -> None:
        for _ in range(LOADS):
            assert stage(folder) == layers

    actions: dict[str, Callable[[], None]] = {"nothing": lambda: time.sleep(3)}
    for dtype in ("float16", "float32"):
        folder = root / dtype
        write(folder, RANK, 1, size.shapes(), dtype)
        stage(folder)  # from the page cache, and into memory that has been touched
        actions[f"{LOADS} loads, stored in {dtype}"] = lambda folder=folder: loads(folder)  # type: ignore[misc]
    for title, action in actions.items():
        began = time.perf_counter()
        gaps = looks_beside(action)
        took, late = time.perf_counter() - began, sum(gap > LATE_S for gap in gaps)
        rows.append(f"| {title} | {took:.1f} | {late} | {max(gaps) * 1000:.2f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.stall", description=__doc__)
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that it works")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(measure(SMALL if options.small else CARD, Path(folder)))


if __name__ == "__main__":
    main()
