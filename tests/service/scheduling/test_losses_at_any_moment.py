"""The engine is lost while an upload is tried, and while the server drains: nothing hangs, each has its code,
and no version is blamed. Time is virtual.
"""

from __future__ import annotations

import asyncio
import re
from types import SimpleNamespace
from typing import Any, cast

import pytest

from adapters.errors import AdapterError
from adapters.model import Version
from server.errors import ServerError, Unavailable
from server.http.services import Services
from server.publishing.probe import Prober
from tests.support import tiny
from tests.support.clock import run
from tests.support.fakes import Times
from tests.support.world import World

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

TIMES = Times(stage=0.3, activate=0.1, step=0.2, page=0.01, start=20.0)
STALL = 5.0


@pytest.mark.parametrize("how", ["death", "hang"])
@pytest.mark.parametrize("times", [1, 2])
def test_an_upload_that_is_tried_meanwhile_is_whole_or_may_be_repeated(how: str, times: int) -> None:
    """Before, in and after its load, and between the answers that it is compared by."""
    version = Version("acme", "new", 0, "digest", tiny.adapter(1), rank=2)

    async def scenario(moment: float) -> str:
        async with World(restarts=9, times=TIMES, stall=STALL) as world:
            prober = Prober(cast("Any", world.engine), world.dispatcher)
            probing = asyncio.create_task(prober.probe(version))
            for pause in (moment, 40.0)[:times]:
                await asyncio.sleep(pause)
                world.lose(how)
            ended = "whole"
            try:
                async with asyncio.timeout(120):
                    assert (await probing)["effect"]
            except Unavailable as exc:
                ended = exc.code or ""
            await asyncio.sleep(60)
            async with asyncio.timeout(120):
                assert (await prober.probe(version))["effect"]
            assert world.faults == []
            world.check_idle()
            return ended

    assert {run(scenario(0.1 + 0.3 * step)) for step in range(10)} == {"engine_restarting", "whole"}


@pytest.mark.parametrize("how", ["death", "hang"])
@pytest.mark.parametrize(("drain", "loss"), [(2.0, 3.0), (3.0, 2.0), (2.0, 2.0)])
@pytest.mark.parametrize(("patience", "ends"), [(5.0, "shutting_down"), (90.0, "whole")])
def test_a_drain_ends_and_tells_everybody(
    how: str, drain: float, loss: float, patience: float, ends: str
) -> None:
    ended: list[str] = []

    async def client(world: World, who: str, **fields: Any) -> None:
        try:
            said = await world.ask(who, max_tokens=100, **fields)
        except (ServerError, AdapterError) as exc:
            ended.append(exc.code or "")
            return
        if code := re.search(r'"code": "(\w+)"', said):
            ended.append(code[1])
        else:
            ended.append("aborted" if "abort" in said else "whole")

    async def scenario() -> None:
        limits = {"preempt_after": 1.0, "slot_patience": 0.5}
        async with World(max_running=3, restarts=9, times=TIMES, stall=STALL, limits=limits) as world:
            asked = [("acme", {}), ("acme", {"stream": False}), ("acme", {"n": 2}), ("zeta", {})]
            clients = [asyncio.create_task(client(world, who, **fields)) for who, fields in asked]
            loop = asyncio.get_running_loop()
            loop.call_later(loss, world.lose, how)
            await asyncio.sleep(drain)
            settings = SimpleNamespace(drain_timeout=patience)
            services = SimpleNamespace(dispatcher=world.dispatcher, on_drain=None, settings=settings)
            async with asyncio.timeout(patience + 2 * STALL):
                await Services.drain(cast("Services", services))
                await asyncio.gather(*clients)
            assert world.faults == []
            world.check_idle()

    run(scenario())
    assert len(ended) == 4
    assert ends in ended
    assert set(ended) <= {"shutting_down", "engine_restarting", "aborted", "whole"}
