"""What every engine does for an answer that another process hands on: the real one and the fake."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from server.engine.calls import Answer, Call, Kind
from server.engine.engine import Engine
from server.errors import Unavailable
from tests.support.engine_calls import (
    QUESTION,
    STREAMED,
    TEXT,
    MakeAdapter,
    bring_in,
    call,
    meter_of,
    same,
    whole,
)

CHAT = {**QUESTION, "max_tokens": 14, **STREAMED, "logprobs": True, "top_logprobs": 2}
COMPLETION = {**TEXT, "max_tokens": 14, **STREAMED, "logprobs": 1}
asked = pytest.mark.parametrize(
    ("kind", "body"), [("chat", CHAT), ("completion", COMPLETION)], ids=["chat", "completion"]
)


@dataclass
class Recorder:
    """A relay that keeps what it is told: by frame the tokens so far, and the chunks that they came to."""

    said: Sequence[int] = ()
    cached: int = 0
    movable: bool = False
    frames: list[tuple[list[int], str]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    waiting: str = ""

    def begins(self, movable: bool) -> None:
        self.movable = movable

    def produced(self, token_ids: Sequence[int], prompt_tokens: int, cached_tokens: int) -> None:
        self.tokens += token_ids

    async def flush(self) -> None:
        if self.waiting:
            self.frames.append((list(self.tokens), self.waiting))
            self.waiting = ""


async def relayed(engine: Engine, made: Call, request: Any, said: Sequence[int] = ()) -> Recorder:
    """The whole answer, in frames."""
    made.relay = recorder = Recorder(said)
    answer = await engine.answer(made, request)
    assert answer.stream is not None
    async for chunk in answer.stream:
        recorder.waiting += chunk
    recorder.frames.append((list(recorder.tokens), recorder.waiting))
    return recorder


async def told(frames: Sequence[tuple[list[int], str]]) -> dict[str, Any]:
    """All that a client can tell of ``frames``; see ``engine_calls.whole``."""

    async def chunks() -> AsyncIterator[str]:
        for chunk in "".join(text for _, text in frames).split("\n\n")[:-1]:
            yield f"{chunk}\n\n"

    return await whole(Answer(stream=chunks()))


class RelaySuite:
    @asked
    async def test_an_answer_goes_on_at_another_engine_wherever_it_broke_off(
        self, engine: Engine, make_adapter: MakeAdapter, kind: Kind, body: dict[str, Any]
    ) -> None:
        load = await bring_in(engine, make_adapter(0))
        made, request = call(engine, kind, body, load)
        first = await relayed(engine, made, request)
        assert first.movable
        usage = meter_of(made).usage()

        async def broken_off(at: int) -> None:
            before = first.frames[:at]
            tokens = before[-1][0]
            if not tokens:
                return
            made, request = call(engine, kind, body, load)
            second = await relayed(engine, made, request, tokens)
            assert second.movable
            assert second.tokens == first.tokens
            after = [one for one in second.frames if len(one[0]) > len(tokens)]
            assert len(after) < len(second.frames), "what was said already is a frame of its own"
            assert same(await told([*before, *after]), await told(first.frames))
            assert meter_of(made).usage() == usage

        await asyncio.gather(*map(broken_off, range(1, len(first.frames))))

    async def test_a_stop_string_may_straddle_the_break(self, engine: Engine) -> None:
        made, request = call(engine, "completion", COMPLETION, None)
        text = (await told((await relayed(engine, made, request)).frames))["text"]
        stopping = {**COMPLETION, "stop": [text[len(text) // 3 : 2 * len(text) // 3]]}
        made, request = call(engine, "completion", stopping, None)
        first = await relayed(engine, made, request)

        async def broken_off(at: int) -> None:
            before = first.frames[:at]
            made, request = call(engine, "completion", stopping, None)
            second = await relayed(engine, made, request, before[-1][0])
            after = [one for one in second.frames if len(one[0]) > len(before[-1][0])]
            assert same(await told([*before, *after]), await told(first.frames))

        await asyncio.gather(*map(broken_off, range(1, len(first.frames))))

    async def test_what_could_not_go_on_says_so_and_does_not(self, engine: Engine) -> None:
        body = {**QUESTION, "max_tokens": 6, **STREAMED, "presence_penalty": 0.5}
        made, request = call(engine, "chat", body, None)
        assert not (await relayed(engine, made, request)).movable
        made, request = call(engine, "chat", body, None)
        with pytest.raises(Unavailable) as refused:
            await relayed(engine, made, request, [1, 2])
        assert refused.value.code == "replica_lost"
