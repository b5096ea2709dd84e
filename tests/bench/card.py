"""``python -m tests.bench.card``: what adapters cost on one GPU; ``--cpu`` tries the same in small.

A Llama of 8B, its weights at random; adapters of rank 8 to 128 on all its linear layers; eight slots; and a
thousand more adapters registered, small ones. Servers one after the other, with the same settings:

    loraplex
    shared      with RANK_SLOTS: sixteen adapters share the eight slots
    before      without HOST_POOL, ACTIVATION_SLICE, LOAD_NOTICES and HOST_SHARDS, unproven on a GPU
    vllm
    exact       with BATCH_INVARIANT; only where it is asked for by ``--only exact``

The table goes to ``--out``, and to the screen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from server.demo.base import CHECKOUT, cache_folder, prepare
from tests.bench.adapters import TARGETS, Adapter, write
from tests.bench.client import Client
from tests.bench.servers import BareVllm, Loraplex, Server, Setup
from tests.bench.stats import gaps, median, percentile, tokens_between
from tests.bench.workload import closed_loop, prompt

RANKS = (8, 16, 32, 64, 128)
SLOTS, HOST = 8, 32
INPUT = 32  # tokens of a prompt
# Loraplex's settings, by the server's name.
CHANGES: dict[str, dict[str, str]] = {
    "loraplex": {},
    "shared": {"RANK_SLOTS": str(2 * SLOTS)},
    "before": {
        "HOST_POOL": "false",
        "ACTIVATION_SLICE": "0",
        "LOAD_NOTICES": "false",
        "HOST_SHARDS": "false",
    },
    "exact": {"BATCH_INVARIANT": "true"},
}
USUAL = ("loraplex", "shared", "before", "vllm")


@dataclass(frozen=True, slots=True)
class Size:
    """Of the base model, and of what is asked of it."""

    hidden: int
    inner: int
    depth: int
    heads: tuple[int, int]
    clients: int
    output: int
    seconds: float
    registered: int
    ranks: tuple[int, ...]
    dtype: str

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear layer."""
        kv = self.hidden // self.heads[0] * self.heads[1]
        outputs = dict(zip(TARGETS, (self.hidden, kv, kv, self.hidden, *[self.inner] * 2), strict=False))
        outputs["down_proj"] = self.hidden
        return {
            f"model.layers.{layer}.{'mlp' if name in TARGETS[4:] else 'self_attn'}.{name}": (
                outputs[name],
                self.inner if name == "down_proj" else self.hidden,
            )
            for layer in range(self.depth)
            for name in TARGETS
        }


CARD = Size(4096, 14_336, 32, (32, 8), 24, 128, 20, 1000, RANKS, "bfloat16")
SMALL = Size(128, 256, 4, (4, 2), 8, 16, 3, 20, (8, 16, 32), "float32")


@dataclass(frozen=True, slots=True, order=True)
class Made(Adapter):
    """An adapter of this benchmark's own base model; a ``small`` one is on one layer."""

    root: str = ""
    small: bool = False

    @property
    def name(self) -> str:
        return f"{'small' if self.small else 'card'}-r{self.rank}-{self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.root) / self.name


def cores(workers: int) -> dict[str, str]:
    """For a CPU build: a core for each of several workers."""
    found = sorted(os.sched_getaffinity(0))[:workers]
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, found))} if workers > 1 else {}


class CardLoraplex(Loraplex):
    """``changes``: settings beside the usual ones."""

    def __init__(self, base: Path, work: Path, setup: Setup, changes: dict[str, str], workers: int) -> None:
        super().__init__(base, work)
        self._whole, self._changes, self._workers = setup, changes, workers

    def environment(self, port: int) -> dict[str, str]:
        found = super().environment(port)
        args = json.loads(found["LORAPLEX_ENGINE_ARGS"]) | {"load_format": "dummy"}
        if self._workers > 1:
            args |= {"tensor_parallel_size": self._workers}  # fully sharded by itself
        found["LORAPLEX_ENGINE_ARGS"] = json.dumps(args)
        changes = {f"LORAPLEX_{name}": value for name, value in self._changes.items()}
        return found | changes | cores(self._workers)

    async def install(self, adapters: Iterable[Adapter]) -> None:
        async with self.running(self._whole):
            for adapter in (None, *adapters):
                self._keys[adapter] = await self._customer(adapter)

    async def _admin(self, method: str, path: str, **content: Any) -> httpx.Response:
        if path.endswith("/versions"):
            path += "?allow_no_effect=true"  # random weights may answer alike
        return await super()._admin(method, path, **content)


