"""The one client that measures both servers: streaming completions, with the time of every chunk."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import httpx

from tests.bench.adapters import Adapter

# ``ignore_eos`` is no field of OpenAI's; an end token that is never chosen comes to the same.
NEVER_END = {"2": -100}


@dataclass(frozen=True, slots=True)
class Target:
    """Where and how to ask a server for an adapter."""

    url: str
    headers: dict[str, str]
    json: dict[str, Any]


class Askable(Protocol):
    def request(self, adapter: Adapter | None, body: dict[str, Any]) -> Target: ...


@dataclass(slots=True)
class Record:
    """One request as its client saw it. Times are ``time.perf_counter()`` seconds.

    ``status`` is None as long as no answer began, and stays so for a request that was given up.
    ``retry_after`` is what a refusal said, in seconds.
    """

    adapter: str | None
    label: str
    arrival: float
    max_tokens: int
    chunks: list[float] = field(default_factory=list)
    end: float | None = None
    status: int | None = None
    error: str | None = None
    retry_after: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    text: str = ""

    @property
    def to_first_token(self) -> float:
        return self.chunks[0] - self.arrival if self.chunks else math.inf

    @property
    def duration(self) -> float:
        """``inf`` for a request that did not end well."""
        return self.end - self.arrival if self.end is not None and self.error is None else math.inf

    @property
    def tokens_per_chunk(self) -> float:
        return self.output_tokens / len(self.chunks) if self.output_tokens and self.chunks else 1.0

    def as_json(self, origin: float) -> dict[str, Any]:
        """With times relative to ``origin``, to the tenth of a millisecond."""
        shown = asdict(self)
        shown["arrival"] = round(self.arrival - origin, 4)
        shown["chunks"] = [round(t - origin, 4) for t in self.chunks]
        shown["end"] = None if self.end is None else round(self.end - origin, 4)
        return shown


class Client:
    """``records`` holds every request since it was made, in order of arrival, whatever became of it.

    ``samples`` is for what a scenario reads meanwhile: rows of ``seconds`` and the same other names in each.
    """

    def __init__(self, server: Askable) -> None:
        self.records: list[Record] = []
        self.samples: list[dict[str, float]] = []
        self._server = server
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(timeout=None, limits=limits, trust_env=False)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    def labelled(self, *labels: str) -> list[Record]:
        return [r for r in self.records if r.label in labels]

    def failures(self) -> list[Record]:
        return [r for r in self.records if r.error is not None]

    async def ask(
        self,
        adapter: Adapter | None,
        prompt: str,
        max_tokens: int,
        *,
        label: str = "",
        arrival: float | None = None,
    ) -> Record:
        """Streams exactly ``max_tokens`` tokens. ``arrival`` is now unless the request was meant earlier.

        A refusal and a broken stream are told by the record's ``error``; cancelling leaves what had come.
        """
        name = adapter.name if adapter else None
        record = Record(name, label, arrival or time.perf_counter(), max_tokens)
        self.records.append(record)
        body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "logit_bias": NEVER_END,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        target = self._server.request(adapter, body)
        try:
            async with self._http.stream(
                "POST", target.url, headers=target.headers, json=target.json
            ) as response:
                record.status = response.status_code
                if "retry-after" in response.headers:
                    record.retry_after = float(response.headers["retry-after"])
                if response.status_code == 200:
                    await self._read(response, record)
                else:
                    record.error = (await response.aread()).decode(errors="replace")[:500]
        except httpx.HTTPError as exc:
            record.error = f"{type(exc).__name__}: {exc}"
        record.end = time.perf_counter()
        return record

    async def _read(self, response: httpx.Response, record: Record) -> None:
        rest = b""
        done = False
        async for raw in response.aiter_raw():
            now = time.perf_counter()
            *events, rest = (rest + raw).split(b"\n\n")
            for event in events:
                data = event.removeprefix(b"data: ")
                if data == b"[DONE]":
                    done = True
                else:
                    _note(json.loads(data), now, record)
        if record.error is None and not done:
            record.error = "the stream broke off"


def _note(event: dict[str, Any], now: float, record: Record) -> None:
    if "error" in event:
        record.error = str(event["error"])[:500]
        return
    for choice in event["choices"]:
        record.chunks.append(now)
        record.text += choice["text"]
    if usage := event.get("usage"):
        record.prompt_tokens = usage["prompt_tokens"]
        record.output_tokens = usage["completion_tokens"]
