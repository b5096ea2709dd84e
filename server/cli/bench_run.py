"""Sends the load of ``loraplex bench``, and notes what its clients feel."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from typing import Any

import httpx

from server.cli.bench_load import Asked, Load, Shot
from server.cli.bench_workloads import Bench, checked
from server.cli.client import RemoteError

# Common words, each about a token; random, so that no two prompts share a beginning worth caching.
_TEXT = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they"
    " which one you were all her she there would their we him been has when who will no more if out so up"
)
_WORDS = _TEXT.split()
# Seconds that the last answers are waited for.
_PATIENCE_S = 120.0
_NO_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None)


def run(url: str, keys: Sequence[str], models: Sequence[str], load: Load) -> list[Shot]:
    """All requests of ``load`` to ``models`` (all, if none are named) of ``keys``. RemoteError."""
    return asyncio.run(_run(url, keys, models, load))


def run_workload(
    url: str, keys: Sequence[str], models: Sequence[str], load: Load, name: str
) -> dict[str, list[Shot]]:
    """The requests of the workload ``name`` by its phases, in order. RemoteError."""
    return asyncio.run(_run_workload(url, keys, models, load, name))


async def _run_workload(
    url: str, keys: Sequence[str], models: Sequence[str], load: Load, name: str
) -> dict[str, list[Shot]]:
    async with httpx.AsyncClient(base_url=url, timeout=_PATIENCE_S, limits=_NO_LIMITS) as http:
        choices = await _choices(http, keys, models)
        workload = checked(name, choices)
        rng, began = random.Random(load.seed), time.monotonic()  # noqa: S311  a load, no secret

        async def ask(asked: Asked, max_tokens: int) -> Shot:
            shot = Shot(asked.model, time.monotonic() - began)
            prompt = " ".join(rng.choices(_WORDS, k=load.prompt_words))
            await _ask(http, asked, prompt, max_tokens, shot, began)
            return shot

        bench = Bench(ask, choices, load, rng, {})
        await workload(bench)
        return bench.phases


async def _run(url: str, keys: Sequence[str], models: Sequence[str], load: Load) -> list[Shot]:
    async with httpx.AsyncClient(base_url=url, timeout=_PATIENCE_S, limits=_NO_LIMITS) as http:
        choices = await _choices(http, keys, models)
        rng, began = random.Random(load.seed), time.monotonic()  # noqa: S311  a load, no secret
        picks, shots, tasks = load.picks(choices, rng), [], []
        async for _ in load.due(rng, began):
            asked = next(picks)
            shots.append(Shot(asked.model, time.monotonic() - began))
            prompt = " ".join(rng.choices(_WORDS, k=load.prompt_words))
            tasks.append(asyncio.create_task(_ask(http, asked, prompt, load.max_tokens, shots[-1], began)))
        await asyncio.gather(*tasks)
        return shots


async def _choices(http: httpx.AsyncClient, keys: Sequence[str], models: Sequence[str]) -> list[Asked]:
    """Each key's models, of ``models`` if any are named; RemoteError where there are none of one of them."""
    found = []
    for key in keys:
        answer = await _get(http, "/v1/models", key)
        known = [str(one["id"]) for one in answer["data"]]
        found += [Asked(name, key) for name in models or known if not models or _is_of(name, known)]
    missing = sorted(set(models) - {asked.model for asked in found})
    if missing or not found:
        which = ", ".join(missing) or "a model"
        raise RemoteError("no_models", f"None of the keys may ask for {which}.")
    return found


def _is_of(name: str, known: Sequence[str]) -> bool:
    """Neither a version nor ``default`` is in a list of models."""
    return name == "default" or name.split("@")[0] in known


async def _get(http: httpx.AsyncClient, path: str, key: str) -> Any:
    try:
        answer = await http.get(path, headers={"Authorization": f"Bearer {key}"})
    except httpx.HTTPError as exc:
        raise RemoteError("no_connection", f"{http.base_url}: {exc or type(exc).__name__}") from exc
    if not answer.is_success:
        raise RemoteError(_code_of(answer), f"{http.base_url} did not list its models.")
    return answer.json()


async def _ask(
    http: httpx.AsyncClient, asked: Asked, prompt: str, max_tokens: int, shot: Shot, began: float
) -> None:
    body = {
        "model": asked.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Authorization": f"Bearer {asked.key}"}
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
            if not answer.is_success:
                await answer.aread()
                shot.error = _code_of(answer)
                return
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    _take(shot, json.loads(line[6:]), time.monotonic() - began)
    except httpx.HTTPError as exc:
        shot.error = type(exc).__name__
    finally:
        shot.ended = time.monotonic() - began


def _take(shot: Shot, chunk: dict[str, Any], now: float) -> None:
    """Notes a chunk; thoughts are pieces of an answer too."""
    if error := chunk.get("error"):
        shot.error = str(error.get("code"))
    if usage := chunk.get("usage"):
        shot.tokens = usage["completion_tokens"]
    deltas = [choice["delta"] for choice in chunk.get("choices", ())]
    if any(delta.get("content") or delta.get("reasoning") for delta in deltas):
        shot.chunks.append(now)


def _code_of(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return f"http_{answer.status_code}"