class CardVllm(BareVllm):
    def __init__(self, base: Path, work: Path, workers: int) -> None:
        super().__init__(base, work)
        self._workers = workers

    def command(self, port: int) -> list[str]:
        shared = ["--tensor-parallel-size", str(self._workers), "--fully-sharded-loras"]
        return [*super().command(port), "--load-format", "dummy", *(shared if self._workers > 1 else ())]

    def environment(self, port: int) -> dict[str, str]:
        return super().environment(port) | cores(self._workers)


def make_base(size: Size, folder: Path) -> Path:
    """A folder without weights: the servers make them up."""
    from transformers import LlamaConfig

    folder.mkdir()
    tokenizer = prepare(cache_folder())
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "special", "chat_template", "vocab", "merges")):
            shutil.copy(file, folder)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads[0],
        num_key_value_heads=size.heads[1],
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
        dtype=size.dtype,
    )
    config.save_pretrained(folder)
    return folder


def make_adapters(size: Size, root: Path) -> tuple[list[Adapter], list[Adapter]]:
    """(Two for each slot, and ten to be cold; those that are only registered), written under ``root``."""
    shapes = size.shapes()
    one = {name: shape for name, shape in shapes.items() if name.endswith("layers.0.self_attn.o_proj")}
    ranks = [*(size.ranks * SLOTS)[: 2 * SLOTS], *[16] * 10]
    large = [Made(rank, number, root=str(root)) for number, rank in enumerate(ranks)]
    small = [Made(8, 1000 + i, root=str(root), small=True) for i in range(size.registered)]
    for adapter in (*large, *small):
        write(adapter.folder, adapter.rank, adapter.seed, one if adapter.small else shapes, "float16")
    return [*large], [*small]


async def throughput(
    server: Server, client: Client, size: Size, label: str, adapters: Sequence[Adapter | None]
) -> tuple[float, float]:
    """(Tokens a second, median first token in ms) of clients that ask for ``adapters`` in turn."""
    for adapter in adapters:
        if adapter is not None:
            await server.load(adapter)
    rng = random.Random(label)

    async def ask(number: int) -> Any:
        return await client.ask(rng.choice(adapters), prompt(INPUT, rng), size.output, label=label)

    async with closed_loop(size.clients, ask):
        await asyncio.sleep(size.seconds / 4)
        began = time.perf_counter()
        await asyncio.sleep(size.seconds)
        ended = time.perf_counter()
    records = client.labelled(label)
    firsts = [r.to_first_token for r in records if r.chunks and began <= r.arrival]
    return tokens_between(records, began, ended) / (ended - began), median(firsts) * 1000


async def measure(
    server: Server, size: Size, large: Sequence[Adapter], small: Sequence[Adapter]
) -> dict[str, float]:
    """What the table shows of one server, by the row's title."""
    found: dict[str, float] = {}
    hot, cold = large[: 2 * SLOTS], large[2 * SLOTS :]
    async with Client(server) as client:
        crowds: dict[str, Sequence[Adapter | None]] = {
            "the base": [None],
            "one adapter": hot[:1],
            "8 adapters": hot[:SLOTS],
            "16 adapters on 8 slots": hot,
        }
        if small and isinstance(server, Loraplex):
            crowds[f"{len(small)} registered"] = small
        for title, adapters in crowds.items():
            rate, first = await throughput(server, client, size, title, adapters)
            found |= {f"{title}, tokens/s": rate, f"{title}, first token, ms": first}
        await _cold(server, client, hot, found)
        await _storm(server, client, size, hot[0], cold, found)
        if failures := client.failures():
            found["requests that failed"] = len(failures)
    return found


async def _cold(server: Server, client: Client, hot: Sequence[Adapter], found: dict[str, float]) -> None:
    """First tokens of adapters in host memory and in a slot, one request at a time."""
    for adapter in hot:  # each is in host memory, the last eight in slots
        await client.ask(adapter, prompt(INPUT, random.Random(1)), 2, label="into memory")
    for adapter in hot[:SLOTS]:
        await client.ask(adapter, prompt(INPUT, random.Random(2)), 2, label="from memory")
        record = await client.ask(adapter, prompt(INPUT, random.Random(3)), 8, label="warm")
        if len(record.chunks) > 1:
            found.setdefault("a step, ms", median(gaps(record.chunks)) * 1000)
    for title, label in (("from host memory", "from memory"), ("in a slot", "warm")):
        firsts = [record.to_first_token for record in client.labelled(label)]
        found[f"alone, {title}, first token, ms"] = median(firsts) * 1000


