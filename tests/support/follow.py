"""One request, looked up by its id everywhere that it leaves something."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

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


async def follow(site: Site, key: str, caplog: pytest.LogCaptureFixture, **fields: Any) -> Followed:
    """Asks once, in a trace and with an id of its own, and finds the request by these."""
    trace, own_id = secrets.token_hex(16), f"client-{secrets.token_hex(4)}"
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "stream": True, **fields}
    headers = bearer(key) | {"traceparent": f"00-{trace}-{secrets.token_hex(8)}-01", "X-Request-Id": own_id}
    with caplog.at_level("INFO", "loraplex.access"):
        said = await site.http.post("/v1/chat/completions", json=body, headers=headers)
        # The line is written when the stream is closed, a moment after its last byte.
        (row,) = (await site.admin.get("/admin/v1/requests", params={"request_id": own_id})).json()["data"]
    (line,) = [vars(r) for r in caplog.records if getattr(r, "client_request_id", None) == own_id]
    assert said.headers["x-request-id"] == own_id
    assert said.headers["traceparent"].split("-")[1] == trace == line["trace_id"]
    for found in (
        await site.admin.get("/admin/v1/requests", params={"request_id": line["request_id"]}),
        await site.admin.get("/admin/v1/requests", params={"tenant": line["tenant"], "limit": 1}),
    ):
        assert found.json()["data"] == [row]
    page = await site.admin.get("/metrics", headers={"accept": "application/openmetrics-text"})
    exemplars = {
        family.name: sample.exemplar.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
        if sample.exemplar and sample.exemplar.labels["trace_id"] == trace
    }
    return Followed(said.status_code, trace, line, row, exemplars)


async def used(site: Site, tenant: str, row: dict[str, Any]) -> dict[str, Any]:
    """What the usage has for requests like this one."""
    asked = {"tenant": tenant, "by": "adapter,version,outcome"}
    found = (await site.admin.get("/admin/v1/usage", params=asked)).json()["data"]
    alike = [line for line in found if all(line[n] == row[n] for n in ("adapter", "version", "outcome"))]
    assert len(alike) == 1, found
    return dict(alike[0])


def agree(found: Followed) -> None:
    """The access line, the row and the exemplars have equal numbers."""
    line, row = found.line, found.row
    for name in ("request_id", "client_request_id", "tenant", "outcome", "code"):
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
