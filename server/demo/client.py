"""What the demo asks of a running server, over HTTP alone, as any operator or customer would."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from adapters.store.digests import digest_of

KEY_NAME = "demo"
LONGEST_ANSWER = 60  # tokens


class DemoError(Exception):
    """The demo cannot go on; the message is for the person who started it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """``first_token`` and ``total`` are seconds since the question was sent."""

    text: str
    first_token: float
    total: float


async def create_customer(admin: httpx.AsyncClient, tenant: str, adapter: str, folder: Path) -> str:
    """Tenant, key and adapter, each made if it is not there yet; returns the key.

    ``folder`` holds the adapter's two files. Keys of earlier runs are revoked, since no key is ever
    shown twice. Raises DemoError with the server's own words for whatever it refuses.
    """
    _accept(await admin.post("/admin/v1/tenants", json={"id": tenant}), 201, 409)
    keys = f"/admin/v1/tenants/{tenant}/keys"
    for key in _accept(await admin.get(keys), 200).json()["data"]:
        if key["name"] == KEY_NAME:
            _accept(await admin.delete(f"{keys}/{key['id']}"), 204)
    await _upload(admin, f"/admin/v1/tenants/{tenant}/adapters/{adapter}", folder)
    issued: str = _accept(await admin.post(keys, json={"name": KEY_NAME}), 201).json()["key"]
    return issued


async def _upload(admin: httpx.AsyncClient, path: str, folder: Path) -> None:
    found = _accept(await admin.get(path), 200, 404)
    if found.status_code == 200:
        shown = found.json()
        live = [v["digest"] for v in shown["versions"] if v["version"] == shown["live"]]
        if live == [digest_of(folder)]:
            return
    files = {name: (name, (folder / name).read_bytes()) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    _accept(await admin.post(f"{path}/versions", files=files), 201)


async def ask(client: httpx.AsyncClient, key: str, model: str, question: str) -> Answer:
    """The streamed answer, greedily decoded and cut off after ``LONGEST_ANSWER``, with " …" at the cut.

    Raises DemoError if the server refuses or the stream breaks off.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": LONGEST_ANSWER,
        "stream": True,
    }
    headers = {"Authorization": f"Bearer {key}"}
    started = time.monotonic()
    text, first_token = "", 0.0
    async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        if response.status_code != 200:
            await response.aread()
        async for event in _events(_accept(response, 200)):
            for choice in event["choices"]:
                if piece := choice["delta"].get("content"):  # none in the first chunk, which says who speaks
                    first_token = first_token or time.monotonic() - started
                    text += piece
                if choice.get("finish_reason") == "length":
                    text += " …"
    return Answer(text.strip(), first_token, time.monotonic() - started)


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The stream's JSON chunks, up to its end mark."""
    async for line in response.aiter_lines():
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return
        if data != line:
            event = json.loads(data)
            if "error" in event:
                raise DemoError(f"the stream broke off: {event['error']['message']}")
            yield event
    raise DemoError("the stream broke off before its end")


def _accept(response: httpx.Response, *statuses: int) -> httpx.Response:
    if response.status_code in statuses:
        return response
    try:
        reason = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        reason = response.text[:200]
    request = response.request
    raise DemoError(f"{request.method} {request.url.path} was answered {response.status_code}: {reason}")
