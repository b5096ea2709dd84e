"""What each Python library is asked to do. Run by the driver, in an environment with the libraries alone:

    python libraries.py LIBRARY [embeddings]     prints a line a check: {"check": …, "error": null or text}

``URL``, ``KEY``, ``NARROW_KEY`` (one request at once) and ``MODEL`` come from the environment.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal

from checks import (
    BASE,
    CITIES,
    KEY,
    LONG,
    MODEL,
    NAMED,
    NARROW_KEY,
    PARAMETERS,
    PATIENCE,
    QUESTION,
    TOKENS,
    TOO_LONG,
    TOOL,
    TURNS,
    URL,
    Check,
    city_of,
    refused,
)
from frameworks import FRAMEWORKS


def openai_checks() -> dict[str, Check]:
    import openai

    client = openai.AsyncOpenAI(base_url=BASE, api_key=KEY, max_retries=0)
    options: dict[str, Any] = {"model": MODEL, "messages": TURNS, "max_tokens": TOKENS, "temperature": 0}

    async def chat() -> None:
        made = await client.chat.completions.create(**options)
        assert made.choices[0].message.content
        assert made.model == MODEL

    async def stream() -> None:
        chunks = await client.chat.completions.create(**options, stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in chunks if c.choices])

    async def tools(choice: Any, **more: Any) -> list[Any]:
        made = await client.chat.completions.create(**options, tools=[TOOL], tool_choice=choice, **more)
        return made.choices[0].message.tool_calls or []

    async def auto() -> None:
        await tools("auto")

    async def required() -> None:
        (called,) = await tools("required", parallel_tool_calls=False)
        city_of(called.function.arguments)

    async def named() -> None:
        (called,) = await tools(NAMED)
        city_of(called.function.arguments)

    async def parallel() -> None:
        for called in await tools("required", parallel_tool_calls=True):
            city_of(called.function.arguments)

    async def structured() -> None:
        from pydantic import BaseModel

        class Place(BaseModel):
            city: Literal["Paris", "Rome"]

        made = await client.chat.completions.parse(**options, response_format=Place)
        assert made.choices[0].message.parsed

    async def responses() -> None:
        made = await client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=8)
        assert made.output_text

    async def embeddings() -> None:
        made = await client.embeddings.create(model=MODEL, input=["one", "two"])
        assert len(made.data) == 2
        assert len(made.data[0].embedding) > 10

    async def errors() -> None:
        long = client.chat.completions.create(model=MODEL, messages=LONG)
        await refused(long, "context_length_exceeded")
        await refused(client.chat.completions.create(model="nobodys", messages=TURNS), "NotFoundError")

    async def retries() -> None:
        narrow = openai.AsyncOpenAI(base_url=BASE, api_key=NARROW_KEY, max_retries=PATIENCE)
        await asyncio.gather(*(narrow.chat.completions.create(**options) for _ in range(3)))

    return {
        "chat": chat, "stream": stream, "tools: auto": auto, "tools: required": required,
        "tools: named": named, "tools: parallel": parallel, "structured output": structured,
        "responses": responses, "errors": errors, "retries": retries, "embeddings": embeddings,
    }  # fmt: skip


def anthropic_checks() -> dict[str, Check]:
    import anthropic

    client = anthropic.AsyncAnthropic(base_url=URL, api_key=KEY, max_retries=0)
    options: dict[str, Any] = {"model": MODEL, "messages": TURNS, "max_tokens": TOKENS}
    tool: Any = {"name": "weather", "description": "The weather in a city.", "input_schema": PARAMETERS}

    async def chat() -> None:
        made = await client.messages.create(**options)
        assert made.content
        assert made.model == MODEL

    async def stream() -> None:
        async with client.messages.stream(**options) as told:
            assert "".join([text async for text in told.text_stream])

    async def tools(choice: Any) -> list[Any]:
        made = await client.messages.create(**options, tools=[tool], tool_choice=choice)
        return [block for block in made.content if block.type == "tool_use"]

    async def auto() -> None:
        await tools({"type": "auto"})

    async def required() -> None:
        (used,) = await tools({"type": "any", "disable_parallel_tool_use": True})
        city_of(used.input)

    async def named() -> None:
        (used,) = await tools({"type": "tool", "name": "weather"})
        city_of(used.input)

    async def parallel() -> None:
        for used in await tools({"type": "any"}):
            city_of(used.input)

    async def structured() -> None:
        form: Any = {"format": {"type": "json_schema", "schema": PARAMETERS}}
        made = await client.messages.create(**options, output_config=form)
        city_of("".join(block.text for block in made.content if block.type == "text"))

    async def errors() -> None:
        await refused(client.messages.create(model=MODEL, messages=LONG, max_tokens=5), "prompt is too long")
        await refused(client.messages.create(model="nobodys", messages=TURNS, max_tokens=5), "NotFoundError")

    async def retries() -> None:
        narrow = anthropic.AsyncAnthropic(base_url=URL, api_key=NARROW_KEY, max_retries=PATIENCE)
        await asyncio.gather(*(narrow.messages.create(**options) for _ in range(3)))

    return {
        "chat": chat, "stream": stream, "tools: auto": auto, "tools: required": required,
        "tools: named": named, "tools: parallel": parallel, "structured output": structured,
        "errors": errors, "retries": retries,
    }  # fmt: skip


def litellm_checks() -> dict[str, Check]:
    import litellm

    options: dict[str, Any] = {
        "model": f"openai/{MODEL}", "api_base": BASE, "api_key": KEY, "messages": TURNS, "max_tokens": TOKENS,
    }  # fmt: skip

    async def chat() -> None:
        made = await litellm.acompletion(**options)
        assert made.choices[0].message.content

    async def stream() -> None:
        chunks = await litellm.acompletion(**options, stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in chunks])

    async def tools(choice: Any, **more: Any) -> list[Any]:
        made = await litellm.acompletion(**options, tools=[TOOL], tool_choice=choice, **more)
        return made.choices[0].message.tool_calls or []

    async def auto() -> None:
        await tools("auto")

    async def required() -> None:
        city_of((await tools("required", parallel_tool_calls=False))[0].function.arguments)

    async def named() -> None:
        city_of((await tools(NAMED))[0].function.arguments)

    async def parallel() -> None:
        for called in await tools("required", parallel_tool_calls=True):
            city_of(called.function.arguments)

    async def structured() -> None:
        schema = {"name": "place", "schema": PARAMETERS}
        form = {"type": "json_schema", "json_schema": schema}
        made = await litellm.acompletion(**options, response_format=form)
        city_of(made.choices[0].message.content)

    async def responses() -> None:
        asked = {name: options[name] for name in ("model", "api_base", "api_key")}
        made: Any = await litellm.aresponses(**asked, input=QUESTION, max_output_tokens=8)
        assert made.output

    async def embeddings() -> None:
        asked = {name: options[name] for name in ("model", "api_base", "api_key")}
        made = await litellm.aembedding(**asked, input=["one", "two"])
        assert len(made.data) == 2

    async def errors() -> None:
        await refused(litellm.acompletion(**{**options, "messages": LONG}), "ContextWindowExceededError")

    async def retries() -> None:
        narrow = {**options, "api_key": NARROW_KEY, "num_retries": PATIENCE, "max_retries": PATIENCE}
        await asyncio.gather(*(litellm.acompletion(**narrow) for _ in range(3)))

    return {
        "chat": chat, "stream": stream, "tools: auto": auto, "tools: required": required,
        "tools: named": named, "tools: parallel": parallel, "structured output": structured,
        "responses": responses, "errors": errors, "retries": retries, "embeddings": embeddings,
    }  # fmt: skip


def langchain_checks() -> dict[str, Check]:
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel

    options: dict[str, Any] = {"model": MODEL, "base_url": BASE, "max_completion_tokens": TOKENS}
    model = ChatOpenAI(**options, api_key=KEY, max_retries=0)

    class Place(BaseModel):
        """A place."""

        city: Literal["Paris", "Rome"]

    @tool
    def weather(city: Literal["Paris", "Rome"]) -> str:
        """The weather in a city."""
        return "Sunny."

    async def chat() -> None:
        assert (await model.ainvoke(QUESTION)).content

    async def stream() -> None:
        assert "".join([str(part.content) async for part in model.astream(QUESTION)])

    async def calls(choice: Any, **more: Any) -> list[Any]:
        said = await model.bind_tools([weather], tool_choice=choice, **more).ainvoke(QUESTION)
        return list(said.tool_calls)

    async def auto() -> None:
        await calls("auto")

    async def required() -> None:
        city_of((await calls("required", parallel_tool_calls=False))[0]["args"])

    async def named() -> None:
        city_of((await calls("weather"))[0]["args"])

    async def parallel() -> None:
        for called in await calls("any"):
            city_of(called["args"])

    async def structured() -> None:
        for method in ("function_calling", "json_schema"):
            made = await model.with_structured_output(Place, method=method).ainvoke(QUESTION)
            assert made.city in CITIES

    async def responses() -> None:
        made = ChatOpenAI(**options, api_key=KEY, max_retries=0, use_responses_api=True)
        assert (await made.ainvoke(QUESTION)).content

    async def embeddings() -> None:
        from langchain_openai import OpenAIEmbeddings

        made = OpenAIEmbeddings(model=MODEL, base_url=BASE, api_key=KEY, check_embedding_ctx_length=False)
        assert len(await made.aembed_documents(["one", "two"])) == 2

    async def errors() -> None:
        await refused(model.ainvoke("word " * 4000), "ContextOverflow", "context_length_exceeded")

    async def retries() -> None:
        narrow = ChatOpenAI(**options, api_key=NARROW_KEY, max_retries=PATIENCE)
        await asyncio.gather(*(narrow.ainvoke(QUESTION) for _ in range(3)))

    return {
        "chat": chat, "stream": stream, "tools: auto": auto, "tools: required": required,
        "tools: named": named, "tools: parallel": parallel, "structured output": structured,
        "responses": responses, "errors": errors, "retries": retries, "embeddings": embeddings,
    }  # fmt: skip


def pydantic_ai_checks() -> dict[str, Check]:
    import openai
    from pydantic import BaseModel
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE, api_key=KEY))
    settings: Any = {"max_tokens": TOKENS, "temperature": 0}

    class Place(BaseModel):
        city: Literal["Paris", "Rome"]

    async def chat() -> None:
        assert (await Agent(model, model_settings=settings).run(QUESTION)).output

    async def stream() -> None:
        async with Agent(model, model_settings=settings).run_stream(QUESTION) as told:
            assert "".join([text async for text in told.stream_text(delta=True)])

    async def auto() -> None:
        agent = Agent(model, model_settings=settings)

        @agent.tool_plain
        def weather(city: Literal["Paris", "Rome"]) -> str:
            """The weather in a city."""
            return "Sunny."

        assert (await agent.run(QUESTION)).output

    async def required() -> None:
        agent: Any = Agent(model, output_type=Place, model_settings=settings)
        assert (await agent.run(QUESTION)).output.city in CITIES

    async def parallel() -> None:
        several = {**settings, "parallel_tool_calls": True}
        agent: Any = Agent(model, output_type=Place, model_settings=several)
        assert (await agent.run(QUESTION)).output.city in CITIES

    async def structured() -> None:
        agent: Any = Agent(model, output_type=NativeOutput(Place), model_settings=settings)
        assert (await agent.run(QUESTION)).output.city in CITIES

    async def responses() -> None:
        asked = OpenAIResponsesModel(MODEL, provider=OpenAIProvider(base_url=BASE, api_key=KEY))
        assert (await Agent(asked, model_settings=settings).run(QUESTION)).output

    async def embeddings() -> None:
        from pydantic_ai import Embedder
        from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel

        asked = OpenAIEmbeddingModel(MODEL, provider=OpenAIProvider(base_url=BASE, api_key=KEY))
        assert len((await Embedder(asked).embed_documents(["one", "two"])).embeddings) == 2

    async def errors() -> None:
        await refused(Agent(model).run("word " * 4000), *TOO_LONG)

    async def retries() -> None:
        patient = openai.AsyncOpenAI(base_url=BASE, api_key=NARROW_KEY, max_retries=PATIENCE)
        narrow = OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=patient))
        await asyncio.gather(*(Agent(narrow, model_settings=settings).run(QUESTION) for _ in range(3)))

    return {
        "chat": chat, "stream": stream, "tools: auto": auto, "tools: required": required,
        "tools: parallel": parallel, "structured output": structured, "responses": responses,
        "errors": errors, "retries": retries, "embeddings": embeddings,
    }  # fmt: skip


def instructor_checks() -> dict[str, Check]:
    import instructor
    import openai
    from pydantic import BaseModel

    class Place(BaseModel):
        city: Literal["Paris", "Rome"]

    options: dict[str, Any] = {
        "model": MODEL, "messages": TURNS, "max_tokens": TOKENS, "response_model": Place, "max_retries": 0,
    }  # fmt: skip

    def client(mode: Any, key: str = KEY, retries: int = 0) -> Any:
        return instructor.from_openai(
            openai.AsyncOpenAI(base_url=BASE, api_key=key, max_retries=retries), mode=mode
        )

    async def made_by(mode: Any) -> None:
        assert (await client(mode).create(**options)).city in CITIES

    async def chat() -> None:
        made = await client(instructor.Mode.TOOLS).create(**{**options, "response_model": None})
        assert made.choices[0].message.content

    async def stream() -> None:
        parts = client(instructor.Mode.JSON_SCHEMA).create_partial(**options)
        assert [part async for part in parts][-1].city in CITIES

    async def named() -> None:
        await made_by(instructor.Mode.TOOLS)

    async def parallel() -> None:
        """It lets the model choose, and takes an answer without a call for an error."""
        from instructor.core.exceptions import IncompleteOutputException, InstructorRetryException

        several = {**options, "response_model": Iterable[Place]}
        try:
            found = list(await client(instructor.Mode.PARALLEL_TOOLS).create(**several))
        except (IncompleteOutputException, InstructorRetryException) as exc:
            made: Any = exc.last_completion
        else:
            assert all(one.city in CITIES for one in found)
            return
        assert made.choices[0].message.content, made
        assert not made.choices[0].message.tool_calls, made

    async def responses() -> None:
        asked = {name: options[name] for name in ("model", "messages", "response_model", "max_retries")}
        made = await client(instructor.Mode.RESPONSES_TOOLS).create(**asked, max_output_tokens=TOKENS)
        assert made.city in CITIES

    async def structured() -> None:
        await made_by(instructor.Mode.JSON_SCHEMA)

    async def errors() -> None:
        long = {**options, "messages": LONG}
        await refused(client(instructor.Mode.TOOLS).create(**long), *TOO_LONG)

    async def retries() -> None:
        narrow = client(instructor.Mode.JSON_SCHEMA, NARROW_KEY, PATIENCE)
        await asyncio.gather(*(narrow.create(**options) for _ in range(3)))

    return {
        "chat": chat, "stream": stream, "tools: named": named, "tools: parallel": parallel,
        "structured output": structured, "responses": responses,
        "errors": errors, "retries": retries,
    }  # fmt: skip


LIBRARIES: dict[str, tuple[str, Callable[[], dict[str, Check]]]] = {
    "openai": ("openai", openai_checks),
    "anthropic": ("anthropic", anthropic_checks),
    "litellm": ("litellm", litellm_checks),
    "langchain-openai": ("langchain-openai", langchain_checks),
    "pydantic-ai": ("pydantic-ai-slim", pydantic_ai_checks),
    "instructor": ("instructor", instructor_checks),
    **FRAMEWORKS,
}


async def main(library: str, embeddings: bool) -> None:
    package, make = LIBRARIES[library]
    print(json.dumps({"version": importlib.metadata.version(package)}), flush=True)
    for name, check in make().items():
        if (name == "embeddings") != embeddings:
            continue
        error = None
        try:
            async with asyncio.timeout(120):
                await check()
        except Exception as exc:
            error = f"{type(exc).__name__}: {exc}"[:500]
        print(json.dumps({"check": name, "error": error}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], "embeddings" in sys.argv[2:]))
