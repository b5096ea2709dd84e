"""What an operator sees of a fleet: the console's first page and ``loraplex top``.

With ``BROWSER=1`` a real Chromium looks too, light, dark and at phone width; ``PICTURES=folder`` keeps what
it saw.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.service.cli.test_commands import document, refusal, shown
from tests.service.console.test_browser import NARROW, WIDE, everybodys
from tests.service.console.test_sign_in import browser
from tests.support import tiny
from tests.support.browser import browsing, sign_in
from tests.support.fleet import Fleet, fleet
from tests.support.site import ADMIN_KEY

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")


@pytest.fixture
async def busy(tmp_path: Path) -> AsyncIterator[Fleet]:
    """Two replicas; of two customers one has an adapter in a slot, and an answer under way."""
    async with fleet(tmp_path) as made:
        key = await made.gateway.tenant("acme", {"support": tiny.adapter(1)})
        await made.gateway.tenant("globex", {"sales": tiny.adapter(2)})
        asked = {"model": "support", "max_tokens": 400, "presence_penalty": 0.5}
        talking = asyncio.create_task(made.gateway.chat(key, "hello there", **asked))
        await made.until(lambda: any(one.engine.running for one in made.replicas))
        yield made
        talking.cancel()
        await asyncio.wait([talking])


async def test_replicas_say_what_they_hold_by_version_and_how_pressed_they_are(busy: Fleet) -> None:
    async def told() -> list[dict[str, Any]]:
        return list((await busy.gateway.admin.get("/admin/v1/replicas")).json()["data"])

    def held(found: list[dict[str, Any]]) -> set[str]:
        return {name for each in found for name in each["in_host"]}

    async with asyncio.timeout(60):  # they announce themselves every 2 s
        while True:
            found = await told()
            busy_ones = [one for one in found if one["running"] and one["in_slots"]]
            if busy_ones and len(held(found)) == 2:
                break
            await asyncio.sleep(0.1)
    (one,) = busy_ones
    assert one["in_slots"] == ["acme/support@1"]
    assert held(found) == {"acme/support@1", "globex/sales@1"}
    assert one["pressure"] == 0.5, "one of two slots is busy"
    assert all(each["backlog_seconds"] == 0 for each in found)


async def test_the_first_page_has_a_part_for_each_replica(busy: Fleet) -> None:
    async with browser(busy.gateway, ADMIN_KEY) as client:
        page = (await client.get("/console/")).text
        for one in busy.replicas:
            assert page.count(f'<section aria-labelledby="replica-{one.id}">') == 1
        assert "2 of 2 ready" in page
        assert "This gateway" in page
        slots = [len(one.services.dispatcher.snapshot().slots) for one in busy.replicas]
        assert page.count('<li class="tile ') == sum(slots)
        assert re.search(r'<a href="[^"]*/customers/acme/adapters/support"><strong>support@1', page)
        assert page.count('scope="rowgroup"') == len(
            [one for one in busy.replicas if one.services.dispatcher.snapshot().host]
        )
        gone = next(one for one in busy.replicas if not one.engine.running)
        await gone.kill()
        await busy.until(lambda: any(one.lost for one in busy.directory.all()))
        live = (await client.get("/console/fleet/live")).text
        assert "1 of 2 ready" in live
        assert re.search(rf'id="replica-{gone.id}">.*?badge bad">lost<.*?has not told', live, re.DOTALL)


async def test_top_and_residency_have_a_row_for_each_replica(busy: Fleet) -> None:
    ids = [one.id for one in busy.replicas]
    rows = await shown(busy.gateway, "top", "--count", "1")
    (heading,) = (row for row in rows if row[:2] == ["replica", "url"])
    parts = {
        row[0]: dict(zip(heading, row, strict=True)) for row in rows if row[0] in ids and "http" in row[1]
    }
    assert set(parts) == set(ids)
    assert {part["state"] for part in parts.values()} == {"ready"}
    assert ["replica", "slot", "adapter", "state", "running"] in rows
    assert {tuple(row[:2]) for row in rows if row[0] in ids and row[1] in ("0", "1")} == {
        (id_, n) for id_ in ids for n in "01"
    }
    assert any(row[2] == "acme/support@1" for row in rows if len(row) > 2)

    mine = await document(busy.gateway, "residency", "--replica", ids[0], "--events", "5")
    assert [one["id"] for one in mine["replicas"]] == [ids[0]]
    events = await shown(busy.gateway, "residency", "--events", "3")
    assert events[0] == ["replica", "event", "now", "arguments"]
    assert set(ids) & {row[0] for row in events[1:]}
    assert "replica_not_found: " in await refusal(busy.gateway, "residency", "--replica", "nobody")


@pytest.mark.skipif("BROWSER" not in os.environ, reason="with BROWSER=1")
async def test_everybody_can_use_it(busy: Fleet) -> None:
    folder = Path(os.environ["PICTURES"]) if "PICTURES" in os.environ else None
    found = []
    async with browsing(busy.gateway.url) as page:
        await sign_in(page, ADMIN_KEY)
        for lost in (False, True):
            if lost:
                await busy.replicas[1].kill()
                await busy.until(lambda: any(one.lost for one in busy.directory.all()))
            for how, scheme, size in (
                ("light", "light", WIDE),
                ("dark", "dark", WIDE),
                ("phone", "light", NARROW),
            ):
                await page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
                await page.set_viewport_size(size)  # type: ignore[arg-type]
                await page.goto("/console/")
                found += await everybodys(page, how)
                if folder is not None:
                    await page.screenshot(path=folder / f"fleet-{how}-{lost}.png", full_page=True)
    assert found == []
