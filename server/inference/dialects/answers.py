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
    """Tokens of a request that produces none."""

    prompt_tokens: Count
    total_tokens: Count


class CompletionUsage(PromptUsage):
    """Tokens as OpenAI's chat and completions count them."""

    completion_tokens: Count


class ChatMessage(Answer):
    """`content` is null where tools are called."""

    role: str
    content: Any


class ChatChoice(Answer):
    """One answer of a chat."""

    index: Count
    finish_reason: str | None
    message: ChatMessage


class ChatCompletion(Answer):
    """OpenAI's answer of a chat."""

    id: str
    object: Literal["chat.completion"]
    created: Count
    model: str
    choices: Annotated[list[ChatChoice], Field(min_length=1)]
    usage: CompletionUsage


class TextChoice(Answer):
    """One continuation of a prompt."""

    index: Count
    finish_reason: str | None
    text: str


class Completion(Answer):
    """OpenAI's answer of a completion."""

    id: str
    object: Literal["text_completion"]
    created: Count
    model: str
    choices: Annotated[list[TextChoice], Field(min_length=1)]
    usage: CompletionUsage


class TokenUsage(Answer):
    """Tokens as OpenAI's responses and Anthropic's messages count them."""

    input_tokens: Count
    output_tokens: Count


class Part(Answer):
    """One piece of an answer: a text, a tool's call, reasoning."""

    type: str


class Response(Answer):
    """OpenAI's response."""

    id: str
    object: Literal["response"]
    created_at: Count
    model: str
    status: Literal["completed", "incomplete", "cancelled"]
    output: list[Part]
    usage: TokenUsage


class Message(Answer):
    """Anthropic's message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    content: list[Part]
    model: str
    stop_reason: str | None = None
    usage: TokenUsage


class Embedding(Answer):
    """The vector of one input; as text where base64 was asked for."""

    index: Count
    object: Literal["embedding"]
    embedding: list[float] | str


class EmbeddingList(Answer):
    """OpenAI's answer with embeddings, in the inputs' order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: PromptUsage


class Classification(Answer):
    """Of one input: the likeliest label, and the probability of each; or scores, without an activation."""

    index: Count
    label: str | None = None
    probs: list[float]
    num_classes: Count


class Classifications(Answer):
    """vLLM's answer with labels, in the inputs' order."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Classification]
    usage: PromptUsage


class RankedText(Answer):
    """A document of the request."""

    text: str


class Ranked(Answer):
    """A document by its place in the request; `document` is left out with `return_documents` false."""

    index: Count
    document: RankedText | None = None
    relevance_score: float


class Reranked(Answer):
    """Documents, the nearest first."""

    id: str
    model: str
    results: list[Ranked]
    usage: PromptUsage


class PairScore(Answer):
    """The cosine of a pair's embeddings, or what a head says of the pair."""

    index: Count
    object: Literal["score"]
    score: float


class Scores(Answer):
    """Scores in the order of the pairs."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[PairScore]
    usage: PromptUsage


class TokenCount(Answer):
    """Anthropic's count of a message's tokens."""

    input_tokens: Count


class Tokens(Answer):
    """The token ids of a text or a chat."""

    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]
    count: Count
    max_model_len: Count


class Prompt(Answer):
    """The text of token ids."""

    prompt: str
