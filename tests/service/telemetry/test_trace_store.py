"""A trace store of others (Arize Phoenix) in the place of the tests' own collector, where one is running.

``pip install arize-phoenix`` in an environment of its own, ``phoenix serve``, and its URL in
``LORAPLEX_TEST_PHOENIX``.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.telemetry.test_traces import ask
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.tiny import fake_site

URL = os.environ.get("LORAPLEX_TEST_PHOENIX")
pytestmark = [
    pytest.mark.skipif(URL is None, reason="LORAPLEX_TEST_PHOENIX names no trace store"),
    pytest.mark.filterwarnings("ignore:max_tokens is deprecated"),
]


async def stored(trace: str, until: str) -> dict[str, dict[str, Any]]:
    """The spans of ``trace`` by name as the store gives them, once ``until`` is among them."""
    async with httpx.AsyncClient(base_url=str(URL), timeout=60) as http, asyncio.timeout(120):
        while True:
            answer = await http.get("/v1/projects/default/spans", params={"trace_id": trace})
            assert answer.status_code == 200, answer.text
            found = {span["name"]: span for span in answer.json()["data"]}
            if until in found:
                return found
            await asyncio.sleep(0.2)


def id_of(span: dict[str, Any]) -> str:
    return str(span["context"]["span_id"])


async def test_a_store_has_the_spans_their_parents_and_attributes(tmp_path: Path) -> None:
    engine = FakeEngine(tiny.base(), host_slots=2, times=Times(step=0.01, stage=0.05))
    good, bad = secrets.token_hex(16), secrets.token_hex(16)
    async with fake_site(tmp_path, engine, host_slots=2, traces_url=URL, traces_share=1.0) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2), "c": tiny.adapter(3)})
        parent = await ask(site, key, good, model="a")
        row = (await site.admin.get("/admin/v1/requests")).json()["data"][0]
        await ask(site, key, bad, model="nobodys")
    found = await stored(good, "POST /v1/chat/completions")
    root, chat = found["POST /v1/chat/completions"], found["chat a@1"]
    assert (root["parent_id"], chat["parent_id"]) == (parent, id_of(root))
    assert {found[name]["parent_id"] for name in ("queue", "prefill", "decode")} == {id_of(chat)}
    assert found["load"]["parent_id"] == id_of(found["queue"]), "it was cold"
    assert root["attributes"]["loraplex.request_id"] == row["request_id"]
    assert root["attributes"]["loraplex.tenant"] == "acme"
    assert chat["attributes"]["gen_ai.response.model"] == "a@1"
    assert chat["attributes"]["gen_ai.usage.output_tokens"] == row["output_tokens"] == 5
    assert all(span["status_code"] != "ERROR" for span in found.values())

    (refused,) = (await stored(bad, "POST /v1/chat/completions")).values()
    assert refused["attributes"]["http.response.status_code"] == 404
    assert refused["attributes"]["loraplex.code"] == "model_not_found"
