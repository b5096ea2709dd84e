"""An answer of a million tokens: others have their turns while it is written."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import BaseModel
from starlette.types import Message

from server.engine.serving import shallow
from server.http.long_answers import LongAnswer
from server.inference import long_documents
from server.inference.long_documents import SLICE, written
from tests.service.http.test_api import error
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.site import bearer
from tests.support.tiny import fake_site


async def test_others_have_turns_while_a_long_list_is_written() -> None:
    document = {
        "tokens": list(range(10 * SLICE + 1)),
        "count": 3,
        'a "b"': ["\u00e9", None],
        "none": None,
        "no": [],
    }
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(others())
    parts = await written(document)
    beside.cancel()
    assert json.loads(b"".join(parts)) == document
    assert turns >= 10


async def test_a_client_that_takes_nothing_is_left() -> None:
    sent: list[bytes] = []

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            if sent:
                await asyncio.Event().wait()
            sent.append(message["body"])

    async def receive() -> Message:
        raise AssertionError("there is nothing to be received")

    async with asyncio.timeout(60):
        await LongAnswer([b"[1,", b"2]"], 0.1)({"type": "http"}, receive, send)
    assert sent == [b"[1,"]


async def test_embeddings_as_numbers_are_not_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = 0

    def dumped(value: object) -> str:
        nonlocal longest
        text = json.dumps(value, separators=(",", ":"))
        longest = max(longest, len(text))
        return text

    monkeypatch.setattr(long_documents, "dumped", dumped)
    engine = FakeEngine(replace(tiny.base(), pooling=True), times=Times(step=0.001))
    async with fake_site(tmp_path, engine) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        body = {"model": "a", "input": [f"text {i}" for i in range(400)]}
        answer = await site.http.post("/v1/embeddings", json=body, headers=bearer(key))
    assert [one["index"] for one in answer.json()["data"]] == list(range(400))
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert 0 < longest < len(answer.content) / 4


def test_long_lists_of_an_answer_are_not_copied() -> None:
    class Inner(BaseModel):
        a: int | None = None
        b: int = 1

    class Told(BaseModel):
        tokens: list[int]
        inner: Inner
        strings: list[str] | None = None

    told = Told(tokens=[1, 2], inner=Inner())
    assert shallow(told) == told.model_dump(exclude_none=True)
    assert shallow(told)["tokens"] is told.tokens


async def test_tokens_are_told_as_texts_of_a_bounded_text_alone(tmp_path: Path) -> None:
    async with fake_site(tmp_path) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        long, turns = "a " * 66_000, [{"role": "user", "content": [{"type": "text", "text": "a " * 66_000}]}]
        for asked in ({"prompt": long}, {"messages": turns}):
            body = {**asked, "return_token_strs": True}
            answer = await site.http.post("/tokenize", json=body, headers=bearer(key))
            error(answer, 400, "invalid_request", "return_token_strs")
            whole = await site.http.post("/tokenize", json=asked, headers=bearer(key))
            assert whole.status_code == 200
            assert whole.headers["content-type"] == "application/json"
            assert whole.json()["count"] == len(whole.json()["tokens"]) >= 66_000
        named = {"prompt": "a b", "return_token_strs": True}
        strings = (await site.http.post("/tokenize", json=named, headers=bearer(key))).json()["token_strs"]
        assert len(strings) == 3
