"""What suites of an engine ask it, and how they read what it answers."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from server.engine.calls import Answer, Call, Kind, PageOp, StageResult
from server.engine.engine import Engine
from server.errors import Unavailable

MakeAdapter = Callable[[int], Path]

# Far from the ids that a plan gives out.
new_ids = itertools.count(1_000_000)
PUBLIC = "my-adapter"


@dataclass
class RecordingMeter:
    """part -> (prompt tokens, output tokens); why answers ended."""

    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    reasons: list[str | None] = field(default_factory=list)

    def finished(self, reasons: Sequence[str | None]) -> None:
        self.reasons += reasons

    def progressed(self, part: str, prompt_tokens: int, output_tokens: int, cached_tokens: int) -> None:
        before = self.parts.get(part, (0, 0))
        self.parts[part] = max(before[0], prompt_tokens), max(before[1], output_tokens)

    @property
    def prompt(self) -> int:
        return sum(prompt for prompt, _ in self.parts.values())

    @property
    def output(self) -> int:
        return sum(output for _, output in self.parts.values())

    def usage(self) -> tuple[int, int]:
        return self.prompt, self.output


def stage(folder: Path | str, name: str = "") -> PageOp:
    load_id = next(new_ids)
    return PageOp("stage", load_id, name or f"tenant/adapter@{load_id}", str(folder))


def then(verb: Any, staged: PageOp) -> PageOp:
    return PageOp(verb, staged.load_id)


async def read_in(
    engine: Engine, *loads: PageOp, and_then: tuple[PageOp, ...] = ()
) -> dict[int, StageResult]:
    """Stages ``loads``, does ``and_then`` in the same call, and waits until each is staged or has failed."""
    report = await engine.page([*loads, *and_then])
    assert [result.error for result in report.results] == [None] * len(report.results)
    wanted = {load.load_id for load in loads} - {op.load_id for op in and_then}
    seen = {result.load_id: result for result in report.staged}
    async with asyncio.timeout(240):
        while wanted - seen.keys():
            await asyncio.sleep(0.005)
            for result in (await engine.page([])).staged:
                assert result.load_id not in seen, "a load is reported once"
                seen[result.load_id] = result
    return seen


async def bring_in(engine: Engine, folder: Path) -> PageOp:
    """A version in a slot."""
    load = stage(folder)
    assert (await read_in(engine, load))[load.load_id].error is None
    (activated,) = (await engine.page([then("activate", load)])).results
    assert activated.error is None
    return load


def call(engine: Engine, kind: Kind, body: dict[str, Any], load: PageOp | None) -> tuple[Call, Any]:
    """(call, vLLM's request) for ``body`` on ``load``, or on the base model."""
    model = engine.base.name if load is None else load.name
    made = Call(f"suite-{next(new_ids)}", kind, model, PUBLIC, "salt-of-the-suite", RecordingMeter())
    request = engine.parse(kind, body)
    made.resumable = engine.resumable(request)
    return made, request


def meter_of(made: Call) -> RecordingMeter:
    assert isinstance(made.meter, RecordingMeter)
    return made.meter


async def ask(
    engine: Engine, kind: Kind, body: dict[str, Any], load: PageOp | None
) -> tuple[Answer, RecordingMeter]:
    made, request = call(engine, kind, body, load)
    return await engine.answer(made, request), meter_of(made)


async def events(answer: Answer) -> list[dict[str, Any]]:
    """The events of a stream that ends as it should."""
    assert answer.stream is not None
    chunks = [chunk async for chunk in answer.stream]
    assert chunks[-1] == "data: [DONE]\n\n"
    assert all(chunk.startswith("data: ") and chunk.endswith("\n\n") for chunk in chunks)
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks[:-1]]


def said(body: dict[str, Any], choice: int = 0) -> str:
    one = body["choices"][choice]
    return str(one["message"]["content"] if "message" in one else one["text"])


def spoken(chunks: list[dict[str, Any]], choice: int = 0) -> str:
    """The text of one choice of a stream."""
    mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice]
    return "".join(c["delta"].get("content") or "" if "delta" in c else c["text"] for c in mine)


LOGPROBS: dict[Kind, dict[str, Any]] = {
    "chat": {"logprobs": True, "top_logprobs": 2},
    "completion": {"logprobs": 2},
}


async def whole(answer: Answer) -> dict[str, Any]:
    """All that a client can tell of an answer, less ids and times, however its tokens came in chunks.

    Of log-probabilities ``numbers`` holds the numbers, and ``marks`` the rest.
    """
    documents = [answer.body] if answer.body is not None else await events(answer)
    told: dict[str, Any] = {"text": "", "marks": [], "numbers": [], "ends": [], "usage": None, "errors": []}
    logprobs: dict[str, list[Any]] = {}
    for document in documents:
        assert document is not None
        told["usage"] = document.get("usage") or told["usage"]
        told["errors"] += [document["error"]] if "error" in document else []
        for choice in document.get("choices", ()):
            said_ = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            told["text"] += said_.get("content") or ""
            told["ends"] += [choice["finish_reason"]] if choice.get("finish_reason") else []
            for name, values in (choice.get("logprobs") or {}).items():
                logprobs.setdefault(name, []).extend(values or ())
    _sort_out(logprobs, told)
    return told


def _sort_out(value: Any, told: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, one in value.items():
            told["marks"].append(key)
            _sort_out(one, told)
    elif isinstance(value, list):
        for one in value:
            _sort_out(one, told)
    elif value is not None:
        told["numbers" if isinstance(value, float) else "marks"].append(value)


def same(told: dict[str, Any], other: dict[str, Any]) -> bool:
    """Log-probabilities may differ by what another order of additions makes of them."""
    return told == other | {"numbers": pytest.approx(other["numbers"], abs=5e-3)}


async def read_all(engine: Engine, made: Call, request: Any) -> dict[str, Any]:
    return await whole(await engine.answer(made, request))


async def given_up(engine: Engine, made: Call, reading: asyncio.Task[Any]) -> None:
    """Pauses what ``reading`` reads once it has begun, and gives it up: whoever reads it is told why."""
    while meter_of(made).output == 0:
        await asyncio.sleep(0.001)
        engine.poll(made)
    assert await engine.pause(made)
    await engine.give_up(made, "it is gone")
    with pytest.raises(Unavailable, match="it is gone"):
        await reading


async def until(engine: Engine, made: Call, tokens: int) -> None:
    """Wait until it has produced so many."""
    while meter_of(made).output < tokens:
        await asyncio.sleep(0.001)
        engine.poll(made)


# Without the tokens that end an answer, so that its length is known.
ENDLESS = {"temperature": 0, "logit_bias": {"0": -100, "2": -100}}
QUESTION: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Name three colours."}],
    "max_tokens": 5,
    **ENDLESS,
}
TEXT: dict[str, Any] = {"prompt": "Red, green and", "max_tokens": 5, **ENDLESS}
BODIES: list[tuple[Kind, dict[str, Any]]] = [("chat", QUESTION), ("completion", TEXT)]
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
kinds = pytest.mark.parametrize(("kind", "body"), BODIES, ids=["chat", "completion"])
