"""Frameworks for agents and retrieval, which ask in ways of their own; see ``libraries``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal

from checks import (
    BASE,
    CITIES,
    KEY,
    MODEL,
    NARROW_KEY,
    PARAMETERS,
    PATIENCE,
    QUESTION,
    TOKENS,
    TOO_LONG,
    Check,
    city_of,
    refused,
)


def llama_index_checks() -> dict[str, Check]:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike
    from pydantic import BaseModel

    class Place(BaseModel):
        """A place."""

        city: Literal["Paris", "Rome"]

    def model(key: str = KEY, retries: int = 0, **more: Any) -> Any:
        return OpenAILike(
            model=MODEL, api_base=BASE, api_key=key, is_chat_model=True, is_function_calling_model=True,
            max_tokens=TOKENS, max_retries=retries, context_window=1024, temperature=0, **more,
        )  # fmt: skip

    turns = [ChatMessage(role="user", content=QUESTION)]

    def weather(city: str) -> str:
        """The weather in a city."""
        return "Sunny."

    tool = FunctionTool.from_defaults(weather, fn_schema=Place)

    async def chat() -> None:
        assert (await model().achat(turns)).message.content

    async def stream() -> None:
        assert "".join([part.delta or "" async for part in await model().astream_chat(turns)])

    async def calls(**options: Any) -> list[Any]:
        said = await model().achat_with_tools([tool], user_msg=QUESTION, **options)
        return list(model().get_tool_calls_from_response(said, error_on_no_tool_call=False))

    async def auto() -> None:
        await calls()

    async def required() -> None:
        city_of((await calls(tool_required=True))[0].tool_kwargs)

    async def named() -> None:
        choice = {"type": "function", "function": {"name": "weather"}}
        city_of((await calls(tool_choice=choice))[0].tool_kwargs)

    async def parallel() -> None:
        for called in await calls(tool_required=True, allow_parallel_tool_calls=True):
            city_of(called.tool_kwargs)

    async def structured() -> None:
        made = await model(should_use_structured_outputs=True).as_structured_llm(Place).achat(turns)
        assert made.raw.city in CITIES

    async def responses() -> None:
        from llama_index.llms.openai import OpenAIResponses

        made = OpenAIResponses(
            model=MODEL, api_base=BASE, api_key=KEY, max_output_tokens=TOKENS, max_retries=0,
            context_window=1024, temperature=0,
        )  # fmt: skip
        assert (await made.achat(turns)).message.content

    async def embeddings() -> None:
        from llama_index.embeddings.openai_like import OpenAILikeEmbedding

        made = OpenAILikeEmbedding(model_name=MODEL, api_base=BASE, api_key=KEY, max_retries=0)
        assert len(await made.aget_text_embedding_batch(["one", "two"])) == 2

    async def errors() -> None:
        long = [ChatMessage(role="user", content="word " * 4000)]
        await refused(model().achat(long), *TOO_LONG)

    async def retries() -> None:
        narrow = model(NARROW_KEY, PATIENCE)
        await asyncio.gather(*(narrow.achat(turns) for _ in range(3)))

    return {
        "chat": chat, "stream": stream, "tools: auto": auto, "tools: required": required,
        "tools: named": named, "tools: parallel": parallel, "structured output": structured,
        "responses": responses, "errors": errors, "retries": retries, "embeddings": embeddings,
    }  # fmt: skip


def haystack_checks() -> dict[str, Check]:
    from haystack.components.generators.chat import OpenAIChatGenerator
    from haystack.dataclasses import ChatMessage
    from haystack.tools import Tool
    from haystack.utils import Secret
    from pydantic import BaseModel

    class Place(BaseModel):
        city: Literal["Paris", "Rome"]

    def generator(key: str = KEY, retries: int = 0, **more: Any) -> Any:
        settings: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0, **more.pop("settings", {})}
        return OpenAIChatGenerator(
            api_key=Secret.from_token(key), model=MODEL, api_base_url=BASE, generation_kwargs=settings,
            max_retries=retries, **more,
        )  # fmt: skip

    tool = Tool("weather", "The weather in a city.", PARAMETERS, lambda city: "Sunny.")
    turns = [ChatMessage.from_user(QUESTION)]

    async def chat() -> None:
        assert (await generator().run_async(turns))["replies"][0].text

    async def stream() -> None:
        said: list[str] = []

        async def hear(chunk: Any) -> None:
            said.append(chunk.content)

        await generator(streaming_callback=hear).run_async(turns)
        assert "".join(said)

    async def calls(choice: Any, parallel: bool) -> list[Any]:
        settings = {"tool_choice": choice, "parallel_tool_calls": parallel}
        made = await generator(tools=[tool], settings=settings).run_async(turns)
        return list(made["replies"][0].tool_calls)

    async def auto() -> None:
        await generator(tools=[tool]).run_async(turns)

    async def required() -> None:
        city_of((await calls("required", False))[0].arguments)

    async def named() -> None:
        city_of((await calls({"type": "function", "function": {"name": "weather"}}, False))[0].arguments)

    async def parallel() -> None:
        for called in await calls("required", True):
            city_of(called.arguments)

    async def structured() -> None:
        made = await generator(settings={"response_format": Place}).run_async(turns)
        city_of(made["replies"][0].text)

    async def responses() -> None:
        from haystack.components.generators.chat import OpenAIResponsesChatGenerator

        made = OpenAIResponsesChatGenerator(
            api_key=Secret.from_token(KEY), model=MODEL, api_base_url=BASE, max_retries=0,
            generation_kwargs={"max_output_tokens": TOKENS, "temperature": 0},
        )  # fmt: skip
        assert (await made.run_async(turns))["replies"][0].text

    async def embeddings() -> None:
        from haystack.components.embedders import OpenAITextEmbedder

        made = OpenAITextEmbedder(api_key=Secret.from_token(KEY), model=MODEL, api_base_url=BASE)
        assert len(made.run("one")["embedding"]) > 10

    async def errors() -> None:
        long = [ChatMessage.from_user("word " * 4000)]
        await refused(generator().run_async(long), *TOO_LONG)

    async def retries() -> None:
        await asyncio.gather(*(generator(NARROW_KEY, PATIENCE).run_async(turns) for _ in range(3)))

    return {
        "chat": chat, "stream": stream, "tools: auto": auto, "tools: required": required,
        "tools: named": named, "tools: parallel": parallel, "structured output": structured,
        "responses": responses, "errors": errors, "retries": retries, "embeddings": embeddings,
    }  # fmt: skip


def autogen_checks() -> dict[str, Check]:
    from autogen_agentchat.agents import AssistantAgent
    from autogen_core.models import ModelInfo, UserMessage
    from autogen_core.tools import FunctionTool
    from autogen_ext.models.openai import OpenAIChatCompletionClient
    from pydantic import BaseModel

    class Place(BaseModel):
        city: Literal["Paris", "Rome"]

    info = ModelInfo(
        vision=False, function_calling=True, json_output=True, family="unknown", structured_output=True
    )

    def client(key: str = KEY, retries: int = 0) -> Any:
        return OpenAIChatCompletionClient(
            model=MODEL, base_url=BASE, api_key=key, model_info=info, max_tokens=TOKENS, temperature=0,
            max_retries=retries,
        )  # fmt: skip

    turns = [UserMessage(content=QUESTION, source="user")]

    async def weather(city: Literal["Paris", "Rome"]) -> str:
        """The weather in a city."""
        return "Sunny."

    tool = FunctionTool(weather, "The weather in a city.")

    async def chat() -> None:
        assert (await client().create(turns)).content

    async def stream() -> None:
        assert [part async for part in client().create_stream(turns)]

    async def auto() -> None:
        agent = AssistantAgent("helper", client(), tools=[weather])
        assert (await agent.run(task=QUESTION)).messages

    async def calls(choice: Any, parallel: bool = False) -> list[Any]:
        more = {"parallel_tool_calls": parallel}
        made = await client().create(turns, tools=[tool], tool_choice=choice, extra_create_args=more)
        assert isinstance(made.content, list), made.content
        return made.content

    async def required() -> None:
        city_of((await calls("required"))[0].arguments)

    async def named() -> None:
        city_of((await calls(tool))[0].arguments)

    async def parallel() -> None:
        for called in await calls("required", parallel=True):
            city_of(called.arguments)

    async def structured() -> None:
        made = await client().create(turns, json_output=Place)
        city_of(made.content)

    async def errors() -> None:
        long = [UserMessage(content="word " * 4000, source="user")]
        await refused(client().create(long), *TOO_LONG)

    async def retries() -> None:
        narrow = client(NARROW_KEY, PATIENCE)
        await asyncio.gather(*(narrow.create(turns) for _ in range(3)))

    return {
        "chat": chat, "stream": stream, "tools: auto": auto, "tools: required": required,
        "tools: named": named, "tools: parallel": parallel, "structured output": structured,
        "errors": errors, "retries": retries,
    }  # fmt: skip


def agent_framework_checks() -> dict[str, Check]:
    """Microsoft's, which follows autogen."""
    from agent_framework import Agent
    from agent_framework.openai import OpenAIChatClient, OpenAIChatCompletionClient, OpenAIEmbeddingClient
    from openai import AsyncOpenAI
    from pydantic import BaseModel

    class Place(BaseModel):
        city: Literal["Paris", "Rome"]

    def agent(key: str = KEY, retries: int = 0, **options: Any) -> Any:
        client = AsyncOpenAI(base_url=BASE, api_key=key, max_retries=retries)
        own: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0, **options}
        return Agent(OpenAIChatCompletionClient(MODEL, async_client=client), default_options=own)

    told: list[str] = []

    def weather(city: Literal["Paris", "Rome"]) -> str:
        """The weather in a city."""
        told.append(city)
        return "Sunny."

    async def chat() -> None:
        assert (await agent().run(QUESTION)).text

    async def stream() -> None:
        assert "".join([update.text async for update in agent().run(QUESTION, stream=True)])

    async def auto() -> None:
        await agent().run(QUESTION, tools=[weather])

    async def forced(choice: Any, **options: Any) -> None:
        told.clear()
        await agent(tool_choice=choice, **options).run(QUESTION, tools=[weather])
        assert told
        assert set(told) <= set(CITIES)

    async def required() -> None:
        await forced("required")

    async def named() -> None:
        await forced({"mode": "required", "required_function_name": "weather"})

    async def parallel() -> None:
        await forced("required", allow_multiple_tool_calls=True)

    async def responses() -> None:
        """Its other client, which asks so."""
        client = OpenAIChatClient(MODEL, async_client=AsyncOpenAI(base_url=BASE, api_key=KEY, max_retries=0))
        own: Any = {"max_tokens": TOKENS, "temperature": 0}
        assert (await Agent(client, default_options=own).run(QUESTION)).text

    async def structured() -> None:
        made = await agent().run(QUESTION, options={"response_format": Place})
        assert made.value.city in CITIES

    async def embeddings() -> None:
        own = AsyncOpenAI(base_url=BASE, api_key=KEY)
        client = OpenAIEmbeddingClient(model=MODEL, async_client=own)
        assert len(await client.get_embeddings(["one", "two"])) == 2

    async def errors() -> None:
        await refused(agent().run("word " * 4000), *TOO_LONG)

    async def retries() -> None:
        narrow = agent(NARROW_KEY, PATIENCE)
        await asyncio.gather(*(narrow.run(QUESTION) for _ in range(3)))

    return {
        "chat": chat, "stream": stream, "tools: auto": auto, "tools: required": required,
        "tools: named": named, "tools: parallel": parallel, "structured output": structured,
        "responses": responses, "errors": errors, "retries": retries, "embeddings": embeddings,
    }  # fmt: skip


# Which distribution's version is shown, and what makes the checks.
FRAMEWORKS: dict[str, tuple[str, Callable[[], dict[str, Check]]]] = {
    "llama-index": ("llama-index-llms-openai-like", llama_index_checks),
    "haystack": ("haystack-ai", haystack_checks),
    "autogen": ("autogen-ext", autogen_checks),
    "agent-framework": ("agent-framework-openai", agent_framework_checks),
}
