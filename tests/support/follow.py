"""One request, looked up by its id everywhere that it leaves something."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.support.collector import Collector, SpanSeen
from tests.support.site import Site, bearer

COUNTS = ("prompt_tokens", "cached_tokens", "output_tokens")
TIMES = ("queue_seconds", "load_seconds", "first_token_seconds")


@dataclass(frozen=True)
class Followed:
    """``line`` is of the access log, ``row`` of ``/admin/v1/requests``, ``exemplars`` are by metric."""

    status: int
    trace: str
    line: dict[str, Any]
    row: dict[str, Any]
    exemplars: dict[str, float]


@dataclass(frozen=True)
class Sent:
    """A request's own ids; ``headers`` put it into its trace."""

    own_id: str = field(default_factory=lambda: f"client-{secrets.token_hex(4)}")
    trace: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def headers(self) -> dict[str, str]:
        traceparent = f"00-{self.trace}-{secrets.token_hex(8)}-01"
        return {"traceparent": traceparent, "X-Request-Id": self.own_id}


async def follow(site: Site, key: str, caplog: pytest.LogCaptureFixture, **fields: Any) -> Followed:
    """Asks once, in a trace and with an id of its own, and finds the request by these."""
    sent = Sent()
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "stream": True, **fields}
    with caplog.at_level("INFO", "loraplex.access"):
        said = await site.http.post("/v1/chat/completions", json=body, headers=bearer(key) | sent.headers)
        # The line is written when the stream is closed, a moment after its last byte.
        found = await look_up(site.admin, said.status_code, sent, lambda: [vars(r) for r in caplog.records])
    assert said.headers["x-request-id"] == sent.own_id
    assert said.headers["traceparent"].split("-")[1] == sent.trace
    return found


async def look_up(
    admin: httpx.AsyncClient, status: int, sent: Sent, lines: Callable[[], Sequence[dict[str, Any]]]
) -> Followed:
    """What there is of a request that has ended; ``lines`` gives the log's."""
    rows: list[dict[str, Any]] = []
    told: list[dict[str, Any]] = []
    async with asyncio.timeout(120):
        while not (rows and told):
            asked = {"request_id": sent.own_id}
            rows = (await admin.get("/admin/v1/requests", params=asked)).json()["data"]
            mine = [line for line in lines() if line.get("client_request_id") == sent.own_id]
            told = [line for line in mine if "seconds" in line]
            await asyncio.sleep(0 if rows and told else 0.1)
    (row,) = rows
    (line,) = told
    assert line["trace_id"] == sent.trace
    asked = {"request_id": line["request_id"]}
    assert (await admin.get("/admin/v1/requests", params=asked)).json()["data"] == [row]
    asked = {"tenant": line["tenant"], "limit": "50"}
    assert row in (await admin.get("/admin/v1/requests", params=asked)).json()["data"]
    page = await admin.get("/metrics", headers={"accept": "application/openmetrics-text"})
    exemplars = {
        family.name: sample.exemplar.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
        if sample.exemplar and sample.exemplar.labels["trace_id"] == sent.trace
    }
    return Followed(status, sent.trace, line, row, exemplars)


async def spans(store: Collector, found: Followed) -> dict[str, SpanSeen]:
    """Those of the request's trace, by name."""
    return await asyncio.to_thread(store.of, found.trace, "POST /v1/chat/completions")


def spans_agree(found: Followed, seen: dict[str, SpanSeen]) -> None:
    """The trace has the row's numbers."""
    row, root = found.row, seen["POST /v1/chat/completions"]
    assert root.attributes["loraplex.request_id"] == row["request_id"]
    assert seen["queue"].seconds == pytest.approx(row["queue_seconds"], abs=1e-3)
    # The trace begins with the exchange, a moment before the request is taken in.
    until_first = seen["decode"].began - root.began
    assert row["first_token_seconds"] - 2e-3 <= until_first <= root.seconds
    chat = next(span for name, span in seen.items() if name.startswith("chat "))
    assert chat.attributes["gen_ai.usage.output_tokens"] == row["output_tokens"]
    assert chat.attributes["gen_ai.response.model"] == f"{row['adapter']}@{row['version']}"
    assert ("load" in seen) == row["cold"]


async def used(admin: httpx.AsyncClient, tenant: str, row: dict[str, Any]) -> dict[str, Any]:
    """What the usage has for requests like this one."""
    asked = {"tenant": tenant, "by": "adapter,version,outcome"}
    found = (await admin.get("/admin/v1/usage", params=asked)).json()["data"]
    alike = [line for line in found if all(line[n] == row[n] for n in ("adapter", "version", "outcome"))]
    assert len(alike) == 1, found
    return dict(alike[0])


def agree(found: Followed) -> None:
    """The access line, the row and the exemplars have equal numbers."""
    line, row = found.line, found.row
    for name in ("request_id", "client_request_id", "tenant", "adapter", "version", "outcome", "code"):
        assert line.get(name) == row[name], name
    if row["outcome"] == "refused":
        return  # it used nothing, and waited for nothing
    for name in COUNTS:
        assert line[name] == row[name], name
    for name in TIMES:
        assert line.get(name) == (None if row[name] is None else pytest.approx(row[name], abs=2e-4)), name
    assert line["seconds"] >= row["seconds"], "the whole exchange, with the reading of the body"
    assert line["cold"] == row["cold"]
    for metric, name in (
        ("loraplex_queue_seconds", "queue_seconds"),
        ("loraplex_time_to_first_token_seconds", "first_token_seconds"),
    ):
        if metric in found.exemplars:
            assert found.exemplars[metric] == pytest.approx(row[name], abs=2e-4)
