"""Lines of batches: how a file is cut into them, what is wrong with one, and what is tried again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from adapters.errors import AdapterDamaged, AdapterUnfit, StorageBusy
from adapters.store.batches import Batch
from server.batches.lines import (
    TRIES,
    BadLine,
    Checker,
    again_after,
    answered,
    parse,
    refused,
    split,
    unanswered,
)
from server.batches.pace import QUIET_S, Pace
from server.batches.runner import next_ones
from server.errors import BadRequest, Forbidden, ServerError, TooManyRequests, Unauthorized, Unavailable
from server.limits.errors import BeyondLimits
from tests.support.calls import counted

CHAT = "/v1/chat/completions"


async def lines_of(chunks: list[bytes], most: int = 1000) -> list[tuple[int, bytes | None]]:
    async def content() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    return [line async for lines in split(content(), most) for line in lines]


def cut(chunks: list[bytes], most: int = 1000) -> list[tuple[int, bytes | None]]:
    return asyncio.run(lines_of(chunks, most))


@given(
    some.lists(
        some.one_of(some.sampled_from([b"", b" ", b"  \t", b" a "]), some.binary(max_size=12)).map(
            lambda b: b.replace(b"\n", b"")
        ),
        max_size=8,
    ),
    some.data(),
)
def test_however_the_bytes_come_the_lines_are_the_same(lines: list[bytes], data: some.DataObject) -> None:
    whole = b"\n".join(lines)
    cuts = sorted(data.draw(some.lists(some.integers(0, len(whole)), max_size=6)))
    chunks = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert cut(chunks) == [(n, line) for n, line in enumerate(lines, 1) if line.strip()]


def test_a_line_that_is_too_long_is_not_held() -> None:
    long = [b"x" * 600] * 4
    assert cut([b"a\n", *long, b"\nb"]) == [(1, b"a"), (2, None), (3, b"b")]
    assert cut(long) == [(1, None)]
    assert cut([b"x" * 1001 + b"\nb"]) == [(1, None), (2, b"b")]


def test_lines_come_some_at_a_time_and_keep_their_numbers() -> None:
    lines = [b"a" if n % 3 else b"" for n in range(5000)]
    assert cut([b"\n".join(lines)]) == [(n, line) for n, line in enumerate(lines, 1) if line]


@pytest.mark.parametrize("piece", [b"\n" * (1 << 20), b" \n" * (1 << 19), b"\n" * ((1 << 20) - 2) + b"a\n"])
def test_blank_lines_cost_little(piece: bytes) -> None:
    """200 MB of them kept everybody waiting for half a second, again and again."""
    loop = asyncio.new_event_loop()  # asyncio.run would look through all tasks that the process ever had
    try:
        with counted() as calls:
            found = loop.run_until_complete(lines_of([piece] * 8))
    finally:
        loop.close()
    assert len(found) in (0, 8)
    assert calls.count < 2000, "8 MiB"


def raw(**changes: Any) -> bytes:
    line = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"messages": []}} | changes
    return json.dumps({name: value for name, value in line.items() if value is not ...}).encode()


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (None, "line_too_long", None),
        (b"{", "invalid_json_line", None),
        (b'{"custom_id":"a","custom_id":"b"}', "invalid_json_line", None),
        (b"\xff\xfe{\x00", "invalid_json_line", None),
        (b'"text"', "invalid_json_line", None),
        (raw(custom_id=...), "missing_required_parameter", "custom_id"),
        (raw(body=None), "missing_required_parameter", "body"),
        (raw(custom_id=1), "invalid_custom_id", "custom_id"),
        (raw(custom_id=""), "invalid_custom_id", "custom_id"),
        (raw(custom_id="x" * 513), "invalid_custom_id", "custom_id"),
        (raw(method="GET"), "invalid_method", "method"),
        (raw(method=["POST"]), "invalid_method", "method"),
        (raw(url="/v1/embeddings"), "mismatched_url", "url"),
        (raw(body=[]), "invalid_body", "body"),
        (raw(extra=1), "unknown_parameter", None),
    ],
)
def test_what_is_wrong_with_a_line(line: bytes | None, code: str, param: str | None) -> None:
    with pytest.raises(BadLine) as wrong:
        parse(3, line, CHAT, 1000)
    assert (wrong.value.shown["code"], wrong.value.shown["param"]) == (code, param)
    assert wrong.value.shown["line"] == 3


def test_a_right_line() -> None:
    line = parse(1, b"\xef\xbb\xbf" + raw() + b"\r", CHAT, 1000)
    assert (line.number, line.custom_id, line.body) == (1, "a", {"messages": []})


def test_no_more_errors_than_people_read() -> None:
    checker = Checker(CHAT, 1000)
    checker.look([(n, b"{") for n in range(1, 500)])
    checker.finish()
    assert len(checker.errors) == 100
    assert checker.full


def test_too_many_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.batches.lines.MAX_LINES", 2)
    checker = Checker(CHAT, 1000)
    checker.look([(n, raw(custom_id=str(n))) for n in range(1, 9)])
    checker.finish()
    assert [error["code"] for error in checker.errors] == ["too_many_lines"]


def test_what_is_written() -> None:
    assert json.loads(answered("i", "a", '{"x":1}')) == {
        "id": "batch_req_i",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": "i",
            "headers": {"X-Request-Id": "i"},
            "body": {"x": 1},
        },
        "error": None,
    }
    wrong = json.loads(refused("i", "a", BadRequest("no", param="n")))
    assert wrong["response"]["status_code"] == 400
    assert wrong["response"]["body"]["error"]["param"] == "n"
    assert json.loads(unanswered("i", "a", "expired"))["error"]["code"] == "batch_expired"
    line = answered("i", "a\n", json.dumps({"x": "\n\u2028 😀"}, ensure_ascii=False))
    assert len(line.splitlines()) == 1
    assert json.loads(line)["response"]["body"] == {"x": "\n\u2028 😀"}


@pytest.mark.parametrize(
    ("error", "tries", "wait"),
    [
        (BadRequest("x"), 1, None),
        (Unauthorized("x"), 1, None),
        (Forbidden("x"), 1, None),
        (Forbidden("x", code="tenant_suspended"), 1, 60.0),
        (AdapterUnfit("x"), 1, None),
        (TooManyRequests("x", retry_after=7), 1, 7.0),
        (TooManyRequests("x", retry_after=700), 90, 60.0),
        (BeyondLimits("x", retry_after=7), 1, None),
        (TooManyRequests("x", code="insufficient_quota", retry_after=100), 1, 60.0),
        (TooManyRequests("x", code="insufficient_quota", retry_after=5000), 1, None),
        (Unavailable("x", code="engine_restarting"), 1, 1.0),
        (Unavailable("x", code="engine_restarting"), 4, 8.0),
        (Unavailable("x", code="queue_timeout"), 1000, 60.0),
        (StorageBusy("x"), 1, 2.0),
        (AdapterDamaged("x"), 1, 60.0),
        (AdapterDamaged("x"), TRIES, None),
    ],
)
def test_what_is_tried_again(error: ServerError, tries: int, wait: float | None) -> None:
    assert again_after(error, tries, 1000.0) == wait


def batch(id_: str, tenant: str) -> Batch:
    at = datetime.now(UTC)
    return Batch(id_, tenant, None, CHAT, "f", None, None, "validating", 0, None, None, {}, at, at)


def test_batches_take_turns_by_tenant() -> None:
    waiting = [batch("1", "acme"), batch("2", "acme"), batch("3", "acme"), batch("4", "globex")]
    assert [one.id for one in next_ones(waiting, [], 2)] == ["1", "4"]
    assert [one.id for one in next_ones(waiting, ["acme", "acme"], 2)] == ["4", "1"]
    assert next_ones(waiting, ["acme"], 0) == next_ones(waiting, ["acme"], -1) == []


async def test_the_pace_is_one_line_beside_others() -> None:
    now, others = 0.0, 0
    pace = Pace(3, lambda: others, lambda: now)
    entered: list[int] = []

    async def line(number: int, go: asyncio.Event) -> None:
        async with pace:
            entered.append(number)
            await go.wait()

    go = [asyncio.Event() for _ in range(6)]
    tasks = [asyncio.create_task(line(n, go[n])) for n in range(6)]
    await asyncio.sleep(0)
    assert (entered, pace.running) == ([0, 1, 2], 3)
    others = 1
    for n in (0, 1, 2):
        go[n].set()
    for _ in range(4):
        await asyncio.sleep(0)
    assert (entered, pace.running) == ([0, 1, 2, 3], 1), "in the order in which they came"
    tasks[4].cancel()
    others, now = 0, QUIET_S - 0.1
    pace.look()
    await asyncio.sleep(0)
    assert pace.running == 1, "others may ask again at any moment"
    now = QUIET_S
    pace.look()
    for _ in range(2):
        await asyncio.sleep(0)
    assert (entered, pace.running) == ([0, 1, 2, 3, 5], 2)
    for event in go:
        event.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert pace.running == 0
