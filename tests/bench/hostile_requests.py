"""More kinds of hostile input, which were found from outside: ``tests.bench.hostile`` names them all.

Each is a coroutine as those of ``hostile``: it attacks once, and returns what came back.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
from typing import Any

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from tests.bench.hostile_wire import MIB, Outcomes, Victim, head, post, raw, together

LARGE = 4 * MIB - 4096  # what a body may have
NUMBERS = (2**31, 2**40, 2**63, 2**64, 10**30, 1.5, "1", True, [1], {"a": 1})
FIELDS = {
    "/v1/chat/completions": ("max_tokens", "n", "top_k", "thinking_token_budget", "top_logprobs"),
    "/v1/completions": ("max_tokens", "min_tokens", "prompt_logprobs", "truncate_prompt_tokens"),
    "/v1/responses": ("max_output_tokens", "top_logprobs", "max_tool_calls"),
    "/v1/messages": ("max_tokens", "top_k"),
}


async def large_constraints(victim: Victim) -> Outcomes:
    """Megabytes of choices, of a grammar's lines, of a structural tag and of a schema written as text."""
    objects = json.dumps({"enum": [{"a": [n]} for n in range(100_000)]})
    tag = {"type": "structural_tag", "triggers": ["<a>"], "structures": [{"begin": "<a>", "end": "</a>"}]}
    tag["structures"][0]["schema"] = json.loads(objects)  # type: ignore[index]
    constraints: list[dict[str, Any]] = [
        {"choice": ["x" * (LARGE // 1024 - 8)] * 1024},
        {"grammar": "\n".join(f"a{n}: b" for n in range(300_000))},
        {"structural_tag": json.dumps(tag)},
        {"json": objects},
        {"json": {"enum": list(range(250_000))}},
        {"json": {"$ref": "http://127.0.0.1:1/schema.json"}},
        {"regex": "a|" * (LARGE // 2 - 100)},
    ]
    small = {"model": victim.base_name, "prompt": "x", "max_tokens": 1}
    return await together(
        *(post(victim, "/v1/completions", json=small | {"structured_outputs": c}) for c in constraints)
    )


async def numbers_that_are_none(victim: Victim) -> Outcomes:
    """Whole numbers beyond 32 and 64 bits, and what could be read as one, in every field that takes one."""
    prompts: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "x"},
        "/v1/responses": {"input": "x"},
    }
    turns = {"messages": [{"role": "user", "content": "x"}]}
    sent = []
    for path, fields in FIELDS.items():
        for field in fields:
            for number in NUMBERS:
                body = {"model": victim.base_name, **prompts.get(path, turns), field: number}
                if path == "/v1/messages":
                    body = {"max_tokens": 1, **body}
                sent.append(post(victim, path, json=body))
    return await together(*sent)


async def two_readings(victim: Victim) -> Outcomes:
    """Heads that a proxy and a server may read differently: two lengths or hosts, folded lines, trailers."""
    path, own = "/v1/completions", f"Authorization: Bearer {victim.attacker}"
    body = json.dumps({"model": victim.base_name, "prompt": "x", "max_tokens": 1}).encode()
    length, chunked = f"Content-Length: {len(body)}", "Transfer-Encoding: chunked"
    pieces = b"%x\r\n%s\r\n0\r\n" % (len(body), body)
    hidden = f"GET /v1/models HTTP/1.1\r\nHost: a\r\n{own}\r\n\r\n".encode()
    upgrade = ("Connection: Upgrade", "Upgrade: h2c", f"Content-Length: {len(hidden)}")
    return await together(
        raw(victim, head(path, own, length, "Content-Length: 3"), body),
        raw(victim, head(path, own, length, chunked), pieces + b"\r\n"),
        raw(victim, head(path, own, "Content-Length : 3"), body),
        raw(victim, head(path, own, length, "Host: b"), body),
        raw(victim, head(path, own, length, "X-A: b\r\n c"), body),
        raw(victim, head("/v1/messages", own, length, f"x-api-key: {victim.control}"), body),
        raw(victim, head(path, chunked), pieces + own.encode() + b"\r\n\r\n"),
        raw(victim, head(path, own, *upgrade), hidden),
    )


async def archives_of_nothing(victim: Victim) -> Outcomes:
    """Zips and tars that grow a thousand times, lead outside, or hold what is no adapter; broken headers."""
    zeros = b"\0" * (64 * MIB)
    config = b"{}"
    archives = [
        _zip({CONFIG_FILE: config, WEIGHTS_FILE: zeros}),
        _zip({CONFIG_FILE: b" " * (64 * MIB), WEIGHTS_FILE: b"x"}),
        _zip({f"../../{CONFIG_FILE}": config, f"../../{WEIGHTS_FILE}": b"x"}),
        _zip({f"f{n}": b"" for n in range(50_000)}),
        _tar(WEIGHTS_FILE, "/etc/passwd"),
    ]
    kind = {"Content-Type": "application/zip"}
    sent = [
        post(victim, f"/v1/adapters/archive{n}/versions", content=archive, headers=kind)
        for n, archive in enumerate(archives)
    ]
    headers = [
        struct.pack("<Q", 100 * MIB) + b"{",
        b"\xff" * 64,
        struct.pack("<Q", 2 * MIB) + b'{"a":' + b"[" * (2 * MIB - 5),
    ]
    for number, weights in enumerate(headers):
        files = {name: (name, data) for name, data in ((CONFIG_FILE, config), (WEIGHTS_FILE, weights))}
        sent.append(post(victim, f"/v1/adapters/header{number}/versions", files=files))
    return await together(*sent)


def _zip(entries: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return made.getvalue()


def _tar(link: str, target: str) -> bytes:
    """With a symbolic link where the weights should be."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as file:
        entry = tarfile.TarInfo(link)
        entry.type, entry.linkname = tarfile.SYMTYPE, target
        file.addfile(entry)
    return made.getvalue()
