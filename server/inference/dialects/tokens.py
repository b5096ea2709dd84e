"""What is asked about tokens, by the base model's tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from server.engine.calls import Call
from server.errors import BadRequest
from server.inference.dialects.answers import Prompt, TokenCount, Tokens
from server.inference.dialects.base import Dialect
from server.inference.dialects.messages import NOT_SERVED, PROMPT_BODY, PROMPT_FIELDS, SERVICE_FIELDS
from server.inference.dialects.schema import BOOL, MODEL, QUESTION, TEXT, TOKENS, TURNS, object_of
from server.inference.dialects.tools import check_own_tools
from server.inference.dialects.turns import check_blocks

NAMED = 1 << 17  # characters of a text whose tokens are told as texts too


def _length(value: Any) -> int:
    """Characters of all texts in a JSON value."""
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_length, inner))


class _Tokens(Dialect):
    """Answers with a document, and needs no slot."""

    streams = False
    counts = True

    def document(self, call: Call, result: Any) -> dict[str, Any]:
        answer: dict[str, Any] = result.model_dump(exclude_none=True)
        return answer


class Tokenize(_Tokens):
    name = "tokenize"
    place = 61
    path = "/tokenize"
    operation = "tokenize"
    example: ClassVar[Mapping[str, Any]] = {"model": "support", "prompt": "Hello there"}
    summary = "A text's or a chat's tokens"
    answer = Tokens
    accepted = frozenset(
        {
            "model", "prompt", "messages", "tools", "add_generation_prompt", "add_special_tokens",
            "chat_template_kwargs", "continue_final_message", "return_token_strs",
        }
    )  # fmt: skip
    base = "any"
    body = object_of(
        model=MODEL,
        prompt=TEXT,
        messages=TURNS,
        add_special_tokens=BOOL,
        return_token_strs=BOOL,
    ) | {"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]}

    def allowed_fields(self, body: dict[str, Any]) -> dict[str, Any]:
        """BadRequest for the texts of more tokens than can be looked up while others wait."""
        kept = super().allowed_fields(body)
        if kept.get("return_token_strs") and _length([kept.get("prompt"), kept.get("messages")]) > NAMED:
            raise BadRequest(
                f"return_token_strs: of a text of at most {NAMED} characters. Send it in parts.",
                param="return_token_strs",
            )
        return kept

    def request_model(self, body: dict[str, Any]) -> str:
        form = "TokenizeChatRequest" if "messages" in body else "TokenizeCompletionRequest"
        return f"vllm.entrypoints.serve.tokenize.protocol:{form}"

    async def call(self, serving: Any, request: Any) -> Any:
        return await serving.serving_tokenization.create_tokenize(request, None)


class Detokenize(_Tokens):
    name = "detokenize"
    place = 62
    path = "/detokenize"
    operation = "detokenize"
    example: ClassVar[Mapping[str, Any]] = {"model": "support", "tokens": [1, 2, 3]}
    summary = "The text of tokens"
    answer = Prompt
    accepted = frozenset({"model", "tokens"})
    base = "any"
    body = object_of("tokens", model=MODEL, tokens=TOKENS)

    def request_model(self, body: dict[str, Any]) -> str:
        return "vllm.entrypoints.serve.tokenize.protocol:DetokenizeRequest"

    async def call(self, serving: Any, request: Any) -> Any:
        """BadRequest for an id beyond the vocabulary, which the tokenizer would leave out silently."""
        last = int(serving.vllm_config.model_config.get_vocab_size()) - 1
        if max(request.tokens, default=0) > last:
            raise BadRequest(f"tokens: the vocabulary ends with {last}", param="tokens")
        return await serving.serving_tokenization.create_detokenize(request, None)


class CountTokens(_Tokens):
    name = "count_tokens"
    place = 60
    path = "/v1/messages/count_tokens"
    operation = "count_tokens"
    example: ClassVar[Mapping[str, Any]] = {"model": "support", "messages": [QUESTION]}
    prompt_fields = ("messages", "system")
    summary = "How many tokens a message has"
    answer = TokenCount
    accepted = PROMPT_FIELDS
    ignored = SERVICE_FIELDS
    only = NOT_SERVED
    body = object_of("messages", **PROMPT_BODY)

    def allowed_fields(self, body: dict[str, Any]) -> dict[str, Any]:
        kept = super().allowed_fields(body)
        check_own_tools(kept.get("tools"), ("custom",))
        check_blocks(kept.get("messages"))
        return kept

    def request_model(self, body: dict[str, Any]) -> str:
        return "vllm.entrypoints.anthropic.protocol:AnthropicCountTokensRequest"

    async def call(self, serving: Any, request: Any) -> Any:
        return await serving.anthropic_serving_messages.count_tokens(request)
