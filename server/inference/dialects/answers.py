"""What vLLM answers with, in its vendors' shapes: the fields that clients rely on, for the OpenAPI document.

The vendors say what all fields mean. A field that is not listed passes through unchanged.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]


class Answer(BaseModel):
    """A JSON object with at least these fields."""

    model_config = ConfigDict(extra="allow")


class PromptUsage(Answer):
    prompt_tokens: Count
    total_tokens: Count


class CompletionUsage(PromptUsage):
    completion_tokens: Count


class ChatMessage(Answer):
    role: str
    content: Any


class ChatChoice(Answer):
    index: Count
    finish_reason: str | None
    message: ChatMessage


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: Count
    model: str
    choices: Annotated[list[ChatChoice], Field(min_length=1)]
    usage: CompletionUsage


class TextChoice(Answer):
    index: Count
    finish_reason: str | None
    text: str


class Completion(Answer):
    id: str
    object: Literal["text_completion"]
    created: Count
    model: str
    choices: Annotated[list[TextChoice], Field(min_length=1)]
    usage: CompletionUsage


class TokenUsage(Answer):
    input_tokens: Count
    output_tokens: Count


class Part(Answer):
    type: str


class Response(Answer):
    id: str
    object: Literal["response"]
    created_at: Count
    model: str
    status: Literal["completed", "incomplete", "cancelled"]
    output: list[Part]
    usage: TokenUsage


class Message(Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    content: list[Part]
    model: str
    stop_reason: str | None = None
    usage: TokenUsage


class Embedding(Answer):
    index: Count
    object: Literal["embedding"]
    embedding: list[float] | str


class EmbeddingList(Answer):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: PromptUsage


class TokenCount(Answer):
    input_tokens: Count


class Tokens(Answer):
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]
    count: Count
    max_model_len: Count


class Prompt(Answer):
    prompt: str
