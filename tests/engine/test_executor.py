"""How much of the processor the engine's own process takes while its worker computes."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import psutil
import pytest

from adapters.model import CONFIG_FILE
from server.engine.calls import PageOp
from server.engine.engine import Engine
from tests.support.resting import AS_SERVED, REST
from tests.support.site import Site

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

LOAD = 3_000_000
ANSWERS = 30


async def taken(site: Site, key: str) -> tuple[float, float]:
    """Seconds of a processor that the engine's process takes for an answer, and those by the clock."""
    (core,) = (p for p in psutil.Process().children(recursive=True) if p.name().startswith("VLLM::Engine"))
    model = site.services.engine.base.name
    start, before = time.perf_counter(), core.cpu_times()
    answer = await site.chat(key, "Count to a hundred.", model=model, max_tokens=60, temperature=0)
    took, after = time.perf_counter() - start, core.cpu_times()
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] > 30
    return after.user + after.system - before.user - before.system, took


async def tell(engine: Engine, how: str) -> None:
    """How it waits from now on. One that is lost leaves the call unanswered; the one after it rests."""
    try:
        async with asyncio.timeout(240):
            await engine._llm.collective_rpc(how)
    except TimeoutError:
        pytest.fail(f"no engine took `{how}` in 240 s: it was lost, or another has taken its place")


async def test_the_engine_waits_for_its_worker_without_taking_a_core_from_a_load(
    site: Site, tmp_path: Path
) -> None:
    key = await site.tenant("patient", base_allowed=True)
    engine: Engine = site.services.engine
    config = tmp_path / CONFIG_FILE
    os.mkfifo(config)
    await tell(engine, AS_SERVED)
    try:
        await looked_for(site, key, config, engine)
    finally:
        await tell(engine, REST)


async def looked_for(site: Site, key: str, config: Path, engine: Engine) -> None:
    await engine.page([PageOp("stage", LOAD, "patient/slow@1", str(config.parent))])
    try:
        loading, took = await taken(site, key)
    finally:
        await asyncio.to_thread(config.write_bytes, b"")  # what waits for it finds it empty
    async with asyncio.timeout(240):
        while not (ended := (await engine.page([])).staged):
            await asyncio.sleep(0.01)
    assert [(load.load_id, bool(load.error)) for load in ended] == [(LOAD, True)]
    assert loading < took / 4, f"{loading / took:.0%} of a core: it looks for a step's end all the time"
    # Beside others' work it may find each step done when it gets its core again, and take none for looking.
    awake = [0.0]
    while max(awake) < 2 * loading and len(awake) < ANSWERS:
        awake.append((await taken(site, key))[0])
    assert loading < max(awake) / 2, "it rests when nothing is loaded, too"
