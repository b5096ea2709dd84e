"""Priorities: batch takes what the others leave, which may be everything, and is never forgotten."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from server.accounts.tenants import PRIORITIES
from server.errors import Unavailable
from tests.service.http.test_api import error
from tests.support.clock import run
from tests.support.fakes import Times
from tests.support.site import Site
from tests.support.tiny import fake_site
from tests.support.world import World, tenant

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")


def produced(seconds: float, **priorities: str) -> Counter[str]:
    """Output tokens by tenant. Each always has more requests waiting than places can become free at once."""
    done: Counter[str] = Counter()

    async def client(world: World, who: Any) -> None:
        while world.dispatcher.now() < seconds:
            with suppress(Unavailable):  # it waited for QUEUE_TIMEOUT
                await world.ask(who, max_tokens=8, model="base-model")
                done[who.id] += 8

    async def scenario() -> None:
        async with World(max_running=4, times=Times(step=0.01)) as world:
            clients = [
                client(world, tenant(id_, priority=priority))
                for id_, priority in priorities.items()
                for _ in range(3 * world.max_running)
            ]
            await asyncio.gather(*clients)

    run(scenario())
    return done


def test_interactive_has_four_times_the_share_of_standard() -> None:
    done = produced(40, i="interactive", s="standard")
    assert 3.6 < done["i"] / done["s"] < 4.4


@pytest.mark.parametrize("other", ["interactive", "standard"])
def test_batch_takes_what_the_others_leave_and_is_not_forgotten(other: str) -> None:
    done = produced(60, o=other, b="batch")
    assert 0 < done["b"] < 0.03 * done["o"]


def test_batch_alone_has_everything() -> None:
    assert produced(10, b="batch")["b"] == pytest.approx(produced(10, s="standard")["s"], rel=0.02)


def test_weights_count_within_a_priority() -> None:
    assert tenant("a", weight=2.0, priority="batch").share == 2 * PRIORITIES["batch"]


@pytest.fixture
async def site(tmp_path: Path) -> Any:
    async with fake_site(tmp_path) as site:
        yield site


async def test_a_priority_is_set_and_changed(site: Site) -> None:
    await site.tenant("acme", priority="batch")
    url = "/admin/v1/tenants/acme"
    assert (await site.admin.get(url)).json()["priority"] == "batch"
    changed = await site.admin.patch(url, json={"priority": "interactive"})
    assert changed.json()["priority"] == "interactive"
    error(await site.admin.patch(url, json={"priority": "urgent"}), 422, "invalid_request", "priority")
    error(await site.admin.patch(url, json={"priority": None}), 422, "unprocessable", "priority")
