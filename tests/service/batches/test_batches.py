"""``/v1/files`` and ``/v1/batches`` by OpenAI's own client, on a fake engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch

from adapters.database.rows import BatchRow, FileRow, now
from adapters.model import CONFIG_FILE
from adapters.store import batches as stored
from tests.service.http.test_api import engine_of
from tests.service.inference.test_embeddings import EMBEDDING
from tests.service.publishing.test_upload import files
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.site import SERVICE_KEY, Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

CHAT = "/v1/chat/completions"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path) as site:
        yield site


@pytest.fixture
async def client(site: Site) -> AsyncIterator[openai.AsyncOpenAI]:
    async with site.openai(await site.tenant("acme", {"a": tiny.adapter(1)})) as client:
        yield client


def line(custom_id: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    asked = {"model": tiny.NAME, "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 3}
    body = body or asked
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def jsonl(lines: Iterable[dict[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(one)}\n" for one in lines).encode()


async def started(client: openai.AsyncOpenAI, content: bytes, endpoint: Any = CHAT, **more: Any) -> Batch:
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more
    )


async def ended(client: openai.AsyncOpenAI, id_: str, seconds: float = 120.0) -> Batch:
    over = ("completed", "failed", "expired", "cancelled")
    return await until(client, id_, lambda batch: batch.status in over, seconds)


async def until(
    client: openai.AsyncOpenAI, id_: str, holds: Callable[[Batch], bool], seconds: float = 120.0
) -> Batch:
    async with asyncio.timeout(seconds):
        while not holds(batch := await client.batches.retrieve(id_)):
            await asyncio.sleep(0.05)
    return batch


async def documents(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    text = (await client.files.content(file_id)).text
    return [json.loads(one) for one in text.splitlines()]


async def test_a_batch_from_upload_to_output(site: Site, client: openai.AsyncOpenAI) -> None:
    lines = [line(f"r{number}") for number in range(20)]
    lines[7]["body"] = {"messages": [], "temperature": "hot"}
    lines[8]["body"]["model"] = "nobody"
    lines[6]["body"]["model"] = "a"
    lines[9]["body"]["stream"] = True
    lines[10]["body"] |= {"model": "a@1", "messages": [{"role": "user", "content": "word " * 5000}]}
    batch = await started(client, jsonl(lines), metadata={"purpose": "test"})
    assert (batch.status, batch.endpoint, batch.metadata) == ("validating", CHAT, {"purpose": "test"})
    assert batch.expires_at == batch.created_at + 24 * 3600
    batch = await ended(client, batch.id)
    assert batch.status == "completed"
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (20, 16, 4)
    assert batch.usage is not None
    assert batch.usage.output_tokens == 16 * 3
    answers = await documents(client, batch.output_file_id)
    assert [one["custom_id"] for one in answers] == [f"r{n}" for n in range(20) if n not in (7, 8, 9, 10)]
    for one in answers:
        assert one["error"] is None
        given_by = {"X-Loraplex-Version": "a@1"} if one["custom_id"] == "r6" else {}
        assert one["response"]["headers"] == {"X-Request-Id": one["response"]["request_id"]} | given_by
        assert one["response"]["status_code"] == 200
        assert one["response"]["body"]["choices"][0]["message"]["content"].endswith(" 1 2")
    errors = await documents(client, batch.error_file_id)
    assert [(one["custom_id"], one["response"]["status_code"]) for one in errors] == [
        ("r7", 400),
        ("r8", 404),
        ("r9", 400),
        ("r10", 400),
    ]
    assert errors[3]["response"]["headers"]["X-Loraplex-Version"] == "a@1"
    assert errors[3]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert errors[1]["response"]["body"]["error"]["code"] == "model_not_found"
    await site.services.usage_writer.flush()
    rows = (await site.admin.get("/admin/v1/requests?limit=1000")).json()["data"]
    ids = {row["request_id"]: row["outcome"] for row in rows}
    assert {ids[one["response"]["request_id"]] for one in answers} == {"completed"}
    assert {ids[one["response"]["request_id"]] for one in errors[:2]} == {"rejected"}
    page = (await site.http.get("/metrics")).text
    assert 'loraplex_batch_lines_total{result="completed",tenant="acme"} 16.0' in page
    assert 'loraplex_batches_total{state="completed",tenant="acme"} 1.0' in page


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [("/v1/completions", {"prompt": "hello", "max_tokens": 2}), ("/v1/responses", {"input": "hello"})],
)
async def test_other_endpoints(client: openai.AsyncOpenAI, endpoint: str, body: dict[str, Any]) -> None:
    batch = await started(client, jsonl([line("one", endpoint, **body)]), endpoint)
    batch = await ended(client, batch.id)
    (answer,) = await documents(client, batch.output_file_id)
    assert answer["response"]["body"]["id"]
    assert batch.error_file_id is None


async def test_a_batch_of_embeddings(tmp_path: Path) -> None:
    async with fake_site(tmp_path, FakeEngine(EMBEDDING)) as site:
        client = site.openai(await site.tenant("acme", {"a": tiny.adapter(1)}))
        lines = [line(f"r{n}", "/v1/embeddings", input=["one", "two"]) for n in range(3)]
        lines.append(line("long", "/v1/embeddings", input="word " * 5000))
        batch = await ended(client, (await started(client, jsonl(lines), "/v1/embeddings")).id)
        answers = await documents(client, batch.output_file_id)
        assert [len(one["response"]["body"]["data"]) for one in answers] == [2, 2, 2]
        (long,) = await documents(client, batch.error_file_id)
        assert long["response"]["body"]["error"]["code"] == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="embeddings and no text"):
            await started(client, jsonl([line("r")]))


async def test_wrong_lines_are_named(client: openai.AsyncOpenAI) -> None:
    lines = [jsonl([line("a")]), b'{"custom_id": "b"}\n', b"not json\n", b"\n", jsonl([line("a")])]
    lines += [jsonl([line("c", "/v1/embeddings")]), jsonl([{**line("d"), "method": "GET"}]), b"[1]\n"]
    batch = await ended(client, (await started(client, b"".join(lines))).id)
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert batch.errors is not None
    assert [(error.line, error.code, error.param) for error in batch.errors.data or []] == [
        (2, "missing_required_parameter", "method"),
        (3, "invalid_json_line", None),
        (5, "duplicate_custom_id", "custom_id"),
        (6, "mismatched_url", "url"),
        (7, "invalid_method", "method"),
        (8, "invalid_json_line", None),
    ]
    empty = await ended(client, (await started(client, b"\n\n")).id)
    assert [(e.line, e.code) for e in (empty.errors and empty.errors.data) or []] == [(None, "empty_file")]


async def test_a_cancelled_batch_keeps_what_it_has(site: Site, client: openai.AsyncOpenAI) -> None:
    engine_of(site).times = Times(step=0.02)
    batch = await started(client, jsonl(line(f"r{n}") for n in range(200)))
    await until(client, batch.id, lambda b: bool(b.request_counts and b.request_counts.completed))
    with pytest.raises(openai.ConflictError, match="reads this file"):
        await client.files.delete(batch.input_file_id)
    assert (await client.batches.cancel(batch.id)).status == "cancelling"
    batch = await ended(client, batch.id)
    assert batch.status == "cancelled"
    answers = await documents(client, batch.output_file_id)
    rest = await documents(client, batch.error_file_id)
    assert sorted(one["custom_id"] for one in answers + rest) == sorted(f"r{n}" for n in range(200))
    assert {one["error"]["code"] for one in rest} == {"batch_cancelled"}
    assert engine_of(site).running == []
    assert (await client.batches.cancel(batch.id)).status == "cancelled"
    await client.files.delete(batch.input_file_id)
    done = await ended(client, (await started(client, jsonl([line("a")]))).id)
    with pytest.raises(openai.ConflictError):
        await client.batches.cancel(done.id)


async def test_a_batch_that_expires(site: Site, client: openai.AsyncOpenAI) -> None:
    engine_of(site).times = Times(step=0.05)
    batch = await started(client, jsonl(line(f"r{n}") for n in range(300)))
    await until(client, batch.id, lambda b: b.status == "in_progress")
    async with site.services.database.append() as session:
        (await session.get(BatchRow, batch.id)).expires_at = now()
    runner = site.services.batches
    await runner.stop()
    runner._loops.clear()
    async with AsyncExitStack() as stack:
        runner.start(stack)
        runner.wake()
        batch = await ended(client, batch.id)
    assert batch.status == "expired"
    errors = await documents(client, batch.error_file_id)
    assert {one["error"]["code"] for one in errors} == {"batch_expired"}
    assert batch.request_counts is not None
    assert batch.request_counts.total == 300 == batch.request_counts.completed + len(errors)


async def test_files_are_listed_in_pages_and_expire(site: Site, client: openai.AsyncOpenAI) -> None:
    made = [await client.files.create(file=(f"{n}.jsonl", b"{}"), purpose="batch") for n in range(5)]
    assert [file.id async for file in client.files.list(limit=2)] == [file.id for file in reversed(made)]
    oldest = await client.files.list(limit=2, order="asc")
    assert [file.filename for file in oldest.data] == ["0.jsonl", "1.jsonl"]
    file = await client.files.retrieve(made[0].id)
    assert (file.bytes, file.purpose, file.status) == (2, "batch", "processed")
    assert file.expires_at == pytest.approx(file.created_at + 30 * 24 * 3600, abs=2)
    assert (await client.files.content(file.id)).content == b"{}"
    assert (await client.files.delete(file.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(file.id)
    soon = await client.files.create(
        file=b"{}", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert soon.expires_at == pytest.approx(soon.created_at + 3600, abs=2)
    rows = site.services.batches.files
    async with site.services.database.append() as session:
        (await session.get(FileRow, soon.id)).expires_at = now() - timedelta(seconds=1)
    with pytest.raises(openai.NotFoundError):
        await client.files.content(soon.id)
    assert await rows.expire() == 1


async def test_batches_are_listed_in_pages(client: openai.AsyncOpenAI) -> None:
    made = [(await started(client, jsonl([line("a")]))).id for _ in range(5)]
    assert [batch.id async for batch in client.batches.list(limit=2)] == made[::-1]
    for id_ in made:
        await ended(client, id_)


async def test_large_files_come_back_as_they_went(client: openai.AsyncOpenAI) -> None:
    content = bytes(range(256)) * 20_000
    file = await client.files.create(file=content, purpose="batch")
    assert file.bytes == len(content)
    assert (await client.files.content(file.id)).content == content


async def test_nobody_elses(site: Site, client: openai.AsyncOpenAI) -> None:
    theirs = site.openai(await site.tenant("globex"))
    batch = await ended(client, (await started(client, jsonl([line("a")]))).id)
    assert batch.output_file_id is not None
    for call in (
        theirs.files.retrieve(batch.input_file_id),
        theirs.files.content(batch.output_file_id),
        theirs.files.delete(batch.output_file_id),
        theirs.batches.retrieve(batch.id),
        theirs.batches.cancel(batch.id),
        theirs.batches.list(after=batch.id),
        theirs.files.list(after=batch.input_file_id),
    ):
        with pytest.raises(openai.NotFoundError):
            await call
    with pytest.raises(openai.BadRequestError, match="no such file"):
        await theirs.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")
    assert (await theirs.files.list()).data == []
    assert (await theirs.batches.list()).data == []


FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "no purpose": ({"files": {"file": b"{}"}}, "purpose"),
    "another purpose": ({"files": {"file": b"{}"}, "data": {"purpose": "fine-tune"}}, "purpose"),
    "no file": ({"files": {"purpose": (None, "batch")}}, "file"),
    "an unknown field": ({"files": {"file": b"{}"}, "data": {"purpose": "batch", "x": "1"}}, "x"),
    "a short life": (
        {
            "files": {"file": b"{}"},
            "data": {
                "purpose": "batch",
                "expires_after[anchor]": "created_at",
                "expires_after[seconds]": "1",
            },
        },
        "expires_after",
    ),
    "two files": ({"files": [("purpose", (None, "batch")), ("file", b"{}"), ("file", b"{}")]}, "file"),
}


@pytest.mark.parametrize("name", FORMS)
async def test_a_wrong_upload(site: Site, name: str) -> None:
    key = await site.tenant("acme")
    sent, param = FORMS[name]
    refused = await site.http.post("/v1/files", headers=bearer(key), **sent)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == param
    assert (await site.http.get("/v1/files", headers=bearer(key))).json()["data"] == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"completion_window": "1h"}, "completion_window"),
        ({"endpoint": "/v1/messages"}, "endpoint"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"input_file_id": None}, "input_file_id"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after.anchor"),
        ({"unknown": 1}, "unknown"),
    ],
)
async def test_a_wrong_batch(site: Site, change: dict[str, Any], param: str) -> None:
    key = await site.tenant("acme")
    file = await site.openai(key).files.create(file=b"{}", purpose="batch")
    body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"} | change
    refused = await site.http.post("/v1/batches", json=body, headers=bearer(key))
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == param


async def test_files_count_against_the_quota(site: Site) -> None:
    key = await site.tenant("acme", limits={"max_storage_bytes": 500_000})
    client = site.openai(key)
    await client.files.create(file=b"x" * 400_000, purpose="batch")
    with pytest.raises(openai.PermissionDeniedError, match="500000"):
        await client.files.create(file=b"x" * 400_000, purpose="batch")
    scoped = await site.admin.post("/admin/v1/tenants/acme/keys", json={"scopes": ["adapters:write"]})
    mine = files(1)
    mine[CONFIG_FILE] += b" " * 200_000
    refused = await site.http.post(
        "/v1/adapters/a/versions", headers=bearer(scoped.json()["key"]), files=mine
    )
    assert refused.status_code == 403, refused.text
    assert len((await client.files.list()).data) == 1


async def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    async with fake_site(tmp_path, max_file_bytes=100_000) as site:
        client = site.openai(await site.tenant("acme"))
        with pytest.raises(openai.APIStatusError) as refused:
            await client.files.create(file=b"x" * 200_000, purpose="batch")
        assert refused.value.status_code == 413
        assert (await client.files.list()).data == []


async def test_lines_wait_for_limits_and_leave_a_part_to_others(site: Site) -> None:
    key = await site.tenant("acme", limits={"requests_per_minute": 4, "requests_at_once": 2})
    client = site.openai(key)
    batch = await started(client, jsonl(line(f"r{n}") for n in range(5)))
    await until(client, batch.id, lambda b: bool(b.request_counts and b.request_counts.completed == 2))
    await asyncio.sleep(0.3)
    assert (await client.batches.retrieve(batch.id)).request_counts.completed == 2  # type: ignore[union-attr]
    assert (await site.chat(key, "hello", model=tiny.NAME, max_tokens=1)).status_code == 200
    await client.batches.cancel(batch.id)
    await ended(client, batch.id)


async def test_a_revoked_key_ends_its_batch(site: Site) -> None:
    engine_of(site).times = Times(step=0.02)
    key = await site.tenant("acme")
    mine = site.openai(key)
    batch = await started(mine, jsonl(line(f"r{n}") for n in range(60)))
    await until(mine, batch.id, lambda b: bool(b.request_counts and b.request_counts.completed))
    keys = (await site.admin.get("/admin/v1/tenants/acme/keys")).json()["data"]
    await site.admin.delete(f"/admin/v1/tenants/acme/keys/{keys[0]['id']}")
    client = site.openai(SERVICE_KEY, default_headers={"X-Customer-ID": "acme"})
    batch = await ended(client, batch.id)
    errors = await documents(client, batch.error_file_id)
    assert {one["response"]["status_code"] for one in errors} == {401}


async def test_a_tenant_that_is_removed_takes_its_batches_along(site: Site) -> None:
    engine_of(site).times = Times(step=0.05)
    client = site.openai(await site.tenant("acme"))
    batch = await started(client, jsonl(line(f"r{n}") for n in range(100)))
    await until(client, batch.id, lambda b: b.status == "in_progress")
    assert (await site.admin.delete("/admin/v1/tenants/acme")).status_code == 204
    async with asyncio.timeout(60):
        while site.services.batches._active:
            await asyncio.sleep(0.05)
    assert await site.services.batches.batches.state(batch.id) is None
    await asyncio.sleep(0.1)
    assert engine_of(site).running == []


async def test_batches_can_be_switched_off(tmp_path: Path) -> None:
    async with fake_site(tmp_path, batch_running=0) as site:
        client = site.openai(await site.tenant("acme"))
        with pytest.raises(openai.NotFoundError, match="no batches"):
            await client.files.create(file=b"{}", purpose="batch")


async def test_others_wait_for_one_line_at_most(site: Site) -> None:
    """And nothing of the same customer's own waits behind its batch."""
    engine = engine_of(site)
    engine.times, engine.max_model_len = Times(step=0.02), 1 << 16
    key = await site.tenant("acme")
    client = site.openai(key)
    stream = asyncio.create_task(site.chat(key, "hello", model=tiny.NAME, max_tokens=60_000))
    while not engine.running:
        await asyncio.sleep(0.01)
    batch = await started(client, jsonl(line(f"r{n}") for n in range(100)))
    await until(client, batch.id, lambda b: bool(b.request_counts and b.request_counts.completed > 2))
    engine.most_running = 0
    counts = (await client.batches.retrieve(batch.id)).request_counts
    assert counts is not None
    enough = counts.completed + 4
    await until(client, batch.id, lambda b: bool(b.request_counts and b.request_counts.completed >= enough))
    most = engine.most_running
    stream.cancel()
    await client.batches.cancel(batch.id)
    await ended(client, batch.id)
    assert most == 2


async def test_one_tenant_has_a_bounded_number_of_them(
    site: Site, client: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "MAX_UNFINISHED", 0)
    with pytest.raises(openai.PermissionDeniedError, match="have not ended"):
        await started(client, jsonl([line("a")]))
