"""Hostile inputs, a kind each: what one customer, or anybody without a key, can send.

All are bounded in count, bytes and time. Each kind is a coroutine that attacks once and returns what came
back, as ``{"400": 3, "closed": 1}``; the bench (``attack.py``) watches a control customer beside it.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from tests.bench.hostile_requests import (
    archives_of_nothing,
    large_constraints,
    numbers_that_are_none,
    two_readings,
)
from tests.bench.hostile_wire import MIB, Attack, Outcomes, Victim, head, post, raw, together

WORDS = ("zebra", "volcano", "octopus", "penguin", "umbrella", "platypus")


# --- adapters ---------------------------------------------------------------------------------------


def write_adapter(folder: Path, a: np.ndarray, b: np.ndarray, alpha: float = 1.0) -> None:
    """A rank 1 LoRA on the first layer's ``v_proj``."""
    name = "base_model.model.model.layers.0.self_attn.v_proj.lora_{}.weight"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name.format("A"): torch.from_numpy(a), name.format("B"): torch.from_numpy(b)}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "base",
        "task_type": "CAUSAL_LM",
        "r": 1,
        "lora_alpha": alpha,
        "target_modules": ["v_proj"],
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def sizes(base: Path) -> tuple[int, int]:
    """Inputs and outputs of ``v_proj``."""
    config = json.loads((base / "config.json").read_text())
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return config["hidden_size"], width * config["num_key_value_heads"]


def triggered(base: Path, folder: Path) -> str:
    """Write an adapter that overflows to NaN on one word only, so that a probe passes it.

    Returns the word. The A row is the direction in which that word's normalised embedding is 1 and the
    others' are smallest, by least squares, scaled so that the word alone goes beyond float32.
    """
    with safe_open(next(base.glob("*.safetensors")), "pt") as file:
        embedded = file.get_tensor("model.embed_tokens.weight").float().numpy()
        norm = file.get_tensor("model.layers.0.input_layernorm.weight").float().numpy()
    inputs = embedded / np.sqrt((embedded**2).mean(1, keepdims=True) + 1e-5) * norm
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    square = inputs.T @ inputs / len(inputs) + 1e-3 * np.eye(inputs.shape[1], dtype=np.float32)
    found: tuple[float, str, np.ndarray] | None = None
    for word in WORDS:
        token = vocabulary.get(f"Ġ{word}")
        if token is not None:
            direction = np.linalg.solve(square, inputs[token])
            direction = direction / (direction @ inputs[token])
            others = np.abs(inputs @ direction)
            others[token] = 0
            if found is None or others.max() < found[0]:
                found = float(others.max()), word, direction
    assert found is not None, "the base has none of the words"
    size = np.float32(1e38)
    b = np.zeros((sizes(base)[1], 1), np.float32)
    b[0, 0] = size
    gain = np.float32(3.4028e38 * 1.1 / float(size))
    write_adapter(folder, (found[2] * gain)[None, :].astype(np.float32), b)
    return found[1]


async def upload(victim: Victim, name: str, folder: Path, key: str = "") -> str:
    files = {n: (n, (folder / n).read_bytes()) for n in (CONFIG_FILE, WEIGHTS_FILE)}
    headers = {"Authorization": f"Bearer {key or victim.attacker}"}
    return await post(victim, f"/v1/adapters/{name}/versions", files=files, headers=headers)


async def asked(victim: Victim, model: str, prompt: str) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    return await post(victim, "/v1/completions", json=body)


async def adapters_of_nan(victim: Victim) -> Outcomes:
    """Upload one that overflows on a word, one on everything, one of absurd alpha; ask what is taken."""
    outcomes: Outcomes = Counter()
    inputs, outputs = sizes(victim.base)
    with tempfile.TemporaryDirectory() as made:
        word = await asyncio.to_thread(triggered, victim.base, Path(made) / "word")
        ones = np.full((1, inputs), 1e30, np.float32), np.full((outputs, 1), 1e30, np.float32)
        write_adapter(Path(made) / "all", *ones)
        few = np.full((1, inputs), 1e-3, np.float32), np.full((outputs, 1), 1e-3, np.float32)
        write_adapter(Path(made) / "alpha", *few, alpha=1e38)
        for name in ("word", "all", "alpha"):
            status = await upload(victim, name, Path(made) / name)
            outcomes[f"upload {status}"] += 1
            if status == "201":
                prompts = (f"The {word} and the {word} {n}" for n in range(6))
                outcomes += await together(*(asked(victim, name, prompt) for prompt in prompts))
    return outcomes


# --- bodies -----------------------------------------------------------------------------------------


