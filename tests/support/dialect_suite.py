"""What every engine does of responses, messages and tokens, as ``engine_suite`` has it for chat."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from server.engine.calls import Answer, Call, Kind, PageOp
from server.engine.engine import Engine
from server.errors import BadRequest, Unavailable
from tests.support.engine_calls import (
    PUBLIC,
    MakeAdapter,
    ask,
    bring_in,
    call,
    given_up,
    meter_of,
    read_in,
    said,
    stage,
    then,
)

TEXT = "Name three colours."
TURN = [{"role": "user", "content": TEXT}]
CHAT = {"messages": TURN, "max_tokens": 5, "temperature": 0}
BODIES: dict[Kind, dict[str, Any]] = {
    "responses": {"input": TEXT, "max_output_tokens": 5, "temperature": 0, "store": False},
    "messages": {"model": "default", "messages": TURN, "max_tokens": 5, "temperature": 0},
}
LIMIT = {"responses": "max_output_tokens", "messages": "max_tokens"}
PREFIX = {"responses": "resp_", "messages": "msg_"}
dialects = pytest.mark.parametrize("kind", BODIES)


def limited(kind: Kind, tokens: int, **changes: Any) -> dict[str, Any]:
    return {**BODIES[kind], LIMIT[kind]: tokens, **changes}


async def begun(engine: Engine, kind: Kind) -> tuple[Call, AsyncIterator[str]]:
    """A stream of which five chunks have been read."""
    made, request = call(engine, kind, limited(kind, 50, stream=True), None)
    answer = await engine.answer(made, request)
    assert answer.stream is not None
    for _ in range(5):
        await anext(answer.stream)
    return made, answer.stream


async def events(answer: Answer) -> list[dict[str, Any]]:
    """The events of a stream, each under its own name."""
    assert answer.stream is not None
    told = []
    async for chunk in answer.stream:
        name, data, *end = chunk.split("\n")
        assert end == ["", ""], chunk
        told.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {told[-1]['type']}"
    return told


def text_of(document: dict[str, Any]) -> str:
    parts = document["output"][0]["content"] if "output" in document else document["content"]
    return "".join(part["text"] for part in parts)


def spoken(told: list[dict[str, Any]]) -> str:
    deltas = [event.get("delta") for event in told if event["type"].endswith("delta")]
    return "".join(delta if isinstance(delta, str) else delta.get("text", "") for delta in deltas if delta)


def usage_of(document: dict[str, Any]) -> tuple[int, int]:
    usage = document["usage"]
    return usage["input_tokens"], usage["output_tokens"]


class DialectSuite:
    @dialects
    async def test_a_document_says_what_chat_says(
        self, engine: Engine, make_adapter: MakeAdapter, kind: Kind
    ) -> None:
        load = await bring_in(engine, make_adapter(0))
        chat, _ = await ask(engine, "chat", CHAT, load)
        made, request = call(engine, kind, BODIES[kind], load)
        body = (await engine.answer(made, request)).body
        assert body is not None
        assert text_of(body) == said(chat.body or {})
        assert (body["model"], body["id"]) == (PUBLIC, PREFIX[kind] + made.id)
        assert usage_of(body) == meter_of(made).usage()
        assert meter_of(made).output == 5
        assert load.name not in json.dumps(body), "the engine's own name leaked"
        assert "salt-of-the-suite" not in json.dumps(body)
        if kind == "responses":
            assert (body["status"], body["store"]) == ("incomplete", False)
        else:
            assert (body["type"], body["role"], body["stop_reason"]) == ("message", "assistant", "max_tokens")

    @dialects
    async def test_a_stream_says_what_the_document_says(
        self, engine: Engine, make_adapter: MakeAdapter, kind: Kind
    ) -> None:
        load = await bring_in(engine, make_adapter(0))
        whole, counted = await ask(engine, kind, BODIES[kind], load)
        made, request = call(engine, kind, {**BODIES[kind], "stream": True}, load)
        told = await events(await engine.answer(made, request))
        assert spoken(told) == text_of(whole.body or {})
        assert meter_of(made).usage() == counted.usage()
        assert load.name not in json.dumps(told)
        types = [event["type"] for event in told]
        if kind == "responses":
            assert types[:2] == ["response.created", "response.in_progress"]
            assert [event["sequence_number"] for event in told] == list(range(len(told)))
            last = told[-1]
            assert last["type"] == "response.completed"
            assert {event["response"]["id"] for event in (told[0], last)} == {f"resp_{made.id}"}
            assert {event["response"]["model"] for event in (told[0], last)} == {PUBLIC}
            assert usage_of(last["response"]) == counted.usage()
        else:
            assert (types[0], types[-2:]) == ("message_start", ["message_delta", "message_stop"])
            assert (told[0]["message"]["id"], told[0]["message"]["model"]) == (f"msg_{made.id}", PUBLIC)
            assert told[-2]["usage"]["output_tokens"] == counted.output
            assert told[-2]["delta"]["stop_reason"] == "max_tokens"

    @dialects
    @pytest.mark.parametrize("stream", [True, False])
    async def test_a_paused_answer_goes_on(
        self, engine: Engine, make_adapter: MakeAdapter, kind: Kind, stream: bool
    ) -> None:
        load = await bring_in(engine, make_adapter(0))
        body = limited(kind, 20, stream=stream)
        wanted, counted = await ask(engine, kind, limited(kind, 20), load)
        made, request = call(engine, kind, body, load)
        assert engine.resumable(request)

        async def read() -> str:
            answer = await engine.answer(made, request)
            return text_of(answer.body) if answer.body is not None else spoken(await events(answer))

        reading = asyncio.create_task(read())
        while meter_of(made).output < 3:
            await asyncio.sleep(0.001)
            engine.poll(made)
        assert await engine.pause(made)
        await engine.page([then("evict", load)])
        load = stage(make_adapter(0), load.name)
        await read_in(engine, load)
        await engine.page([PageOp("activate", load.load_id)])
        await engine.resume(made)
        assert await reading == text_of(wanted.body or {})
        assert meter_of(made).usage() == counted.usage()

    @dialects
    async def test_abort_ends_a_stream(self, engine: Engine, kind: Kind) -> None:
        made, stream = await begun(engine, kind)
        await engine.abort(made)
        async with asyncio.timeout(240):
            rest = [chunk async for chunk in stream]
        assert 0 < meter_of(made).output < 50
        last = json.loads(rest[-1].split("data: ")[1])
        if kind == "responses":
            assert last["response"]["status"] == "cancelled"
        else:
            assert last["type"] == "message_stop"

    @dialects
    async def test_a_stream_that_breaks_says_so_with_a_status(self, engine: Engine, kind: Kind) -> None:
        made, stream = await begun(engine, kind)
        assert await engine.pause(made)
        await engine.give_up(made, "it is gone")
        with pytest.raises(Unavailable, match="it is gone"):
            async for _ in stream:
                pass

    @dialects
    @pytest.mark.parametrize("stream", [False, True])
    async def test_it_is_refused_before_the_first_byte(
        self, engine: Engine, kind: Kind, stream: bool
    ) -> None:
        words = "word " * (engine.max_model_len + 1)
        long = {"input": words} if kind == "responses" else {"messages": [{"role": "user", "content": words}]}
        for changes, said_ in (({"temperature": -1}, "temperature"), (long, "")):
            made, request = call(engine, kind, {**BODIES[kind], **changes, "stream": stream}, None)
            with pytest.raises(BadRequest) as refused:
                await engine.answer(made, request)
            assert said_ in refused.value.message
            assert words not in refused.value.message
            assert meter_of(made).parts == {}

    @pytest.mark.parametrize(
        ("kind", "changes", "param"),
        [
            ("responses", {"input": 5}, "input"),
            ("responses", {"max_output_tokens": "many"}, "max_output_tokens"),
            ("responses", {"text": {"format": {"type": "poem"}}}, "text"),
            ("messages", {"messages": "hello"}, "messages"),
            ("messages", {"messages": [{"role": "wizard", "content": "hi"}]}, "messages"),
            ("messages", {"max_tokens": 0}, "max_tokens"),
            ("messages", {"max_tokens": None}, "max_tokens"),
        ],
    )
    async def test_a_wrong_field_is_named(
        self, engine: Engine, kind: Kind, changes: dict[str, Any], param: str
    ) -> None:
        with pytest.raises(BadRequest) as refused:
            engine.parse(kind, {**BODIES[kind], **changes})
        assert (refused.value.param or "").split(".")[0] == param
        assert len(refused.value.message) < 500

    @dialects
    async def test_a_document_that_is_given_up_is_unavailable(self, engine: Engine, kind: Kind) -> None:
        made, request = call(engine, kind, limited(kind, 50), None)
        reading = asyncio.create_task(engine.answer(made, request))
        await given_up(engine, made, reading)

    # --- tokens ----------------------------------------------------------------------------------

    async def test_tokens_there_and_back(self, engine: Engine) -> None:
        asked = engine.parse("tokenize", {"prompt": "Red, green and blue", "return_token_strs": True})
        told = await engine.tokens("tokenize", asked)
        assert told["count"] == len(told["tokens"]) == len(told["token_strs"]) > 3
        assert told["max_model_len"] == engine.max_model_len
        back = await engine.tokens("detokenize", engine.parse("detokenize", {"tokens": told["tokens"]}))
        assert back == {"prompt": "Red, green and blue"}

    async def test_a_chats_tokens_are_those_that_are_counted(self, engine: Engine) -> None:
        chat = await engine.tokens("tokenize", engine.parse("tokenize", {"messages": TURN}))
        counted = await engine.tokens(
            "count_tokens", engine.parse("count_tokens", {"model": "default", "messages": TURN})
        )
        _, meter = await ask(engine, "messages", BODIES["messages"], None)
        assert chat["count"] == counted["input_tokens"] == meter.prompt

    @pytest.mark.parametrize("token", [10**6, 2**31, 2**32, 2**63 - 1])
    async def test_a_token_that_is_none_is_refused(self, engine: Engine, token: int) -> None:
        request = engine.parse("detokenize", {"tokens": [1, token]})
        with pytest.raises(BadRequest) as refused:
            await engine.tokens("detokenize", request)
        assert refused.value.param == "tokens"

    @pytest.mark.parametrize("tokens", ["1", [-1], [2**63], [1.5], ["a"], None])
    async def test_tokens_that_are_no_list_of_numbers(self, engine: Engine, tokens: Any) -> None:
        with pytest.raises(BadRequest) as refused:
            engine.parse("detokenize", {"tokens": tokens})
        assert (refused.value.param or "").startswith("tokens")
