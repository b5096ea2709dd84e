"""One request followed by its id through log, trace, metrics, usage and ``/admin/v1/requests``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny
from tests.support.collector import Collector, collector
from tests.support.fakes import FakeEngine, Times
from tests.support.follow import COUNTS, agree, follow, spans, spans_agree, used
from tests.support.site import Site
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")


async def canary(site: Site, key: str, caplog: pytest.LogCaptureFixture, store: Collector) -> None:
    """A request that the split sent to the new version says so everywhere, and is counted there alone."""
    path = "/admin/v1/tenants/acme/adapters/a"
    await site.upload("acme", "a", tiny.adapter(2))
    await site.admin.patch(path, json={"split": {"1": 1, "2": 99}})
    found = await follow(site, key, caplog, model="a")
    while found.row["version"] != 2:
        found = await follow(site, key, caplog, model="a")
    agree(found)
    spans_agree(found, await spans(store, found))
    counted = await used(site.admin, "acme", found.row)
    assert (counted["requests"], *(counted[name] for name in COUNTS)) == (
        1,
        *(found.row[name] for name in COUNTS),
    )
    page = (await site.http.get("/metrics")).text
    assert 'version="0"' not in page, "an upload's own probe is no request of the customer's"
    whose = 'adapter="a",outcome="completed",tenant="acme",version="2"'
    assert f"loraplex_adapter_requests_total{{{whose}}} 1.0" in page
    whose = 'adapter="a",tenant="acme",version="2"'
    assert f"loraplex_adapter_output_tokens_total{{{whose}}} {found.row['output_tokens']}.0" in page
    await site.admin.patch(path, json={"split": None})


async def cold(site: Site, key: str, caplog: pytest.LogCaptureFixture, store: Collector) -> None:
    found = await follow(site, key, caplog, model="cold")
    agree(found)
    seen = await spans(store, found)
    spans_agree(found, seen)
    assert found.row["cold"] is True
    assert 0 < found.row["load_seconds"] <= found.row["queue_seconds"] < found.row["first_token_seconds"]
    assert seen["load"].seconds == pytest.approx(found.row["load_seconds"], abs=1e-3)
    assert found.exemplars.keys() >= {"loraplex_queue_seconds", "loraplex_time_to_first_token_seconds"}
    assert (await used(site.admin, "acme", found.row))["output_tokens"] == found.row["output_tokens"] == 5


async def refused(site: Site, caplog: pytest.LogCaptureFixture, store: Collector) -> None:
    key = await site.tenant("little", {"a": tiny.adapter(1)}, limits={"requests_per_minute": 1})
    await follow(site, key, caplog, model="a")
    found = await follow(site, key, caplog, model="a")
    assert found.status == 429
    agree(found)
    assert found.row["outcome"] == "refused"
    assert found.row["code"] == found.line["code"] == "rate_limit_exceeded"
    assert [found.row[name] for name in COUNTS] == [0, 0, 0]
    seen = await spans(store, found)
    root = seen["POST /v1/chat/completions"].attributes
    assert root["loraplex.code"] == "rate_limit_exceeded"
    assert (root["loraplex.adapter"], root["loraplex.version"]) == ("a", 1)
    page = (await site.http.get("/metrics")).text
    assert 'loraplex_requests_total{outcome="refused",tenant="little"} 1.0' in page
    counted = (await site.admin.get("/admin/v1/usage", params={"tenant": "little"})).json()["data"]
    assert sum(line["requests"] for line in counted) == 1, "what is refused is found, and counts nowhere"
    assert found.exemplars == {}


async def engine_died(site: Site, key: str, caplog: pytest.LogCaptureFixture, store: Collector) -> None:
    """One that cannot go on, with some tokens of a hundred."""

    async def end_it() -> None:
        engine = site.services.engine
        while sum(tokens for run in engine.running for tokens in run.produced.values()) < 3:
            await asyncio.sleep(0.005)
        engine.die()

    ending = asyncio.create_task(end_it())
    found = await follow(site, key, caplog, model="a", seed=1, max_tokens=100)
    await ending
    agree(found)
    assert found.row["outcome"] in ("failed", "unavailable")
    assert found.row["code"] == found.line["code"] == "engine_restarting"
    assert 0 < found.row["output_tokens"] < 100
    seen = await spans(store, found)
    chat = seen[f"chat a@{found.row['version']}"]
    assert chat.failed
    assert chat.attributes["gen_ai.usage.output_tokens"] == found.row["output_tokens"]
    counted = await used(site.admin, "acme", found.row)
    assert (counted["requests"], counted["output_tokens"]) == (1, found.row["output_tokens"])


async def test_one_request_has_the_same_numbers_everywhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(tiny.base(), gpu_slots=1, host_slots=1, times=Times(step=0.01, stage=0.05, start=0.1))
    fields: dict[str, Any] = {"gpu_slots": 1, "host_slots": 1, "traces_share": 1.0}
    with collector() as store:
        async with fake_site(tmp_path, engine, traces_url=store.url, **fields) as site:
            key = await site.tenant("acme", {"a": tiny.adapter(1), "cold": tiny.adapter(3)})
            await canary(site, key, caplog, store)
            await cold(site, key, caplog, store)
            await refused(site, caplog, store)
            await engine_died(site, key, caplog, store)
