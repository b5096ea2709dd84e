"""Requests of every sort, each asked alone and then all at once: who else asks must change nothing.

Only what a request says decides its answer: greedy ones, and others by a seed. Answers are compared word by
word, and numbers within ``CLOSE``, which is far above what float32 rounds otherwise in a larger batch.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx

from tests.support.site import bearer

CLOSE = 1e-3
FORBIDDEN = -9999.0  # how the logarithm of 0 is told
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
_WORDS = "The capital of France is a red fox, which jumps 12 times over green hills; why not? Say so."
_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
_STRUCTURES: list[dict[str, Any]] = [
    {"json": _SCHEMA},
    {"regex": "[a-f]{3,9}"},
    {"choice": ["alpha", "beta"]},
]
# Differs with each answer and says nothing about it; among tokens that are nearly as likely a rank does too.
_PASSING = {"id", "created", "system_fingerprint", "cached_tokens", "prompt_tokens_details", "rank"}


@dataclass(frozen=True)
class Request:
    """``key``: whose it is."""

    key: str
    url: str
    body: Mapping[str, Any]


def draw(random: Random, keys: Sequence[str], models: Sequence[str]) -> Request:
    """One that is answered, of a base that thinks, with the names of tokens below 200 in its vocabulary."""

    def some(share: float) -> bool:
        return random.random() < share

    def words(most: int) -> str:
        return " ".join(random.choices(_WORDS.split(), k=random.randint(1, most)))

    most = random.randint(1, 8)
    body: dict[str, Any] = {"model": random.choice(models), "max_tokens": most, "temperature": 0}
    if some(0.6):
        body |= {"temperature": random.choice([0.7, 1.5]), "seed": random.randint(0, 999)}
    for name, values in (
        ("top_p", [0.3, 0.9]), ("top_k", [1, 40]), ("min_p", [0.05, 0.3]), ("presence_penalty", [-1, 2]),
        ("frequency_penalty", [-1, 2]), ("repetition_penalty", [0.8, 1.3]), ("min_tokens", [1, most]),
        ("logit_bias", [{"20": -100}, {"21": 9, "44": 12}]), ("stop_token_ids", [[30, 31], [40]]),
        ("stop", [["a"], ["e", "the"]]), ("bad_words", [["a"], ["the", " fox"]]), ("ignore_eos", [True]),
        ("allowed_token_ids", [list(range(30, 90))]), ("truncate_prompt_tokens", [3, 9]),
        ("return_token_ids", [True]),
    ):  # fmt: skip
        if some(0.15):
            body[name] = random.choice(values)
    if body["temperature"] and some(0.2):
        body["n"] = 2
    if some(0.3):
        body["stream"] = True
    elif some(0.2):
        body["prompt_logprobs"] = random.choice([0, 2])
    if some(0.5):
        body["messages"] = [{"role": "user", "content": words(30)}]
        if some(0.3):
            body["thinking_token_budget"] = random.randint(0, 4)
        elif some(0.3):
            body["structured_outputs"] = random.choice(_STRUCTURES)
            body["chat_template_kwargs"] = {"enable_thinking": False}
            body = {name: value for name, value in body.items() if name not in ("allowed_token_ids",)}
        body["logprobs"] = some(0.7)
        if body["logprobs"]:
            body |= random.choice([{"top_logprobs": 3}, {"top_logprobs": 1}, {"logprob_token_ids": [25, 9]}])
        return Request(random.choice(keys), CHAT, body)
    body["prompt"] = random.choice(
        [words(40), random.choices(range(20, 200), k=random.randint(1, 40)), [words(4), words(9)]]
    )
    if some(0.7):
        body["logprobs"] = random.choice([0, 2, 5])
        body["echo"] = "prompt_logprobs" not in body and some(0.5)
    return Request(random.choice(keys), TEXT, body)


async def ask(http: httpx.AsyncClient, one: Request) -> Any:
    """Its answer without what passes; that of a stream as if it had come at once. Raises AssertionError."""
    said = await http.post(one.url, json=one.body, headers=bearer(one.key))
    assert said.status_code == 200, f"{one}: {said.text}"
    if not one.body.get("stream"):
        return _kept(said.json())
    lines = [line.removeprefix("data: ") for line in said.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]", f"{one}: {said.text}"
    return _joined(map(json.loads, lines))


async def asked_together(
    http: httpx.AsyncClient, random: Random, asked: Sequence[Request], others: Sequence[Request]
) -> list[Any]:
    """The answers to ``asked``, sent in random order beside ``others``, whose clients go away early."""

    async def leave(one: Request) -> None:
        asking = asyncio.create_task(ask(http, one))
        await asyncio.wait([asking], timeout=random.random() / 4)
        asking.cancel()
        await asyncio.wait([asking])

    order = random.sample(range(len(asked)), len(asked))
    found = await asyncio.gather(*(ask(http, asked[place]) for place in order), *map(leave, others))
    answers = dict(zip(order, found, strict=False))
    return [answers[place] for place in range(len(asked))]


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Between two answers, each with the place where it is."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            line
            for name in sorted(one.keys() | other.keys())
            for line in differences(one.get(name), other.get(name), f"{where}.{name}")
        ]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [line for place, pair in pairs for line in differences(*pair, f"{where}[{place}]")]
    if isinstance(one, float) and isinstance(other, float) and abs(one - other) <= CLOSE:
        return []
    return [] if one == other else [f"{where}: {one!r} alone, {other!r} in company"]


def _kept(told: Any) -> Any:
    """Without what passes; and of a chat's most likely tokens without those that a grammar forbids, all of
    which are as unlikely as each other: which of them are shown depends on how many rows torch sorts."""
    if isinstance(told, dict):
        tops = told.get("top_logprobs")
        if isinstance(tops, list) and "token" in told:
            told = {**told, "top_logprobs": [one for one in tops if one["logprob"] > FORBIDDEN]}
        return {name: _kept(value) for name, value in told.items() if name not in _PASSING}
    return [_kept(value) for value in told] if isinstance(told, list) else told


def _joined(events: Any) -> dict[int, dict[str, Any]]:
    """By choice: its text, its thought, its log-probabilities and how it ended, however they were cut."""
    found: dict[int, dict[str, Any]] = {}
    for event in events:
        assert "choices" in event, event
        for choice in event["choices"]:
            one = found.setdefault(choice["index"], {"text": "", "thought": "", "told": [], "end": None})
            delta = choice.get("delta") or {}
            one["text"] += choice.get("text") or delta.get("content") or ""
            one["thought"] += delta.get("reasoning") or ""
            one["end"] = choice["finish_reason"] or one["end"]
            told = choice.get("logprobs") or {}
            if "content" in told:
                one["told"] += _kept(told["content"])
            elif told:
                tops = told["top_logprobs"] or [None] * len(told["tokens"])
                one["told"] += map(list, zip(told["tokens"], told["token_logprobs"], tops, strict=True))
    return found
