"""An answer of a million tokens: others have their turns while it is written."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from pydantic import BaseModel

from server.engine.serving import shallow
from server.inference.long_documents import SLICE, written
from tests.service.http.test_api import error
from tests.support import tiny
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
