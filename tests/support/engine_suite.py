"""What every engine does, the real one and the fake: the fake cannot lie about what is tested here.

A module that runs it subclasses ``EngineSuite`` and has two fixtures: ``engine``, which holds no adapter,
and ``make_adapter``, which gives the folder of adapter ``n``.
"""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from server.engine.calls import Kind, PageOp, StageResult
from server.engine.engine import Engine
from server.errors import BadRequest
from tests.support.engine_calls import (
    PUBLIC,
    QUESTION,
    STREAMED,
    TEXT,
    MakeAdapter,
    ask,
    bring_in,
    call,
    events,
    kinds,
    meter_of,
    new_ids,
    read_in,
    said,
    spoken,
    stage,
    then,
)
from tests.support.pause_suite import PauseSuite


class EngineSuite(PauseSuite):
    # --- what it is ------------------------------------------------------------------------------

    async def test_it_describes_itself(self, engine: Engine) -> None:
        await engine.check()
        assert engine.base.name
        assert engine.base.modules
        assert all(shape.in_features > 0 < shape.out_features for shape in engine.base.modules.values())
        assert engine.max_running >= 2
        assert engine.max_model_len >= 64
        assert engine.lora_dtype in ("float32", "float16", "bfloat16")
        assert engine.max_logprobs >= 1
        assert engine.version

    # --- paging ----------------------------------------------------------------------------------

    async def test_a_version_goes_up_and_down_the_tiers(
        self, engine: Engine, make_adapter: MakeAdapter
    ) -> None:
        empty = await engine.report()
        assert (empty.host, empty.staging) == (frozenset(), frozenset())
        load = stage(make_adapter(0))
        staged = (await read_in(engine, load))[load.load_id]
        assert (staged.error, staged.size_bytes > 0, staged.seconds >= 0) == (None, True, True)
        for verb, on_host, in_slot in (
            ("activate", True, True),
            ("deactivate", True, False),
            ("activate", True, True),
            ("evict", False, False),
        ):
            (result,) = (await engine.page([then(verb, load)])).results
            assert result.error is None
            report_ = await engine.report()
            assert (load.load_id in report_.host) is on_host, verb
            assert (load.load_id in report_.slots) is in_slot, verb
        assert (await engine.page([])).staged == ()
        assert (await engine.report()).slots == empty.slots

    async def test_operations_are_carried_out_in_order(
        self, engine: Engine, make_adapter: MakeAdapter
    ) -> None:
        first, second = stage(make_adapter(0)), stage(make_adapter(1))
        await read_in(engine, first, second)
        report = await engine.page(
            [then("activate", first), then("evict", first), then("activate", first), then("activate", second)]
        )
        assert [result.error is None for result in report.results] == [True, True, False, True]
        held = await engine.report()
        assert held.host == {second.load_id}
        assert [load for load in held.slots if load is not None] == [second.load_id]

    async def test_what_is_not_staged_cannot_be_activated(
        self, engine: Engine, make_adapter: MakeAdapter
    ) -> None:
        before = await engine.report()
        (result,) = (await engine.page([PageOp("activate", next(new_ids))])).results
        assert result.error is not None
        assert await engine.report() == before

    async def test_there_are_only_so_many_slots(self, engine: Engine, make_adapter: MakeAdapter) -> None:
        slots = len((await engine.report()).slots)
        loads = [stage(make_adapter(i % 2)) for i in range(slots + 1)]
        await read_in(engine, *loads)
        results = (await engine.page([then("activate", load) for load in loads])).results
        assert [result.error is None for result in results] == [True] * slots + [False]
        held = await engine.report()
        assert held.host == {load.load_id for load in loads}
        assert set(held.slots) == {load.load_id for load in loads[:-1]}
        freed, last = loads[0], loads[-1]
        results = (await engine.page([then("deactivate", freed), then("activate", last)])).results
        assert [result.error for result in results] == [None, None]
        assert set((await engine.report()).slots) == {load.load_id for load in loads[1:]}

    async def test_host_memory_takes_only_so_many(self, engine: Engine, make_adapter: MakeAdapter) -> None:
        results: list[StageResult] = []
        while not results or results[-1].error is None:
            load = stage(make_adapter(0))
            results.append((await read_in(engine, load))[load.load_id])
            assert len(results) < 200, "host memory has no bound"
        assert len((await engine.report()).host) == len(results) - 1
        (result,) = (await engine.page([PageOp("activate", results[-1].load_id)])).results
        assert result.error is not None, "the id of a failed load is burnt"

    async def test_activating_again_takes_no_second_slot(
        self, engine: Engine, make_adapter: MakeAdapter
    ) -> None:
        load = await bring_in(engine, make_adapter(0))
        (again,) = (await engine.page([then("activate", load)])).results
        assert again.error is None
        assert [i for i in (await engine.report()).slots if i is not None] == [load.load_id]

    async def test_evicted_while_it_is_staged_it_never_arrives(
        self, engine: Engine, make_adapter: MakeAdapter
    ) -> None:
        gone, kept = stage(make_adapter(0)), stage(make_adapter(1))
        staged = await read_in(engine, gone, kept, and_then=(then("evict", gone),))
        async with asyncio.timeout(240):
            while (await engine.report()).staging:
                staged |= {r.load_id: r for r in (await engine.page([])).staged}
        assert gone.load_id not in staged
        assert (await engine.report()).host == {kept.load_id}

    @pytest.mark.parametrize("what", ["no folder", "no weights", "spoilt config", "spoilt weights"])
    async def test_what_cannot_be_read_fails_alone(
        self, engine: Engine, make_adapter: MakeAdapter, tmp_path: Path, what: str
    ) -> None:
        broken = tmp_path / "broken"
        if what != "no folder":
            broken.mkdir()
            (broken / CONFIG_FILE).write_bytes((make_adapter(0) / CONFIG_FILE).read_bytes())
            (broken / WEIGHTS_FILE).write_bytes((make_adapter(0) / WEIGHTS_FILE).read_bytes())
        if what == "no weights":
            (broken / WEIGHTS_FILE).unlink()
        elif what == "spoilt config":
            (broken / CONFIG_FILE).write_text("{")
        elif what == "spoilt weights":
            (broken / WEIGHTS_FILE).write_bytes(b"\xff" * 64)
        bad, good = stage(broken), stage(make_adapter(1))
        staged = await read_in(engine, bad, good)
        assert staged[bad.load_id].error
        assert staged[good.load_id].error is None
        (result,) = (await engine.page([then("activate", bad)])).results
        assert result.error is not None, "the id of a failed load is burnt"
        assert (await engine.report()).host == {good.load_id}

    async def test_taking_out_what_is_not_in_changes_nothing(
        self, engine: Engine, make_adapter: MakeAdapter
    ) -> None:
        load = await bring_in(engine, make_adapter(0))
        before = await engine.report()
        unknown = next(new_ids)
        results = (await engine.page([PageOp("deactivate", unknown), PageOp("evict", unknown)])).results
        assert [result.error for result in results] == [None, None]
        assert await engine.report() == before
        assert load.load_id in before.slots

    # --- answers ---------------------------------------------------------------------------------

    @kinds
    async def test_a_document(
        self, engine: Engine, make_adapter: MakeAdapter, kind: Kind, body: dict[str, Any]
    ) -> None:
        load = await bring_in(engine, make_adapter(0))
        answer, meter = await ask(engine, kind, body, load)
        assert answer.stream is None
        assert answer.body is not None
        assert answer.body["object"] == ("chat.completion" if kind == "chat" else "text_completion")
        assert answer.body["model"] == PUBLIC
        assert [choice["finish_reason"] for choice in answer.body["choices"]] == ["length"]
        usage = answer.body["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == meter.usage()
        assert usage["completion_tokens"] == 5
        assert load.name not in json.dumps(answer.body), "the engine's own name leaked"

    @kinds
    async def test_a_stream_says_the_same_and_counts_the_same(
        self, engine: Engine, make_adapter: MakeAdapter, kind: Kind, body: dict[str, Any]
    ) -> None:
        load = await bring_in(engine, make_adapter(0))
        whole, counted = await ask(engine, kind, body, load)
        answer, meter = await ask(engine, kind, {**body, **STREAMED}, load)
        assert answer.body is None
        chunks = await events(answer)
        assert whole.body is not None
        assert spoken(chunks) == said(whole.body)
        assert {chunk["model"] for chunk in chunks} == {PUBLIC}
        reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c.get("finish_reason")]
        assert reasons == meter.reasons == counted.reasons == ["length"]
        assert chunks[-1]["choices"] == []
        usage = chunks[-1]["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == meter.usage() == counted.usage()

    async def test_without_stream_options_no_usage_is_sent(self, engine: Engine) -> None:
        answer, meter = await ask(engine, "chat", {**QUESTION, "stream": True}, None)
        assert all(chunk.get("usage") is None for chunk in await events(answer))
        assert meter.output == 5

    async def test_each_adapter_answers_in_its_own_way(
        self, engine: Engine, make_adapter: MakeAdapter
    ) -> None:
        loads = [None, await bring_in(engine, make_adapter(0)), await bring_in(engine, make_adapter(1))]
        answers = await asyncio.gather(*(ask(engine, "chat", QUESTION, load) for load in loads * 2))
        texts = [said(answer.body or {}) for answer, _ in answers]
        assert len(set(texts[:3])) == 3
        assert texts[:3] == texts[3:]

    @kinds
    async def test_several_choices(self, engine: Engine, kind: Kind, body: dict[str, Any]) -> None:
        several = {**body, "n": 2, "temperature": 1, "seed": 1}
        answer, meter = await ask(engine, kind, several, None)
        assert answer.body is not None
        assert [choice["index"] for choice in answer.body["choices"]] == [0, 1]
        assert answer.body["usage"]["completion_tokens"] == meter.output == 10
        assert answer.body["usage"]["prompt_tokens"] == meter.prompt
        streamed, meter = await ask(engine, kind, {**several, **STREAMED}, None)
        chunks = await events(streamed)
        assert {c["index"] for chunk in chunks for c in chunk["choices"]} == {0, 1}
        assert chunks[-1]["usage"]["completion_tokens"] == meter.output == 10

    async def test_several_prompts_are_parts_of_one_call(self, engine: Engine) -> None:
        answer, meter = await ask(engine, "completion", {**TEXT, "prompt": ["Red,", "One, two,"]}, None)
        assert answer.body is not None
        assert [choice["index"] for choice in answer.body["choices"]] == [0, 1]
        assert len(meter.parts) == 2
        usage = answer.body["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == meter.usage()
        assert usage["completion_tokens"] == 10

    async def test_the_log_probabilities_of_a_prompt(self, engine: Engine, make_adapter: MakeAdapter) -> None:
        echo = {"echo": True, "logprobs": 3, "max_tokens": 1, "return_tokens_as_token_ids": True}
        told = []
        for load in (None, None, await bring_in(engine, make_adapter(0))):
            answer, meter = await ask(engine, "completion", {**TEXT, **echo}, load)
            assert answer.body is not None
            assert said(answer.body).startswith(TEXT["prompt"])
            told.append(answer.body["choices"][0]["logprobs"])
            assert len(told[-1]["tokens"]) == meter.prompt + meter.output
        base, again, adapted = told
        for one in told:
            assert one["token_logprobs"][0] is one["top_logprobs"][0] is None
            rest = zip(one["tokens"], one["token_logprobs"], one["top_logprobs"], strict=True)
            for token, log_prob, top in list(rest)[1:]:
                assert token.startswith("token_id:")
                assert top[token] == log_prob
                assert 3 <= len(top) <= 4
                assert 0 < sum(map(math.exp, top.values())) < 1.0001
        assert base["token_logprobs"][1:] == pytest.approx(again["token_logprobs"][1:], abs=1e-4)
        assert base["token_logprobs"][1:] != pytest.approx(adapted["token_logprobs"][1:], abs=1e-2)

    async def test_there_is_a_bound_on_log_probabilities(self, engine: Engine) -> None:
        for more in (0, 1):
            made, request = call(engine, "completion", {**TEXT, "logprobs": engine.max_logprobs + more}, None)
            if more:
                with pytest.raises(BadRequest):
                    await engine.answer(made, request)
            else:
                assert (await engine.answer(made, request)).body is not None

    # --- endings ---------------------------------------------------------------------------------

    @kinds
    async def test_abort_ends_a_stream(self, engine: Engine, kind: Kind, body: dict[str, Any]) -> None:
        long = {**body, "max_tokens": 50, "stream": True}
        made, request = call(engine, kind, long, None)
        answer = await engine.answer(made, request)
        assert answer.stream is not None
        for _ in range(3):
            await anext(answer.stream)
        await engine.abort(made)
        counted = meter_of(made).output
        assert 0 < counted < 50
        async with asyncio.timeout(240):
            rest = [chunk async for chunk in answer.stream]
        assert rest[-1] == "data: [DONE]\n\n"
        assert meter_of(made).output < 50
        await engine.abort(made)
        assert meter_of(made).output >= counted

    async def test_abort_after_the_end_is_harmless(self, engine: Engine) -> None:
        made, request = call(engine, "chat", QUESTION, None)
        await engine.answer(made, request)
        before = meter_of(made).usage()
        await engine.abort(made)
        engine.poll(made)
        assert meter_of(made).usage() == before

    async def test_poll_tells_what_a_document_has_cost_so_far(self, engine: Engine) -> None:
        made, request = call(engine, "chat", {**QUESTION, "max_tokens": 30}, None)
        answering = asyncio.create_task(engine.answer(made, request))
        seen = {0}
        while not answering.done():
            engine.poll(made)
            seen.add(meter_of(made).output)
            await asyncio.sleep(0.001)
        assert any(0 < output < 30 for output in seen)
        assert (await answering).body is not None
        assert meter_of(made).output == 30

    async def test_a_cancelled_answer_is_cancelled(self, engine: Engine) -> None:
        made, request = call(engine, "chat", {**QUESTION, "max_tokens": 50}, None)
        answering = asyncio.create_task(engine.answer(made, request))
        while meter_of(made).output == 0:
            await asyncio.sleep(0.001)
            engine.poll(made)
        answering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answering
        await engine.abort(made)
        assert 0 < meter_of(made).output < 50

    async def test_a_cancelled_answer_is_counted_to_its_end(self, engine: Engine) -> None:
        """Nobody has polled it; what was produced would be forgotten with it."""
        made, request = call(engine, "chat", {**QUESTION, "max_tokens": 50}, None)
        answering = asyncio.create_task(engine.answer(made, request))
        other, other_request = call(engine, "chat", {**QUESTION, "max_tokens": 10}, None)
        await engine.answer(other, other_request)  # in the same steps
        answering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answering
        assert 5 < meter_of(made).output < 50

    # --- refusals --------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("kind", "changes", "param"),
        [
            ("chat", {"messages": "hello"}, "messages"),
            ("chat", {"max_tokens": "many"}, "max_tokens"),
            ("chat", {"n": "two"}, "n"),
            ("completion", {"prompt": 3.5}, "prompt"),
            ("completion", {"max_tokens": []}, "max_tokens"),
        ],
    )
    async def test_a_wrong_field_is_named(
        self, engine: Engine, kind: Kind, changes: dict[str, Any], param: str
    ) -> None:
        body = QUESTION if kind == "chat" else TEXT
        with pytest.raises(BadRequest) as refused:
            engine.parse(kind, {**body, **changes})
        assert (refused.value.param or "").split(".")[0] == param

    @pytest.mark.parametrize("stream", [False, True])
    async def test_an_impossible_value_is_refused_before_the_first_byte(
        self, engine: Engine, stream: bool
    ) -> None:
        made, request = call(engine, "chat", {**QUESTION, "temperature": -1, "stream": stream}, None)
        with pytest.raises(BadRequest) as refused:
            await engine.answer(made, request)
        assert "temperature" in refused.value.message
        assert meter_of(made).parts == {}

    @pytest.mark.parametrize("stream", [False, True])
    @kinds
    async def test_a_prompt_that_is_too_long_is_refused_before_the_first_byte(
        self, engine: Engine, kind: Kind, body: dict[str, Any], stream: bool
    ) -> None:
        words = "word " * (engine.max_model_len + 1)
        long = {"messages": [{"role": "user", "content": words}]} if kind == "chat" else {"prompt": words}
        made, request = call(engine, kind, {**body, **long, "stream": stream}, None)
        with pytest.raises(BadRequest) as refused:
            await engine.answer(made, request)
        assert words not in refused.value.message
        assert meter_of(made).parts == {}
