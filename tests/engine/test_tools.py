"""Tools, on a server whose settings say nothing of them: the parser is chosen for the base model.

On the whole of the demo's base, an engine of its own: with six layers it would write spaces for ever.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from server.app import create_app
from tests.engine.reference import ATTENTION, Reference, Spec
from tests.support.site import Site, bearer, engine_settings, serving

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

QUESTION: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
# Without ``strict``, as most libraries send it: the model, which was not trained for tools, is held to it.
WEATHER = {"name": "weather", "description": "The weather in a city.", "parameters": SCHEMA}
CHAT_TOOLS: list[Any] = [{"type": "function", "function": WEATHER}]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def site(whole_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    settings = engine_settings(
        whole_base_dir,
        tmp_path_factory.mktemp("data"),
        adapter_gpu_memory="100MiB",
        adapter_host_memory="200MiB",
        max_lora_rank=8,
        max_model_len=1024,
        engine_args={"dtype": "float32", "max_num_seqs": 16},
    )
    async with serving(create_app(settings)) as site:
        yield site


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def key(site: Site, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tools")
    reference.make(Spec(seed=970, rank=8, targets=ATTENTION), folder)
    return await site.tenant("smith", {"hammer": folder})


def city(arguments: Any) -> str:
    parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert parsed.keys() == {"city"}
    return str(parsed["city"])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_tool_that_must_be_called_is(site: Site, key: str, choice: Any) -> None:
    client = site.openai(key)
    asked: dict[str, Any] = {
        "model": "hammer",
        "messages": QUESTION,
        "tools": CHAT_TOOLS,
        "tool_choice": choice,
        "max_tokens": 60,
        "temperature": 0,
    }
    made = await client.chat.completions.create(**asked)
    (called,) = made.choices[0].message.tool_calls or []
    assert called.type == "function"
    assert called.function.name == "weather"
    assert city(called.function.arguments) in ("Paris", "Rome")
    stream = await client.chat.completions.create(**asked, stream=True)
    deltas = [chunk.choices[0].delta async for chunk in stream if chunk.choices]
    parts = [part for delta in deltas for part in delta.tool_calls or ()]
    assert [part.function.name for part in parts if part.function and part.function.name] == ["weather"]
    spoken = "".join(part.function.arguments or "" for part in parts if part.function)
    assert city(spoken) == city(called.function.arguments)


async def test_a_response_calls_a_tool(site: Site, key: str) -> None:
    made = await site.openai(key).responses.create(
        model="hammer",
        input="What is the weather in Paris?",
        tools=[{"type": "function", **WEATHER}],
        tool_choice="required",
        max_output_tokens=60,
        temperature=0,
    )
    (called,) = [item for item in made.output if item.type == "function_call"]
    assert called.name == "weather"
    assert city(called.arguments) in ("Paris", "Rome")


async def test_a_message_uses_a_tool(site: Site, key: str) -> None:
    made = await site.anthropic(key).messages.create(
        model="hammer",
        messages=QUESTION,
        tools=[{"name": "weather", "description": "The weather.", "input_schema": SCHEMA}],
        tool_choice={"type": "any"},
        max_tokens=60,
        extra_body={"temperature": 0},
    )
    assert made.stop_reason == "tool_use"
    (used,) = [block for block in made.content if block.type == "tool_use"]
    assert (used.name, city(used.input) in ("Paris", "Rome")) == ("weather", True)


@pytest.mark.parametrize("strict", [True, False, None])
async def test_what_strict_says_changes_nothing_of_a_call_that_must_be(
    site: Site, key: str, strict: bool | None
) -> None:
    tool = {"type": "function", "function": WEATHER | ({} if strict is None else {"strict": strict})}
    made = await site.openai(key).chat.completions.create(
        model="hammer",
        messages=QUESTION,
        tools=[tool],  # type: ignore[list-item]
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=60,
        temperature=0,
    )
    (called,) = made.choices[0].message.tool_calls or []
    assert called.type == "function"
    assert city(called.function.arguments) in ("Paris", "Rome")


async def test_a_tool_without_parameters_is_called_with_an_empty_object(site: Site, key: str) -> None:
    """Also in a stream, and in responses."""
    named = {"type": "function", "function": {"name": "ping"}}
    asked: dict[str, Any] = {"messages": QUESTION, "model": "hammer", "max_tokens": 60, "temperature": 0}

    async def arguments(parameters: dict[str, Any], choice: Any) -> str:
        tools: Any = [{"type": "function", "function": {"name": "ping", **parameters}}]
        client = site.openai(key)
        made = await client.chat.completions.create(
            **asked, tools=tools, tool_choice=choice, parallel_tool_calls=False
        )
        (called,) = made.choices[0].message.tool_calls or []
        assert called.type == "function"
        return str(called.function.arguments)

    async def streamed() -> str:
        body = asked | {"tools": [named], "tool_choice": named, "stream": True}
        stream = await site.openai(key).chat.completions.create(**body)
        deltas = [chunk.choices[0].delta async for chunk in stream if chunk.choices]
        parts = [part.function for delta in deltas for part in delta.tool_calls or ()]
        return "".join(part.arguments or "" for part in parts if part)

    async def response(parameters: dict[str, Any]) -> str:
        tool = {"type": "function", "name": "ping", **parameters}
        body: dict[str, Any] = {"model": "hammer", "input": "Hi", "tools": [tool], "tool_choice": "required"}
        body |= {"max_output_tokens": 60, "temperature": 0, "parallel_tool_calls": False}
        made = await site.http.post("/v1/responses", json=body, headers=bearer(key))
        assert made.status_code == 200, made.text
        (called,) = [item for item in made.json()["output"] if item["type"] == "function_call"]
        return str(called["arguments"])

    absent: list[dict[str, Any]] = [{}, {"parameters": None}, {"parameters": {}}]
    spoken = await asyncio.gather(
        *(arguments(parameters, choice) for parameters in absent for choice in ("required", named)),
        *(response(parameters) for parameters in absent),
        streamed(),
    )
    assert [json.loads(text) for text in spoken] == [{}] * 10, spoken


async def test_several_calls_at_once_all_fit(site: Site, key: str) -> None:
    made = await site.openai(key).chat.completions.create(
        model="hammer",
        messages=QUESTION,
        tools=CHAT_TOOLS,
        tool_choice="required",
        parallel_tool_calls=True,
        max_tokens=200,
        temperature=0,
    )
    called = made.choices[0].message.tool_calls or []
    assert called or made.choices[0].finish_reason == "length"
    for one in called[:-1] if made.choices[0].finish_reason == "length" else called:
        assert one.type == "function"
        assert city(one.function.arguments) in ("Paris", "Rome")


async def test_a_message_whose_call_is_cut_off_is_text(site: Site, key: str) -> None:
    made = await site.anthropic(key).messages.create(
        model="hammer",
        messages=QUESTION,
        tools=[{"name": "weather", "description": "The weather.", "input_schema": SCHEMA}],
        tool_choice={"type": "tool", "name": "weather"},
        max_tokens=3,
        extra_body={"temperature": 0},
    )
    assert made.stop_reason == "max_tokens"
    assert [block for block in made.content if block.type == "tool_use"] == []


async def test_the_model_may_choose(site: Site, key: str) -> None:
    """And an answer's result can be told to it."""
    called = {"name": "weather", "arguments": '{"city": "Paris"}'}
    talk = [
        *QUESTION,
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": called}]},
        {"role": "tool", "tool_call_id": "1", "content": "Sunny."},
    ]
    body = {"model": "hammer", "messages": talk, "tools": CHAT_TOOLS, "max_tokens": 8}
    made = await site.http.post("/v1/chat/completions", json=body, headers=bearer(key))
    assert made.status_code == 200, made.text
    assert made.json()["usage"]["completion_tokens"] > 0


async def test_a_tool_that_is_not_there_is_refused(site: Site, key: str, tmp_path: Path) -> None:
    body = {
        "messages": QUESTION,
        "tools": CHAT_TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "bomb"}},
    }
    refused = await site.http.post("/v1/chat/completions", json=body, headers=bearer(key))
    assert refused.status_code == 400
    assert "bomb" in refused.text or "tool" in refused.text
