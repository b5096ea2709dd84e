"""How often the engine is asked during a load: ``python -m tests.bench.polls``, two minutes.

Each question about a load goes through the engine's queue, between two steps; over several workers it ends
the overlap of steps in flight. Cold loads of adapters of rank 64 on the demo's base, one at a time, on an
idle engine and beside a stream: with workers that say by a datagram when a load has been read
(``LOAD_NOTICES``), and with workers that are asked.
"""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.app import create_app
from server.demo.base import cache_folder, prepare
from server.engine.calls import PageOp
from tests.bench.adapters import target_shapes, write
from tests.support.site import Site, bearer, engine_settings, serving

RANK, LOADS = 64, 6
SLOTS = 2  # fewer than adapters, so that each is cold when its turn comes
STREAM = 400  # tokens


@dataclass(slots=True)
class Loads:
    """Of each load: questions to the engine that carried no operation, and seconds until its first token."""

    polls: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        polls, first = statistics.median(self.polls), statistics.median(self.seconds)
        return f"{polls:g} ({min(self.polls)} to {max(self.polls)}) | {first * 1e3:.0f} ms"


async def measure(root: Path, base: Path, *, told: bool) -> tuple[Loads, Loads]:
    """(on an idle engine, beside a stream)."""
    settings = engine_settings(
        base,
        root / f"data-{told}",
        max_lora_rank=RANK,
        max_model_len=1024,
        served_model_name="base",
        load_notices=told,
        gpu_slots=SLOTS,
        host_slots=SLOTS,
        engine_args={"dtype": "float32", "max_num_seqs": 4},
    )
    async with serving(create_app(settings)) as site:
        key = await site.tenant("t", {f"a{i}": root / f"a{i}" for i in range(LOADS)}, base_allowed=True)
        asked = counted(site)
        idle = await loads(site, key, asked)
        stream = asyncio.create_task(ask(site, key, "base", STREAM))
        busy = await loads(site, key, asked)
        assert not stream.done(), "the stream ended before the loads; make STREAM longer"
        stream.cancel()
        await asyncio.wait({stream})
    return idle, busy


def counted(site: Site) -> list[int]:
    """The number of questions from now on, in a list of one."""
    paging: Any = site.services.engine._paging
    asked, page = [0], paging.page

    async def counting(ops: Sequence[PageOp]) -> Any:
        asked[0] += not ops
        return await page(ops)

    paging.page = counting
    return asked


async def loads(site: Site, key: str, asked: list[int]) -> Loads:
    found = Loads()
    for number in range(LOADS):
        await asyncio.sleep(0.3)  # what the load before still asks
        asked[0] = 0
        found.seconds.append(await ask(site, key, f"a{number}", 1))
        found.polls.append(asked[0])
    return found


async def ask(site: Site, key: str, model: str, tokens: int) -> float:
    """Seconds until the answer."""
    body = {"model": model, "prompt": "Hello there", "max_tokens": tokens, "temperature": 0}
    began = time.perf_counter()
    answer = await site.http.post(
        "/v1/completions", json=body | {"ignore_eos": True}, headers=bearer(key), timeout=600
    )
    answer.raise_for_status()
    return time.perf_counter() - began


async def main() -> None:
    base = prepare(cache_folder())
    with tempfile.TemporaryDirectory(prefix="loraplex-polls-") as folder:
        root = Path(folder)
        shapes = target_shapes(base)
        for number in range(LOADS):
            write(root / f"a{number}", RANK, number, shapes)
        print("| workers | questions a load, idle | first token | beside a stream | first token |")
        print("| --- | --- | --- | --- | --- |")
        for told in (True, False):
            idle, busy = await measure(root, base, told=told)
            print(f"| {'say it' if told else 'are asked'} | {idle} | {busy} |", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
    sys.exit(0)
