"""What the fake engine is asked and says: prompts, tokens, chunks and ends, without the engine."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from server.engine.calls import Call, EngineDied
from tests.support.fake_embeddings import POOLED, pooled_prompts

NATURAL_LENGTH = 8
VOCABULARY = 32


@dataclass
class Run:
    """A call in the engine. ``produced`` counts output tokens by part."""

    call: Call
    load_id: int | None
    shown: str
    prompts: list[int]
    choices: int
    limit: int
    natural_end: bool
    request: Any
    produced: dict[str, int] = field(default_factory=dict)
    aborted: bool = False
    going: asyncio.Event = field(default_factory=asyncio.Event)
    given_up: str | None = None
    lost: EngineDied | None = None

    @property
    def sequences(self) -> int:
        return self.choices * len(self.prompts)

    def token(self, i: int) -> str:
        return self.shown if i == 0 else f" {i}"

    def text(self, tokens: int) -> str:
        return "".join(self.token(i) for i in range(tokens))

    def settle(self) -> None:
        """Tells the meter all that was produced; needed before an abort forgets it."""
        for prompt, (part, tokens) in zip(self.prompts, self.produced.items(), strict=True):
            if tokens:
                said = 0 if self.call.kind in POOLED else tokens
                self.call.meter.progressed(part, prompt, said, 0)


def length_of(prompt: str | list[int]) -> int:
    return len(prompt) if isinstance(prompt, list) else len(prompt.split()) + 1


def text_of(prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else " ".join(map(str, prompt))


def checked(prompt: str | list[int], max_model_len: int) -> int:
    """Its tokens: as many as there are ids, or one per word and one more; raises what vLLM does."""
    from vllm.exceptions import VLLMValidationError

    if isinstance(prompt, list) and not all(0 <= token < VOCABULARY for token in prompt):
        raise VLLMValidationError("Token id is out of vocabulary", parameter="prompt")
    tokens = length_of(prompt)
    if tokens >= max_model_len:
        raise VLLMValidationError(
            f"The prompt has {tokens} tokens; the maximum context length is {max_model_len}.",
            parameter="prompt",
        )
    return tokens


def prompts_of(kind: str, request: Any) -> list[str | list[int]]:
    if kind == "responses":
        items = [request.input] if isinstance(request.input, str) else request.input
        return [" ".join(item if isinstance(item, str) else str(dict(item).get("content")) for item in items)]
    if kind not in ("completion", *POOLED):
        return [" ".join(str(message.get("content")) for message in request.messages)]
    given = pooled_prompts(request) if kind in POOLED else request.prompt
    prompts = given if isinstance(given, list) else [given]
    if not prompts:
        raise ValueError("there is no prompt")
    if isinstance(prompts[0], int):
        prompts = [prompts]
    return list(prompts)


def head(run: Run, *, stream: bool) -> dict[str, Any]:
    if run.call.kind != "completion":
        id_, object_ = f"chatcmpl-{run.call.id}", "chat.completion.chunk" if stream else "chat.completion"
    else:
        id_, object_ = f"cmpl-{run.call.id}", "text_completion"
    return {"id": id_, "object": object_, "created": 0, "model": run.call.public_model}


def chunk(run: Run, index: int, said: dict[str, Any], finish: str | None) -> dict[str, Any]:
    choice = {"index": index, **said, "logprobs": None, "finish_reason": finish}
    return {**head(run, stream=True), "choices": [choice]}


def finish_of(run: Run, i: int) -> str | None:
    if i != run.limit - 1:
        return None
    return "stop" if run.natural_end else "length"


def usage_of(run: Run) -> dict[str, int]:
    prompt, output = sum(run.prompts), sum(run.produced.values())
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def error_event(message: str, code: int) -> str:
    error = {"message": message, "type": "BadRequestError", "param": None, "code": code}
    return f"data: {json.dumps({'error': error})}\n\n"


def chat_events(run: Run, i: int) -> list[dict[str, Any]]:
    events = []
    if i == 0:
        for choice in range(run.sequences):
            events.append(chunk(run, choice, {"delta": {"role": "assistant", "content": ""}}, None))
    for choice in range(run.sequences):
        delta = {"delta": {"content": "" if run.aborted else run.token(i)}}
        events.append(chunk(run, choice, delta, finish_of(run, i)))
    return events


def completion_events(run: Run, i: int) -> list[dict[str, Any]]:
    text = "" if run.aborted else run.token(i)
    return [chunk(run, choice, {"text": text}, finish_of(run, i)) for choice in range(run.sequences)]
