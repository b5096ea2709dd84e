"""What a trace store gets of a request, an upload and a refusal, by OTLP over HTTP."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.collector import Collector, SpanSeen, collector
from tests.support.fakes import FakeEngine, Times
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")


@pytest.fixture
def store() -> Iterator[Collector]:
    with collector() as made:
        yield made


def site_of(folder: Path, store: Collector, share: float = 1.0) -> object:
    engine = FakeEngine(tiny.base(), host_slots=2, times=Times(step=0.01, stage=0.05))
    return fake_site(folder, engine, host_slots=2, traces_url=store.url, traces_share=share)


async def spans(store: Collector, trace: str, until: str) -> dict[str, SpanSeen]:
    return await asyncio.to_thread(store.of, trace, until)


async def ask(site: Site, key: str, trace: str, flags: str = "01", **fields: object) -> str:
    """Asks in the trace of a client; returns its span's id."""
    span = secrets.token_hex(8)
    headers = bearer(key) | {"traceparent": f"00-{trace}-{span}-{flags}"}
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "stream": True, **fields}
    said = await site.http.post("/v1/chat/completions", json=body, headers=headers)
    assert said.headers["traceparent"].split("-")[1] == trace
    return span


async def test_a_request_has_its_parts_with_the_numbers_that_its_row_has(
    tmp_path: Path, store: Collector
) -> None:
    trace = secrets.token_hex(16)
    async with site_of(tmp_path, store) as site:  # type: ignore[attr-defined]
        key = await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2), "c": tiny.adapter(3)})
        parent = await ask(site, key, trace, model="a")
        row = (await site.admin.get("/admin/v1/requests")).json()["data"][0]
        found = await spans(store, trace, "POST /v1/chat/completions")
    root, chat = found["POST /v1/chat/completions"], found["chat a@1"]
    assert (root.parent, chat.parent) == (parent, root.id)
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["loraplex.request_id"] == row["request_id"]
    assert root.service["service.name"] == "loraplex"
    assert chat.attributes["gen_ai.operation.name"] == "chat"
    assert chat.attributes["gen_ai.response.model"] == "a@1"
    assert chat.attributes["gen_ai.usage.output_tokens"] == row["output_tokens"] == 5
    assert {found[name].parent for name in ("queue", "prefill", "decode")} == {chat.id}
    assert found["queue"].seconds == pytest.approx(row["queue_seconds"], abs=1e-3)
    # The trace begins with the exchange, a moment before the request is taken in.
    until_first = found["decode"].began - root.began
    assert row["first_token_seconds"] - 1e-3 <= until_first <= root.seconds
    assert ("load" in found) == row["cold"] is True
    assert found["load"].parent == found["queue"].id
    assert found["load"].seconds == pytest.approx(row["load_seconds"], abs=1e-3)
    assert not any(span.failed for span in found.values())
    assert "hi" not in {value for span in found.values() for value in span.attributes.values()}


async def test_an_upload_has_its_stages_also_after_its_answer(tmp_path: Path, store: Collector) -> None:
    async with site_of(tmp_path, store) as site:  # type: ignore[attr-defined]
        await site.tenant("acme")
        said = await site.upload("acme", "a", tiny.adapter(1))
        found = await spans(store, said.headers["traceparent"].split("-")[1], "upload")
        stages = [found[name] for name in ("receiving", "inspecting", "probing", "linking")]
        assert {stage.parent for stage in stages} == {found["upload"].id}
        assert all(one.ended <= two.began for one, two in pairwise(stages))
        assert found["upload"].attributes["loraplex.adapter"] == "a"

        path = "/admin/v1/tenants/acme/adapters/b/versions"
        files = {name: (tiny.adapter(2) / name).read_bytes() for name in ("adapter_config.json",)}
        refused = await site.admin.post(path, files=files)
        found = await spans(store, refused.headers["traceparent"].split("-")[1], f"POST {path_of(path)}")
        assert found["upload"].failed
        assert found["upload"].attributes["error.type"] == refused.json()["error"]["code"]


def path_of(path: str) -> str:
    return path.replace("acme", "{tenant}").replace("/b/", "/{name}/")


async def test_who_begins_a_trace_says_whether_it_is_kept(tmp_path: Path, store: Collector) -> None:
    ours, theirs, dropped = (secrets.token_hex(16) for _ in range(3))
    async with site_of(tmp_path, store, share=0.0) as site:  # type: ignore[attr-defined]
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        await site.chat(key, "hi", max_tokens=2)
        await ask(site, key, dropped, flags="00")
        page = await site.http.get("/metrics", headers={"accept": "application/openmetrics-text"})
        assert "loraplex_queue_seconds_bucket" in page.text
        assert "trace_id" not in page.text, "an exemplar of a trace that the store never gets"
        await ask(site, key, theirs, flags="01")
        await spans(store, theirs, "POST /v1/chat/completions")
    assert {span.trace for span in store.spans} == {theirs}
    assert ours not in {span.trace for span in store.spans}


async def test_a_failure_is_marked_and_a_refusal_has_its_code(tmp_path: Path, store: Collector) -> None:
    trace, other = secrets.token_hex(16), secrets.token_hex(16)
    async with site_of(tmp_path, store) as site:  # type: ignore[attr-defined]
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        await ask(site, key, trace, model="nobody")
        site.services.engine.break_streams = (500, 2)
        await ask(site, key, other, model="a")
        found = await spans(store, trace, "POST /v1/chat/completions")
        broken = await spans(store, other, "POST /v1/chat/completions")
    assert found["POST /v1/chat/completions"].attributes["loraplex.code"] == "model_not_found"
    assert not found["POST /v1/chat/completions"].failed
    assert broken["chat a@1"].failed


async def test_a_store_that_is_not_there_costs_spans_and_nothing_else(tmp_path: Path) -> None:
    engine = FakeEngine(tiny.base())
    async with fake_site(tmp_path, engine, traces_url="http://127.0.0.1:9", traces_share=1.0) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        assert (await site.chat(key, "hi", max_tokens=2)).status_code == 200


def test_without_traces_nothing_of_it_is_imported() -> None:
    script = (
        "import sys\nfrom server.app import create_app\nfrom server.settings import Settings\n"
        "create_app(Settings(model='/nowhere'))\n"
        "slow = ('server.telemetry.traces', 'opentelemetry.exporter')\n"
        "print([name for name in slow if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]"), done.stdout
