"""What every engine does of an answer that is paused; a part of ``EngineSuite``."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from server.engine.calls import Kind
from server.engine.engine import Engine
from tests.support.engine_calls import (
    LOGPROBS,
    QUESTION,
    STREAMED,
    TEXT,
    MakeAdapter,
    ask,
    bring_in,
    call,
    given_up,
    kinds,
    meter_of,
    read_all,
    read_in,
    said,
    same,
    stage,
    then,
    until,
    whole,
)


class PauseSuite:
    @kinds
    async def test_a_paused_answer_goes_on_as_if_nothing_had_happened(
        self, engine: Engine, make_adapter: MakeAdapter, kind: Kind, body: dict[str, Any]
    ) -> None:
        """Streamed or not, paused twice, after so many tokens each; its adapter leaves memory meanwhile."""
        long = {**body, "max_tokens": 24, **LOGPROBS[kind]}
        load = await bring_in(engine, make_adapter(0))
        asked = [await ask(engine, kind, {**long, **how}, load) for how in ({}, STREAMED)]
        wanted = [(await whole(answer), meter.usage()) for answer, meter in asked]
        await engine.page([then("evict", load)])
        paging = asyncio.Lock()  # a load's end is told once, to whoever asks

        async def paused(streamed: bool, after: int) -> None:
            async with paging:
                mine = await bring_in(engine, make_adapter(0))
            made, request = call(engine, kind, {**long, **(STREAMED if streamed else {})}, mine)
            reading = asyncio.create_task(read_all(engine, made, request))
            for pauses in (1, 2):
                await until(engine, made, pauses * after)
                if not await engine.pause(made):
                    continue  # it has not begun, or it has ended, before
                async with paging:
                    await engine.page([then("evict", mine)])
                await asyncio.sleep(0.05)
                produced = meter_of(made).output
                await asyncio.sleep(0.05)
                engine.poll(made)
                assert meter_of(made).output == produced, "it runs while it is paused"
                assert not reading.done()
                mine = stage(make_adapter(0), mine.name)
                async with paging:
                    await read_in(engine, mine)
                    await engine.page([then("activate", mine)])
                await engine.resume(made)
            expected, usage = wanted[streamed]
            assert same(await reading, expected)
            assert meter_of(made).usage() == usage

        await asyncio.gather(*(paused(how, after) for how in (False, True) for after in (0, 1, 7)))

    async def test_a_stop_string_may_straddle_the_pause(self, engine: Engine) -> None:
        body = {**TEXT, "max_tokens": 12}
        text = said((await ask(engine, "completion", body, None))[0].body or {})
        stop = text[len(text) // 3 : 2 * len(text) // 3]
        stopping = {**body, "stop": [stop], **STREAMED}
        answer, counted = await ask(engine, "completion", stopping, None)
        wanted = await whole(answer)

        async def paused(cut: int) -> None:
            made, request = call(engine, "completion", stopping, None)
            reading = asyncio.create_task(read_all(engine, made, request))
            while meter_of(made).output < cut and not reading.done():
                await asyncio.sleep(0.001)
            if await engine.pause(made):
                await engine.resume(made)
            assert same(await reading, wanted)
            assert meter_of(made).usage() == counted.usage()

        await asyncio.gather(*map(paused, range(1, 12)))

    @pytest.mark.parametrize(
        "changes",
        [
            {"n": 2, "temperature": 1},
            {"seed": 7, "temperature": 1},
            {"presence_penalty": 0.5},
            {"frequency_penalty": 0.5},
            {"response_format": {"type": "json_object"}},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    async def test_what_would_not_go_on_the_same_is_not_paused(
        self, engine: Engine, changes: dict[str, Any]
    ) -> None:
        made, request = call(engine, "chat", {**QUESTION, "max_tokens": 20, **changes}, None)
        assert not engine.resumable(request)
        reading = asyncio.create_task(read_all(engine, made, request))
        while meter_of(made).output == 0:
            await asyncio.sleep(0.001)
            engine.poll(made)
        async with asyncio.timeout(240):
            assert not await engine.pause(made)
        await reading

    async def test_a_paused_answer_can_be_aborted(self, engine: Engine) -> None:
        made, request = call(engine, "chat", {**QUESTION, "max_tokens": 50, "stream": True}, None)
        assert engine.resumable(request)
        answer = await engine.answer(made, request)
        assert answer.stream is not None
        for _ in range(3):
            await anext(answer.stream)
        assert await engine.pause(made)
        await engine.abort(made)
        async with asyncio.timeout(240):
            rest = [chunk async for chunk in answer.stream]
        assert rest[-1] == "data: [DONE]\n\n"
        assert '"finish_reason":"abort"' in "".join(rest).replace(" ", "")
        await engine.resume(made)  # too late; nothing happens
        assert 0 < meter_of(made).output < 50

    @pytest.mark.parametrize("stream", [True, False])
    async def test_a_paused_answer_can_be_given_up(self, engine: Engine, stream: bool) -> None:
        made, request = call(engine, "chat", {**QUESTION, "max_tokens": 50, "stream": stream}, None)
        reading = asyncio.create_task(read_all(engine, made, request))
        await given_up(engine, made, reading)