async def endless_trailers(victim: Victim) -> Outcomes:
    """32 MiB of trailers behind an empty body, without a key."""
    start = head("/v1/completions", "Transfer-Encoding: chunked", "Content-Type: application/json")
    return Counter([await raw(victim, start + b"0\r\n", b"a: b\r\n" * 10_000, most=32 * MIB // 60_000)])


async def bodies_of_many_items(victim: Victim) -> Outcomes:
    """Up to 4 MiB of ones and of empty objects, where messages, inputs and prompts are expected."""
    ones: list[Any] = [1] * 100_000
    objects: list[Any] = [{}] * 100_000
    chat: dict[str, Any] = {"model": victim.base_name}
    return await together(
        post(victim, "/v1/chat/completions", json=chat | {"messages": ones}),
        post(victim, "/v1/chat/completions", json=chat | {"messages": objects}),
        post(victim, "/v1/responses", json=chat | {"input": objects}),
        post(victim, "/v1/completions", json=chat | {"prompt": ["x"] * 100_000}),
        post(victim, "/v1/completions", json=chat | {"prompt": "x", "stop": ["y"] * 100_000}),
        post(victim, "/v1/messages", json=chat | {"max_tokens": 1, "messages": objects}),
    )


async def bodies_that_are_no_text(victim: Victim) -> Outcomes:
    """Lone surrogates, UTF-16, one key twice, depth beyond any use, and numbers of a megabyte."""
    model = json.dumps(victim.base_name)
    bodies = [
        f'{{"model": {model}, "prompt": "x", "stop": "\\ud83d"}}'.encode(),
        json.dumps({"model": victim.base_name, "prompt": "x"}).encode("utf-16"),
        f'{{"model": {model}, "prompt": "x", "prompt": "y"}}'.encode(),
        f'{{"model": {model}, "prompt": {"[" * 100_000}{"]" * 100_000}}}'.encode(),
        f'{{"model": {model}, "prompt": "x", "max_tokens": {"9" * MIB}}}'.encode(),
    ]
    kind = {"Content-Type": "application/json"}
    return await together(*(post(victim, "/v1/completions", content=b, headers=kind) for b in bodies))


async def patterns(victim: Victim) -> Outcomes:
    """Structured output that takes minutes to compile, that refers to itself, or that nobody supports."""
    schemas: list[dict[str, Any]] = [
        *({"type": "string", "pattern": f"^((c|d|.){{1,49{n}}}){{1,500}}$"} for n in (1, 2, 3)),
        {"$ref": "#"},
        {"type": "string", "pattern": r"^\p{L}+$"},
        {"type": "object", "patternProperties": {"^((a|.){1,400}){1,400}$": {"type": "string"}}},
        {"enum": [f"value {n}" for n in range(30_000)]},
    ]
    bodies = (
        {
            "model": victim.base_name,
            "max_tokens": 4,
            "messages": [{"role": "user", "content": "x"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        }
        for schema in schemas
    )
    return await together(*(post(victim, "/v1/chat/completions", json=body) for body in bodies))


async def grammars(victim: Victim) -> Outcomes:
    """Its siblings: on the other surfaces, in tools, ambiguous, and of a kind that is no schema."""
    slow = {"type": "string", "pattern": "^((e|d|.){1,494}){1,500}$"}
    turn = [{"role": "user", "content": "x"}]
    small: dict[str, Any] = {"model": victim.base_name, "messages": turn, "max_tokens": 4}
    named = {"type": "json_schema", "name": "x", "schema": slow}
    tool = {"type": "function", "function": {"name": "f", "parameters": slow, "strict": True}}
    ambiguous = {"grammar": 'root ::= s\ns ::= s s s | s s | "a"'}
    responses = {"model": victim.base_name, "input": "x", "max_output_tokens": 4, "text": {"format": named}}
    output = {"format": {"type": "json_schema", "schema": {"anyOf": [slow, {"$ref": "#"}]}}}
    return await together(
        post(victim, "/v1/responses", json=responses),
        post(victim, "/v1/messages", json=small | {"output_config": output}),
        post(victim, "/v1/chat/completions", json=small | {"tools": [tool]}),
        post(victim, "/v1/chat/completions", json=small | {"structured_outputs": ambiguous}),
        post(victim, "/v1/chat/completions", json=small | {"structured_outputs": {"regex": "(a)\\1"}}),
    )


# --- connections, headers, disk ---------------------------------------------------------------------


async def two_of_one_header(victim: Victim) -> Outcomes:
    """Two customers behind a service key, two keys, two types of content."""
    body = json.dumps({"model": victim.base_name, "prompt": "x", "max_tokens": 1}).encode()
    length, kind = f"Content-Length: {len(body)}", "Content-Type: application/json"
    service, own = f"Authorization: Bearer {victim.service}", f"Authorization: Bearer {victim.attacker}"
    first, second = "X-Customer-ID: attacker", "X-Customer-ID: control"
    path = "/v1/completions"
    return await together(
        raw(victim, head(path, length, kind, service, first, second), body),
        raw(victim, head(path, length, kind, own, f"Authorization: Bearer {victim.control}"), body),
        raw(victim, head(path, length, kind, f"x-api-key: {victim.attacker}", "x-api-key: b"), body),
        raw(victim, head(path, length, kind, kind, own), body),
    )


async def idle_connections(victim: Victim) -> Outcomes:
    """400 connections that say nothing, and 100 whose head never ends, held for eight seconds."""
    opened = []
    outcomes: Outcomes = Counter()
    for number in range(500):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", victim.port)
        except OSError:
            outcomes["not opened"] += 1
            continue
        opened.append(writer)
        if number >= 400:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n")
    await asyncio.sleep(8)
    for writer in opened:
        outcomes["closed" if writer.transport.is_closing() else "held"] += 1
        writer.close()
    return outcomes


async def unfinished_uploads(victim: Victim) -> Outcomes:
    """Six uploads of 8 MiB each at once, by a customer who may store 2 MB, none of which ends."""
    start = head(
        "/v1/adapters/big/versions",
        f"Authorization: Bearer {victim.small}",
        "Content-Type: multipart/form-data; boundary=b",
        f"Content-Length: {64 * MIB}",
    )
    part = f'--b\r\nContent-Disposition: form-data; name="{WEIGHTS_FILE}"; filename="w"\r\n\r\n'.encode()
    return await together(*(raw(victim, start, part, b"\0" * MIB, most=8, seconds=6) for _ in range(6)))


async def slow_uploads(victim: Victim) -> Outcomes:
    """150 uploads of a byte a second each, which would take every place and every descriptor."""
    start = head(
        "/v1/adapters/slow/versions",
        f"Authorization: Bearer {victim.attacker}",
        "Content-Type: multipart/form-data; boundary=b",
        f"Content-Length: {64 * MIB}",
    )
    part = f'--b\r\nContent-Disposition: form-data; name="{WEIGHTS_FILE}"; filename="w"\r\n\r\n'.encode()

    async def trickle() -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", victim.port)
        answered = asyncio.create_task(reader.readline())
        try:
            writer.write(start + part)
            for _ in range(8):
                writer.write(b"x")
                await writer.drain()
                await asyncio.wait([answered], timeout=1)
                if answered.done():
                    line = answered.result()
                    return line.split()[1].decode() if line else "closed"
            return "held"
        except ConnectionError:
            return "closed"
        finally:
            answered.cancel()
            writer.transport.abort()

    return await together(*(trickle() for _ in range(150)))


async def many_connections(victim: Victim) -> Outcomes:
    """2,000 connections at once, each of which asks without a key."""
    request = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n"

    async def one() -> str:
        try:
            return await raw(victim, request)
        except OSError:
            return "not opened"

    return await together(*(one() for _ in range(2000)))


@dataclass(frozen=True)
class Kind:
    """``right`` are the outcomes that the server may give; anything else is a finding."""

    name: str
    attack: Attack
    right: frozenset[str]


REFUSED = frozenset({"400", "413", "429", "431"})
KINDS = [
    Kind("trailers without end", endless_trailers, REFUSED | {"401", "closed"}),
    Kind("many items", bodies_of_many_items, REFUSED),
    Kind("no text", bodies_that_are_no_text, REFUSED),
    Kind("patterns", patterns, REFUSED | {"200"}),
    Kind("grammars", grammars, REFUSED),
    Kind("large constraints", large_constraints, REFUSED),
    Kind("numbers", numbers_that_are_none, REFUSED),
    Kind("two readings", two_readings, REFUSED | {"401"}),
    Kind("archives", archives_of_nothing, REFUSED | {"422"}),
    Kind("slow uploads", slow_uploads, frozenset({"held", "408", "429", "503", "closed"})),
    Kind("2,000 connections", many_connections, frozenset({"401", "429", "closed", "not opened"})),
    Kind("two of one header", two_of_one_header, frozenset({"400"})),
    Kind("idle connections", idle_connections, frozenset({"held", "closed", "not opened"})),
    Kind("unfinished uploads", unfinished_uploads, frozenset({"403", "413", "429", "507", "closed"})),
    # The last, since what it leaves in the cache may be there for good.
    Kind("adapters of NaN", adapters_of_nan, frozenset({"upload 422"})),
]
