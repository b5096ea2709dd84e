"""Two workers share the model, and each keeps its part of every adapter.

An engine of its own: the shared one has one worker. Adapters are fully sharded, so that both together hold
one copy of each.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
import torch
from peft import LoraConfig, get_peft_model

from adapters.model import WEIGHTS_FILE
from server.app import create_app
from server.engine.arguments import slots_of
from server.engine.calls import PageOp
from tests.support.site import Site, bearer, engine_settings, serving
from tests.support.trainer import Base, make_base
from tests.support.truth import Truth, answer, echoed, heard

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

TOLERANCE = 1e-4
RANKS = (1, 8, 24, 64)  # 1 is on one worker alone, 24 is 16 and 8 ranks of A
CORES = sorted(os.sched_getaffinity(0))
LOAD = 4_000_000


@dataclass(frozen=True)
class Pair:
    site: Site
    key: str
    folders: dict[str, Path]
    truths: dict[str, Truth]

    async def ask(self, model: str) -> Truth:
        response = await self.site.http.post("/v1/completions", json=echoed(model), headers=bearer(self.key))
        assert response.status_code == 200, response.text
        return heard(response.json())


def make(base: Base, folder: Path, rank: int) -> Truth:
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base.fresh(), config)
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                std = 0.1 if "lora_A" in name else 0.1 / rank**0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    model.save_pretrained(folder)
    return answer(model)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    root = tmp_path_factory.mktemp("pair")
    base = make_base("llama", root / "base")
    folders = {f"rank-{rank}": root / f"rank-{rank}" for rank in RANKS}
    truths = {
        name: make(base, folder, rank) for (name, folder), rank in zip(folders.items(), RANKS, strict=True)
    }
    truths["base"] = answer(base.fresh())
    settings = engine_settings(
        root / "base",
        root / "data",
        max_lora_rank=64,
        max_model_len=128,
        served_model_name="base",
        engine_args={
            "dtype": "float32",
            "max_num_seqs": 4,
            "tokenizer": str(root / "base" / "tokenizer"),
            "tensor_parallel_size": 2,
        },
    )
    # A slice of no time: each slot is filled layer by layer, in as many calls.
    changes: dict[str, Any] = {"gpu_slots": 2, "host_slots": 3, "activation_slice": 1e-9}
    settings = settings.model_copy(update=changes)
    if os.environ.get("TESTS_RANK_SLOTS"):  # four adapters share the two slots
        changes |= {"rank_slots": 6, "host_slots": 6}
        settings = settings.model_copy(update=changes)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{CORES[0]}|{CORES[-1]}")
        async with serving(create_app(settings)) as site:
            yield Pair(site, await site.tenant("pair", folders, base_allowed=True), folders, truths)


async def test_answers_are_pefts_while_adapters_come_and_go(pair: Pair) -> None:
    for name in [*pair.truths, *reversed(pair.truths)]:  # four through two slots and three entries
        got, truth = await pair.ask(name), pair.truths[name]
        assert got.ids == truth.ids, name
        assert got.apart(truth) < TOLERANCE, name
    engine = pair.site.services.engine
    assert (await engine.report()).in_step_loads == 0


async def test_both_together_hold_one_copy(pair: Pair) -> None:
    engine = pair.site.services.engine
    await pair.ask("rank-64")
    held = {
        pair.site.services.dispatcher.version(entry.version).adapter: entry.size_bytes
        for entry in pair.site.services.dispatcher.snapshot().host
    }
    assert "rank-64" in held
    for name, size in held.items():
        assert size <= 1.01 * (pair.folders[name] / WEIGHTS_FILE).stat().st_size, name
    assert held["rank-64"] == engine.capacity.entry_bytes, "what was computed of the largest"
    automatic = pair.site.services.settings.model_copy(update={"gpu_slots": "auto", "host_slots": "auto"})
    slots = await asyncio.to_thread(slots_of, automatic)
    assert slots.slot_bytes == engine.capacity.slot_bytes, "what each worker has allocated"


async def test_workers_say_by_themselves_that_they_have_read(pair: Pair) -> None:
    engine, heard = pair.site.services.engine, asyncio.Event()
    assert engine.listen(heard.set)
    dispatcher = pair.site.services.dispatcher
    for entry in dispatcher.snapshot().host:
        dispatcher.retire_key(entry.version)
    heard.clear()
    await pair.ask("rank-8")
    async with asyncio.timeout(240):
        await heard.wait()
    engine.listen(dispatcher._pager_wake.set)


@contextmanager
def no_more_files(worker: psutil.Process) -> Iterator[None]:
    """``worker`` can open none meanwhile."""
    usual = worker.rlimit(psutil.RLIMIT_NOFILE)
    worker.rlimit(psutil.RLIMIT_NOFILE, (3, usual[1]))
    try:
        yield
    finally:
        worker.rlimit(psutil.RLIMIT_NOFILE, usual)


async def test_a_load_that_one_worker_fails_is_left_on_none(pair: Pair) -> None:
    dispatcher, engine = pair.site.services.dispatcher, pair.site.services.engine
    await dispatcher.stop()
    # Beside those of the engine that other files share, which may be there.
    below = psutil.Process().children(recursive=True)
    workers = [one for one in below if one.name().startswith("VLLM::Worker_TP")]
    assert len(workers) == 2
    await engine.page([PageOp("evict", load) for load in (await engine.report()).host])

    async def stage(load: int) -> str | None:
        op = PageOp("stage", load, f"pair/rank-8@{load}", str(pair.folders["rank-8"]))
        ended = (await engine.page([op])).staged
        async with asyncio.timeout(240):
            while not ended:
                await asyncio.sleep(0.01)
                ended = (await engine.page([])).staged
        return ended[0].error

    with no_more_files(workers[1]):
        assert "Too many open files" in (await stage(LOAD) or "")
    await engine.page([])
    reports = await engine._llm.collective_rpc("loraplex_report")
    assert [report["host"] for report in reports] == [[], []]
    for pool in (report["pool"] for report in reports):
        assert pool["free"] == pool["bytes"] > 0, "and no room of the memory made at the start is lost"
    assert await stage(LOAD + 1) is None
    (activated,) = (await engine.page([PageOp("activate", LOAD + 1)])).results
    assert activated.error is None
    await engine.page([PageOp("evict", LOAD + 1)])
    dispatcher.start()