async def _storm(
    server: Server,
    client: Client,
    size: Size,
    warm: Adapter,
    cold: Sequence[Adapter],
    found: dict[str, float],
) -> None:
    """The gaps of a stream, quiet and while cold adapters come half a second apart."""
    await client.ask(warm, prompt(INPUT, random.Random(4)), 2, label="warm-up")
    asked = client.ask(warm, prompt(INPUT, random.Random(5)), 1900, label="stream")
    stream = asyncio.create_task(asked)
    await asyncio.sleep(0.5)
    quiet_from = time.perf_counter()
    await asyncio.sleep(size.seconds / 4)
    storm_from = time.perf_counter()
    for number, adapter in enumerate(cold):
        await server.load(adapter)
        await client.ask(adapter, prompt(INPUT, random.Random(number)), 2, label="cold")
        await asyncio.sleep(0.2)
    storm_to = time.perf_counter()
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)
    (record,) = client.labelled("stream")
    quiet, storm = (gaps(record.chunks, *part) for part in ((quiet_from, storm_from), (storm_from, storm_to)))
    if quiet and storm:
        found["a stream's gaps, quiet, p99, ms"] = percentile(quiet, 99) * 1000
        found["the same beside ten cold loads, ms"] = percentile(storm, 99) * 1000
    found["cold from disk, first token, ms"] = (
        median(r.to_first_token for r in client.labelled("cold")) * 1000
    )


GOALS = (
    ("one adapter, tokens/s", "the base, tokens/s", "≥", 0.95),
    ("16 adapters on 8 slots, tokens/s", "the base, tokens/s", "≥", 0.85),
    ("16 adapters on 8 slots, first token, ms", "8 adapters, first token, ms", "≤", 3.0),
    ("the same beside ten cold loads, ms", "a stream's gaps, quiet, p99, ms", "≤", 1.15),
)


def table(found: dict[str, dict[str, float]]) -> str:
    """In Markdown; below it what the targets say of the first server."""
    rows = list(dict.fromkeys(row for values in found.values() for row in values))
    lines = [f"| | {' | '.join(found)} |", f"| --- |{' ---: |' * len(found)}"]
    for row in rows:
        shown = (f"{values[row]:.1f}" if row in values else "–" for values in found.values())
        lines.append(f"| {row} | {' | '.join(shown)} |")
    ours = next(iter(found.values()), {})
    for one, other, sign, bound in GOALS:
        if one in ours and other in ours:
            ratio = ours[one] / ours[other]
            met = ratio <= bound if sign == "≤" else ratio >= bound
            lines.append(
                f"\n{one}, to {other}: {ratio:.2f}, target {sign} {bound}: {'met' if met else 'missed'}"
            )
    host, warm, step = (
        "alone, from host memory, first token, ms",
        "alone, in a slot, first token, ms",
        "a step, ms",
    )
    if {host, warm, step} <= ours.keys():
        met = ours[host] <= ours[warm] + ours[step]
        lines.append(f"\n{host}: target ≤ in a slot + 1 step: {'met' if met else 'missed'}")
    return "\n".join(lines) + "\n"


async def run(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    size = SMALL if options.cpu else CARD
    setup = Setup(SLOTS, HOST, size.clients, max(size.ranks), size.dtype)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        root = Path(folder)
        base = make_base(size, root / "base")
        large, small = make_adapters(size, root)
        for name in options.only or USUAL:
            work = root / name
            work.mkdir()
            server: Server = (
                CardVllm(base, work, options.workers)
                if name == "vllm"
                else CardLoraplex(base, work, setup, CHANGES[name], options.workers)
            )
            await server.install([*large, *small])
            async with server.running(setup):
                await server.prepare(large)
                found[name] = await measure(server, size, large, small)
            await server.aclose()
            options.out.mkdir(exist_ok=True)
            (options.out / "card.md").write_text(table(found), encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.card", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="a tiny model, to see that everything works")
    parser.add_argument("--workers", type=int, default=1, help="that share the model, each on a card")
    parser.add_argument("--only", action="append", choices=[*CHANGES, "vllm"])
    parser.add_argument("--work", type=Path, help="folder for model and adapters: 15 GB without --cpu")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "bench-results", help="folder for card.md")
    print(table(asyncio.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
