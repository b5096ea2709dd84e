"""How much of the processor the engine's own process takes while its worker computes."""

from __future__ import annotations

import time

import psutil
import pytest

from tests.site import Site

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


async def test_the_engine_waits_for_its_worker_without_taking_a_core(site: Site) -> None:
    (core,) = (p for p in psutil.Process().children() if p.name().startswith("VLLM::Engine"))
    key = await site.tenant("patient", base_allowed=True)
    model = site.app.state.engine.base.name
    start, before = time.perf_counter(), core.cpu_times()
    answer = await site.chat(key, "Count to a hundred.", model=model, max_tokens=100, temperature=0)
    took, after = time.perf_counter() - start, core.cpu_times()
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] > 50
    spent = after.user + after.system - before.user - before.system
    assert spent < took / 4, f"{spent:.1f} s of {took:.1f}: it looks for a step's end all the time"
