"""Schemas, patterns and grammars on every surface: refused where they cost too much, and nobody notices."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.engine.reference import ATTENTION, Reference, Spec
from tests.support.bad_requests import CHAT, MESSAGES, RESPONSES, TURN
from tests.support.site import Site, bearer

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

COLOUR = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


def endless(number: int) -> dict[str, Any]:
    return {"type": "string", "pattern": f"^((c|d|.){{1,49{number}}}){{1,500}}$"}


def tool(schema: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "paint", "parameters": schema, **fields}}


def asked(url: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A body for ``url`` that wants an answer by ``schema``."""
    if url == RESPONSES:
        made = {"type": "json_schema", "name": "x", "schema": schema}
        return {"input": "A colour?", "max_output_tokens": 40, "temperature": 0, "text": {"format": made}}
    body: dict[str, Any] = {"messages": TURN, "max_tokens": 40, "temperature": 0}
    if url == MESSAGES:
        return body | {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    made = {"name": "x", "schema": schema}
    return body | {"response_format": {"type": "json_schema", "json_schema": made}}


def forced(schema: dict[str, Any]) -> dict[str, Any]:
    """A chat that must call a tool."""
    choice = {"type": "function", "function": {"name": "paint"}}
    return {"messages": TURN, "max_tokens": 40, "tools": [tool(schema)], "tool_choice": choice}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def key(site: Site, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("structured")
    reference.make(Spec(seed=951, rank=8, targets=ATTENTION), folder)
    return await site.tenant("structured", {"a": folder})


async def ask(site: Site, key: str, url: str, body: dict[str, Any]) -> httpx.Response:
    return await site.http.post(url, json=body, headers=bearer(key))


async def test_a_schema_is_followed_on_every_surface(site: Site, key: str) -> None:
    chat = await ask(site, key, CHAT, asked(CHAT, COLOUR))
    responses = await ask(site, key, RESPONSES, asked(RESPONSES, COLOUR))
    messages = await ask(site, key, MESSAGES, asked(MESSAGES, COLOUR))
    texts = [
        chat.json()["choices"][0]["message"]["content"],
        responses.json()["output"][0]["content"][0]["text"],
        messages.json()["content"][0]["text"],
    ]
    assert all(json.loads(text)["colour"] in ("red", "green") for text in texts), texts
    called = await ask(site, key, CHAT, forced(COLOUR))
    assert called.status_code == 200, called.text


@pytest.mark.parametrize("url", [CHAT, RESPONSES, MESSAGES])
async def test_what_costs_too_much_is_refused_on_every_surface(site: Site, key: str, url: str) -> None:
    for number, stream in enumerate((False, True)):
        # It would be compiled for longer than a test may take.
        answer = await ask(site, key, url, asked(url, endless(number)) | {"stream": stream})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["code"] == "schema_too_complex", answer.text


async def test_tools_too(site: Site, key: str) -> None:
    schema = {"type": "object", "properties": {"a": endless(5)}}
    strict = {"messages": TURN, "max_tokens": 8, "tools": [tool(schema, strict=True)]}
    for body in (forced(schema), strict):
        answer = await ask(site, key, CHAT, body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["code"] == "schema_too_complex"


WRONG = [
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"type": "string", "pattern": r"^\p{L}+$"},
    {"type": "string", "pattern": r"(a)\1"},
    {"type": "array", "uniqueItems": True, "items": {"type": "integer"}},
    {"type": "object", "properties": {"a": {"$ref": "#/$defs/missing"}}, "required": ["a"]},
]


async def test_what_is_wrong_is_a_400(site: Site, key: str) -> None:
    for url in (CHAT, RESPONSES, MESSAGES):
        for schema in WRONG:
            answer = await ask(site, key, url, asked(url, schema))
            assert answer.status_code == 400, (url, schema, answer.text)
            assert answer.json()["error"]["code"] == "invalid_request", answer.text


async def test_nobody_else_waits_for_them(
    site: Site, key: str, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one customer's two are compiled at a time, and for so long that none of them ends by itself."""
    grammars = site.services.engine._grammars
    monkeypatch.setattr(grammars, "_seconds", 600.0)
    reference.make(Spec(seed=952, rank=8, targets=ATTENTION), tmp_path)
    other = await site.tenant("bystander-of-schemas", {"b": tmp_path})
    attack = [
        asyncio.create_task(ask(site, key, CHAT, asked(CHAT, endless(number)))) for number in range(6, 12)
    ]
    async with asyncio.timeout(240):
        while max(grammars._waiting.values(), default=0) < len(attack):
            await asyncio.sleep(0.05)
    answer = await ask(site, other, CHAT, asked(CHAT, COLOUR))
    assert answer.status_code == 200
    assert not attack[-1].done()
    for task in attack:
        task.cancel()
    await asyncio.gather(*attack, return_exceptions=True)
    async with asyncio.timeout(240):  # whoever leaves ends what is compiled for it
        while grammars._under_way:
            await asyncio.sleep(0.05)
