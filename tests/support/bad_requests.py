"""More than forty wrong requests, each with its status and code, for the fake engine and the real one.

What only a raw connection can do wrong (heads without an end, bodies that trickle, readers that do not read)
is in ``tests.service.http.test_bad_requests``.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.support.site import Site, bearer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
TURN = [{"role": "user", "content": "Hello"}]
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"messages": TURN, "max_tokens": 4},
    TEXT: {"prompt": "Hello", "max_tokens": 4},
    RESPONSES: {"input": "Hello", "max_output_tokens": 4},
    MESSAGES: {"messages": TURN, "max_tokens": 4},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [1]},
}


@dataclass(frozen=True)
class Bad:
    """``changes`` to a good body, or ``content`` instead of one. ``real``: not for the fake engine."""

    name: str
    url: str
    changes: dict[str, Any] = field(default_factory=dict)
    content: bytes | None = None
    status: int = 400
    code: str = "invalid_request"
    headers: dict[str, str] = field(default_factory=dict)
    real: bool = False

    def sent(self) -> bytes:
        return (
            self.content if self.content is not None else json.dumps(GOOD[self.url] | self.changes).encode()
        )


def _schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def _nested(depth: int, inside: str) -> bytes:
    return b'{"messages": ' + b"[" * depth + inside.encode() + b"]" * depth + b"}"


def _deep_schema(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


INVALID_JSON: dict[str, Any] = {"code": "invalid_json"}
ZIPPED: dict[str, Any] = {
    "status": 415,
    "code": "unsupported_encoding",
    "headers": {"Content-Encoding": "gzip"},
}
LARGE: dict[str, Any] = {"status": 413, "code": "body_too_large"}
REDOS = {"type": "string", "pattern": "^(a|a)*(b|b)*((c+)+)+\\1$"}

_FUNCTION: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
_ALLOWED: dict[str, Any] = {"mode": "auto", "tools": 5}

BAD: list[Bad] = [
    # wrong types
    Bad("messages that are a string", CHAT, {"messages": "hi"}),
    Bad("no messages", CHAT, {"messages": []}, real=True),
    Bad("a message that is a number", CHAT, {"messages": [5]}),
    Bad("a role that is none", CHAT, {"messages": [{"role": 7, "content": "hi"}]}),
    Bad("max_tokens in words", CHAT, {"max_tokens": "many"}),
    Bad("a negative max_tokens", CHAT, {"max_tokens": -5}),
    Bad("temperature as a list", CHAT, {"temperature": [1]}),
    Bad("a temperature below zero", CHAT, {"temperature": -0.5}),
    Bad("top_p above one", CHAT, {"top_p": 1.5}),
    Bad("stop as an object", CHAT, {"stop": {"a": 1}}),
    Bad("tools that are none", CHAT, {"tools": [{"type": "function"}]}),
    Bad("a tool choice without tools", CHAT, {"tool_choice": "required"}),
    Bad("a model that is a list", CHAT, {"model": ["a"]}),
    Bad("an unknown model", CHAT, {"model": "x" * 3000}, status=404, code="model_not_found"),
    Bad("an unknown field", CHAT, {"guided_spell": "(a+)+$"}, code="unknown_field"),
    Bad("a stop token beyond the vocabulary", CHAT, {"stop_token_ids": [10**7], "min_tokens": 2}),
    Bad("an allowed token below zero", CHAT, {"allowed_token_ids": [-1]}),
    Bad("more allowed tokens than there is room for", CHAT, {"allowed_token_ids": [1] * 1025}),
    Bad("more stop tokens than can wait", CHAT, {"stop_token_ids": [1] * 128, "min_tokens": 1}),
    Bad("a constraint that is none", CHAT, {"structured_outputs": {"grammar": "root ::= ("}}, real=True),
    Bad("a template in a request", CHAT, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}),
    Bad(
        "a choice among tools without names",
        CHAT,
        {"tools": [{"type": "function", "function": {}}], "tool_choice": _FUNCTION},
    ),
    Bad("a tool whose name is a list", CHAT, {"tools": [{"type": "function", "function": {"name": [1]}}]}),
    Bad(
        "allowed tools that are a number",
        CHAT,
        {"tools": [_FUNCTION], "tool_choice": {"type": "allowed_tools", "allowed_tools": _ALLOWED}},
    ),
    Bad("a prompt that is an object", TEXT, {"prompt": {"a": 1}}),
    Bad("a prompt of nothing", TEXT, {"prompt": []}),
    Bad("input that is a number", RESPONSES, {"input": 5}),
    Bad("an input item that is none", RESPONSES, {"input": [{"type": "spell"}]}),
    Bad("blocks that are none", MESSAGES, {"messages": [{"role": "user", "content": [{"type": "spell"}]}]}),
    # huge numbers
    Bad("a huge n", CHAT, {"n": 10**9}),
    Bad("n beyond 64 bits", CHAT, {"n": 10**30}),
    Bad("huge logprobs", TEXT, {"logprobs": 10**6}, real=True),
    Bad("huge top_logprobs", CHAT, {"logprobs": True, "top_logprobs": 10**6}, real=True),
    Bad("a seed beyond 64 bits", CHAT, {"seed": 10**30}),
    Bad("an endless number", CHAT, content=b'{"seed": ' + b"9" * 10_000 + b"}", **INVALID_JSON),
    Bad("thousands of stop strings", CHAT, {"stop": ["x" * 50] * 20_000}),
    Bad("a biased token that is none", CHAT, {"logit_bias": {"99999999": 1}}, real=True),
    Bad("a bias for a word", CHAT, {"logit_bias": {"word": 1}}),
    # tokens that are none
    Bad("a token out of the vocabulary", TEXT, {"prompt": [1, 10**7]}, real=True),
    Bad("a negative token", TEXT, {"prompt": [-1]}, real=True),
    Bad("a token beyond 64 bits", TEXT, {"prompt": [2**64]}, **INVALID_JSON),
    Bad("tokens to text beyond the vocabulary", "/detokenize", {"tokens": [2**40]}),
    Bad("a prompt that is too long", TEXT, {"prompt": "word " * 5000}, code="context_length_exceeded"),
    # structured output
    Bad("a pattern that backtracks", CHAT, _schema(REDOS), real=True),
    Bad("a pattern that is none", CHAT, _schema({"type": "string", "pattern": "(("}), real=True),
    Bad("a schema of no type", CHAT, _schema({"type": "spell"}), real=True),
    Bad("a schema that is a list", CHAT, _schema([1, 2])),
    Bad("another response format", CHAT, {"response_format": {"type": "regex", "regex": "(a+)+$"}}),
    Bad("a response format of no name", CHAT, {"response_format": {"type": [{}]}}),
    # bytes
    Bad("deep JSON", CHAT, content=_nested(100_000, "1"), **INVALID_JSON),
    Bad("JSON of a depth that parses", CHAT, content=_nested(500, "1"), **INVALID_JSON),
    Bad("JSON of a depth that is let in", CHAT, content=_nested(80, "1")),
    Bad("invalid UTF-8", CHAT, content=b'{"messages": "\xff\xfe"}', **INVALID_JSON),
    Bad("a gzip bomb", CHAT, content=gzip.compress(bytes(50 << 20)), **ZIPPED),
    Bad("gzip without saying so", CHAT, content=gzip.compress(b"{}"), **INVALID_JSON),
    Bad("a body of 100 MB", CHAT, content=bytes(100 << 20), **LARGE),
    Bad("a multipart body", CHAT, content=b"--x\r\n\r\n--x--", **INVALID_JSON),
]  # fmt: skip


async def ask(site: Site, key: str, bad: Bad) -> httpx.Response:
    headers = {**bearer(key), "Content-Type": "application/json", **bad.headers}
    return await site.http.post(bad.url, content=bad.sent(), headers=headers)


def check(bad: Bad, answer: httpx.Response) -> None:
    """It is what ``bad`` says, and repeats no more than a little of what was sent."""
    assert answer.status_code == bad.status, (bad.name, answer.status_code, answer.text[:300])
    error = answer.json()["error"]
    assert error["code"] == bad.code, (bad.name, error)
    assert error["message"], bad.name
    assert len(answer.content) < 3000, bad.name


async def bystander(site: Site, key: str, tokens: int) -> str:
    """A stream that goes on meanwhile; its text, if it ends as it should."""
    body = {
        "messages": TURN,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "logit_bias": {"2": -100},
    }
    text, finish = "", None
    async for told in _events(site, key, body):
        for choice in told["choices"]:
            text += choice["delta"].get("content") or ""
            finish = choice["finish_reason"] or finish
    assert finish == "length"
    return text


async def _events(site: Site, key: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async with site.http.stream("POST", CHAT, json=body, headers=bearer(key)) as got:
        assert got.status_code == 200
        async for line in got.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


async def ask_all(site: Site, key: str, *, tokens: int, bads: list[Bad]) -> None:
    """All of ``bads`` beside streams, one after the other and then at once; nothing breaks."""
    alone = await bystander(site, key, tokens)
    beside = asyncio.create_task(bystander(site, key, tokens))
    for bad in bads:
        check(bad, await ask(site, key, bad))
        if beside.done():
            assert await beside == alone
            beside = asyncio.create_task(bystander(site, key, tokens))
    small = [bad for bad in bads if len(bad.sent()) < 1 << 20]
    for bad, answer in zip(small, await asyncio.gather(*(ask(site, key, bad) for bad in small)), strict=True):
        check(bad, answer)
    assert await beside == alone
    site.services.dispatcher._plan.check()
    assert site.services.dispatcher.open_leases() == []
