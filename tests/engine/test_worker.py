"""What ``adapters.worker.extension`` relies on in vLLM; each of these fails when vLLM changes under it.

Last of the engine's modules: it works behind the dispatcher's back.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file

from adapters.model import WEIGHTS_FILE
from adapters.worker.cpu.onednn import KERNELS
from server.engine.arguments import slots_of
from server.engine.calls import PageOp, StageResult
from server.engine.engine import Engine
from tests.engine.conftest import GPU_SLOTS, HOST_SLOTS
from tests.engine.reference import ATTENTION, MLP, Reference, Spec
from tests.support.site import Site

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

_ids = itertools.count(2_000_000)


@pytest_asyncio.fixture(loop_scope="session")
async def engine(site: Site) -> AsyncIterator[Engine]:
    """The site's engine with nothing in it, and nobody else paging."""
    await site.services.dispatcher.stop()
    engine: Engine = site.services.engine
    await empty(engine)
    yield engine
    await empty(engine)


async def empty(engine: Engine) -> None:
    await engine.page([PageOp("evict", load_id) for load_id in (await engine.report()).host])


async def stage(engine: Engine, *folders: Path) -> dict[int, StageResult]:
    """load id -> how it ended, in the order of ``folders``."""
    loads = [PageOp("stage", next(_ids), f"t/a@{folder.name}", str(folder)) for folder in folders]
    ended = {result.load_id: result for result in (await engine.page(loads)).staged}
    async with asyncio.timeout(240):
        while len(ended) < len(loads):
            await asyncio.sleep(0.01)
            ended |= {result.load_id: result for result in (await engine.page([])).staged}
    return {load.load_id: ended[load.load_id] for load in loads}


async def staged(engine: Engine, *folders: Path) -> list[int]:
    ended = await stage(engine, *folders)
    assert [result.error for result in ended.values()] == [None] * len(folders)
    return list(ended)


async def test_the_worker_reports_the_base_as_peft_sees_it(engine: Engine, reference: Reference) -> None:
    linear = {
        name: (layer.in_features, layer.out_features)
        for name, layer in reference.model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }
    assert {n: (s.in_features, s.out_features) for n, s in engine.base.modules.items()} == linear
    vocabulary = {n: (s.in_features, s.out_features) for n, s in engine.base.vocabulary.items()}
    width, tokens = reference.model.config.hidden_size, reference.model.config.vocab_size
    assert vocabulary == {"model.embed_tokens": (tokens, width), "lm_head": (width, tokens)}
    assert engine.base.fused["qkv_proj"] == ("q_proj", "k_proj", "v_proj")
    assert engine.lora_dtype == "float32"


async def test_slots_and_entries_cost_what_was_computed(
    site: Site, engine: Engine, reference: Reference, tmp_path: Path
) -> None:
    slots = await asyncio.to_thread(slots_of, site.services.settings)
    assert (slots.gpu, slots.host) == (GPU_SLOTS, HOST_SLOTS)
    assert slots.slot_bytes == engine.capacity.slot_bytes, "what the worker has allocated"
    largest = await asyncio.to_thread(reference.make, Spec(4, 64, ATTENTION + MLP), tmp_path / "largest")
    (result,) = (await stage(engine, largest)).values()
    vocabulary = sum(s.in_features + s.out_features for s in engine.base.vocabulary.values()) * 64 * 4
    assert result.size_bytes + vocabulary == engine.capacity.entry_bytes


async def test_kernels_are_made_before_the_first_step(engine: Engine) -> None:
    """As many as oneDNN keeps; 0 would be a vLLM whose layers are found no more."""
    (report,) = await engine._llm.collective_rpc("loraplex_report")
    made, tokens = report["kernels"]
    assert KERNELS - 5 < made <= KERNELS
    assert tokens > max(16, made / 6), "several shapes of weights"


async def test_half_an_adapter_is_never_left_in_a_slot(
    engine: Engine, reference: Reference, tmp_path: Path
) -> None:
    """vLLM marks a slot before it copies; this copy fails in the middle."""
    folder = await asyncio.to_thread(reference.make, Spec(1, 8, ATTENTION + MLP), tmp_path / "broken")
    tensors = load_file(folder / WEIGHTS_FILE)
    name = next(n for n in tensors if "layers.4." in n and "o_proj.lora_B" in n)
    tensors[name] = torch.ones(tensors[name].shape[0] * 2, tensors[name].shape[1])
    save_file(tensors, folder / WEIGHTS_FILE)
    (load,) = await staged(engine, folder)
    (result,) = (await engine.page([PageOp("activate", load)])).results
    assert result.error is not None
    report = await engine.report()
    assert report.slots == (None,) * GPU_SLOTS
    assert load not in report.host
    (again,) = (await engine.page([PageOp("activate", load)])).results
    assert again.error is not None, "a burnt id must not come back to life"


async def test_our_caps_hold_where_vllms_own_would_evict(
    engine: Engine, reference: Reference, tmp_path: Path
) -> None:
    folder = await asyncio.to_thread(reference.make, Spec(2, 8, ("v_proj",)), tmp_path / "small")
    loads = await staged(engine, *[folder] * HOST_SLOTS)
    (over,) = (await stage(engine, folder)).values()
    assert "host_slots" in (over.error or "")
    results = (await engine.page([PageOp("activate", load) for load in loads])).results
    assert [r.error is None for r in results] == [True] * GPU_SLOTS + [False] * (HOST_SLOTS - GPU_SLOTS)
    report = await engine.report()
    assert report.slots == tuple(loads[:GPU_SLOTS])
    assert report.host == frozenset(loads)


async def test_the_guard_counts_a_load_inside_a_step(
    engine: Engine, reference: Reference, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    folder = await asyncio.to_thread(reference.make, Spec(3, 8, ("v_proj",)), tmp_path / "guard")
    before = (await engine.report()).in_step_loads
    await engine._llm.add_lora(LoRARequest("behind-our-back", next(_ids), str(folder)))
    assert (await engine.report()).in_step_loads == before + 1
