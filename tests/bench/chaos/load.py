"""The customers: who asks, who changes adapters, what they were told, and what has to be true of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from server.demo.base import CHECKOUT
from tests.bench.chaos.service import Service
from tests.support import changes, tiny
from tests.support.site import bearer

TENANTS = tuple(f"t{number}" for number in range(8))
CONTROL = "control"  # reads a long stream
CHANGING = TENANTS[:4]
LIMITED = TENANTS[4:6]  # have limits and a budget, which Redis counts where there is one
NAMES = ("a", "b")
PROMPTS = ("My parcel has not arrived.", "Why is the sky blue?")
TOKENS = 8
LOST = 1.5  # seconds of usage before a SIGKILL that may be gone
DEMO = [CHECKOUT / "config" / "demo" / name for name in ("acme", "bluebird", "corvus")]


def documented() -> frozenset[str]:
    """Every code of an error that the documentation names."""
    pages = [page.read_text() for page in (CHECKOUT / "docs").glob("*.md")]
    return frozenset(code for page in pages for code in re.findall(r"`([a-z][a-z_]+)`", page))


@dataclass
class Told:
    """Of one customer since the last look: answers with their tokens, and requests whose end is not known."""

    answers: list[tuple[float, int]] = field(default_factory=list)
    unknown: int = 0


class Changer:
    """Makes one change of its customer's adapters after the other, and looks at each."""

    def __init__(self, load: Load, tenant: str, seed: int) -> None:
        self.load, self.tenant = load, tenant
        self.rng = random.Random(seed)
        self.state: changes.State = {}
        self.acknowledged = 0
        self.url = f"/admin/v1/tenants/{tenant}/adapters"

    async def run(self) -> None:
        while True:
            await asyncio.sleep(
                self.rng.uniform(0.2, 0.8) * (10 if self.load.real else 1)
            )  # a probe takes long
            async with self.load.at_work():
                await self.change()

    async def change(self) -> None:
        load = self.load
        change = changes.choose(self.rng, self.state, NAMES)
        told: bool | None = None
        try:
            answer = await changes.make(load.service.http, self.url, change, load.adapter)
            told = answer.is_success
            load.outcomes[f"change {answer.status_code} {'' if told else load.code(answer)}".strip()] += 1
            if not told and (answer.status_code not in (429, 503, 507) or load.code(answer) is None):
                load.wrong.append(f"{change} got {answer.status_code} {answer.text[:200]}")
        except httpx.HTTPError as exc:
            load.broke(type(exc).__name__)
        now = await self.seen()
        made = changes.follows(self.state, now, change)
        if told and made:
            load.changed.append(time.monotonic())
        if (told and not made) or (told is False and now != self.state) or not (made or now == self.state):
            load.wrong.append(f"{self.tenant}: {change} was told {told}; there was {self.state}, is {now}")
        self.acknowledged += made
        self.state = now

    async def seen(self) -> changes.State:
        """What is there, as soon as the server can say it."""
        while True:
            with contextlib.suppress(httpx.HTTPError):
                answer = await self.load.service.admin("GET", f"/tenants/{self.tenant}/adapters")
                if answer.status_code == 200:
                    return changes.seen(answer.json()["data"], NAMES)
                if answer.status_code != 503:
                    self.load.wrong.append(f"a list of adapters: {answer.status_code} {answer.text[:200]}")
            await asyncio.sleep(0.2)


class Load:
    """``outcomes`` and ``wrong`` are of one fault; ``cuts`` says whether it may break answers."""

    def __init__(self, service: Service, seed: int) -> None:
        self.service = service
        self.real = service.kind.real
        # One processor writes some tens of tokens a second, so that half of them are load enough.
        self.tenants = TENANTS[:4] if self.real else TENANTS
        self.codes = documented()
        self.keys: dict[str, str] = {}
        self.right: dict[tuple[str, str], str] = {}
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.cuts = False
        self.served: dict[str, list[float]] = defaultdict(list)
        self.changed: list[float] = []
        self.told: dict[str, Told] = defaultdict(Told)
        self.recorded: dict[str, tuple[int, int]] = {}
        self.changers = [
            Changer(self, tenant, seed + i) for i, tenant in enumerate(CHANGING[: len(self.tenants) // 2])
        ]
        self._going = asyncio.Event()
        self._going.set()
        self._busy = 0
        self._tasks: list[asyncio.Task[None]] = []

    def adapter(self, number: int) -> Path:
        return DEMO[number % len(DEMO)] if self.real else tiny.adapter(number)

    def tokens(self, tenant: str) -> int:
        return TOKENS if tenant != CONTROL else 48 if self.real else 200

    # --- in peace --------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Makes the customers, and learns what their right answers are."""
        for number, tenant in enumerate((*self.tenants, CONTROL)):
            limits = {"requests_per_minute": 100_000, "requests_at_once": 50}
            budgets = {"month": {"tokens": 10**12}}
            fields = {"limits": limits, "budgets": budgets} if tenant in LIMITED else {}
            made = await self.service.admin("POST", "/tenants", json={"id": tenant, **fields})
            made.raise_for_status()
            url = f"/admin/v1/tenants/{tenant}/adapters"
            upload = await changes.make(
                self.service.http, url, ("upload", "support", 20 + number), self.adapter
            )
            upload.raise_for_status()
            key = await self.service.admin("POST", f"/tenants/{tenant}/keys", json={})
            self.keys[tenant] = key.json()["key"]
            for prompt in PROMPTS:
                text, _, _ = await self._answer(tenant, prompt, False)
                if not self.real:
                    assert text.startswith(upload.json()["digest"]), text
                self.right[tenant, prompt] = text
        await self.look_at_usage()
        self.outcomes.clear()

    def begin(self) -> None:
        clients = [(tenant, stream) for tenant in self.tenants for stream in (False, True)] + [
            (CONTROL, True)
        ]
        works = [self._client(*client) for client in clients] + [one.run() for one in self.changers]
        self._tasks = [asyncio.create_task(work) for work in works]

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- clients ---------------------------------------------------------------------------------

    async def _client(self, tenant: str, stream: bool) -> None:
        for prompt in itertools.cycle(PROMPTS):
            async with self.at_work():
                pause = await self.ask(tenant, prompt, stream)
            await asyncio.sleep(pause)

    async def ask(self, tenant: str, prompt: str, stream: bool) -> float:
        """Seconds to wait before the next request."""
        try:
            text, tokens, refused = await self._answer(tenant, prompt, stream)
        except (httpx.HTTPError, TimeoutError) as exc:
            self.broke(type(exc).__name__)
            self.told[tenant].unknown += 1
            return 0.3
        if refused is not None:
            self.outcomes[refused] += 1
            return 0.5
        if text != self.right.get((tenant, prompt), text):
            self.wrong.append(f"{tenant} was told {text!r} instead of {self.right[tenant, prompt]!r}")
        now = time.monotonic()
        self.served[tenant].append(now)
        self.told[tenant].answers.append((now, tokens))
        self.outcomes["200"] += 1
        return 0.3

    async def _answer(self, tenant: str, prompt: str, stream: bool) -> tuple[str, int, str | None]:
        """Text and output tokens, or why there are none."""
        body: dict[str, Any] = {"model": "support", "prompt": prompt, "temperature": 0, "ignore_eos": True}
        body |= {"max_tokens": self.tokens(tenant)}
        headers = bearer(self.keys[tenant])
        if not stream:
            answer = await self.service.http.post("/v1/completions", json=body, headers=headers)
            if answer.status_code != 200:
                return "", 0, self._refusal(tenant, answer)
            said = answer.json()
            if said["choices"][0]["finish_reason"] == "abort":
                return self._cut(tenant, "aborted")
            return said["choices"][0]["text"], said["usage"]["completion_tokens"], None
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        text, tokens, whole = "", 0, False
        async with self.service.http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return "", 0, self._refusal(tenant, answer)
            async for line in answer.aiter_lines():
                whole = whole or line == "data: [DONE]"
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return self._cut(tenant, f"event {event['error'].get('code')}")
                for choice in event["choices"]:
                    text += choice["text"]
                    if choice["finish_reason"] == "abort":
                        return self._cut(tenant, "aborted")
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        if not whole:
            return self._cut(tenant, "ended early")
        return text, tokens, None

    def _refusal(self, tenant: str, answer: httpx.Response) -> str:
        code = self.code(answer)
        if answer.status_code not in (429, 503) or code not in self.codes:
            self.wrong.append(f"{tenant} got {answer.status_code} {answer.text[:200]}")
        elif "retry-after" not in answer.headers:
            self.wrong.append(f"{answer.status_code} {code} without Retry-After")
        self.told[tenant].unknown += 1  # it may have begun
        return f"{answer.status_code} {code}"

    def _cut(self, tenant: str, why: str) -> tuple[str, int, str]:
        self.told[tenant].unknown += 1
        if not self.cuts:
            self.wrong.append(f"an answer of {tenant} was cut: {why}")
        return "", 0, f"cut: {why}"

    def broke(self, why: str) -> None:
        """A connection ended, or there was no answer in time."""
        self.outcomes[why] += 1
        if not self.cuts:
            self.wrong.append(f"a connection broke: {why}")

    def code(self, answer: httpx.Response) -> str | None:
        if "json" not in answer.headers.get("content-type", ""):
            return None
        return (answer.json().get("error") or {}).get("code")  # type: ignore[no-any-return]

    # --- what has to be true ---------------------------------------------------------------------

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Not while somebody looks."""
        await self._going.wait()
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        self._going.clear()
        while self._busy:
            await asyncio.sleep(0.02)
        try:
            yield
        finally:
            self._going.set()

    async def look(self, killed: list[float]) -> list[str]:
        """What is not as it should be, with everybody waiting. ``killed`` are the times of SIGKILLs."""
        async with self.paused():
            found = await self.look_at_usage(killed)
            checked = (await self.service.admin("GET", "/check")).json()
            if not checked["ok"] or checked["damaged"]:
                found.append(f"check: {json.dumps(checked)[:300]}")
            for one in self.changers:
                path = f"/audit?tenant={one.tenant}&limit=1000"
                rows = (await self.service.admin("GET", path)).json()["data"]
                entries = sum((row["target"] or "").partition("@")[0] in NAMES for row in rows)
                if entries != one.acknowledged and len(rows) < 1000:
                    found.append(f"{one.tenant} made {one.acknowledged} changes, the audit has {entries}")
        return found

    async def look_at_usage(self, killed: list[float] | None = None) -> list[str]:
        """Compares what was recorded since the last look with what clients were told since then."""
        deadline = time.monotonic() + 8
        while True:
            now = {tenant: await self._recorded(tenant) for tenant in self.keys}
            found = [
                miss for tenant in self.keys if (miss := self._differs(tenant, now[tenant], killed or []))
            ]
            if not found or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.3)
        self.recorded = now
        self.told.clear()
        return found

    async def _recorded(self, tenant: str) -> tuple[int, int]:
        path = f"/usage?tenant={tenant}&from=2000-01-01&to=2100-01-01"
        rows = (await self.service.admin("GET", path)).json()["data"]
        return sum(row["requests"] for row in rows), sum(row["output_tokens"] for row in rows)

    def _differs(self, tenant: str, now: tuple[int, int], killed: list[float]) -> str | None:
        before, told = self.recorded.get(tenant, (0, 0)), self.told[tenant]
        requests, tokens = now[0] - before[0], now[1] - before[1]
        sure = [n for at, n in told.answers if not any(end - LOST < at <= end + 0.5 for end in killed)]
        most = len(told.answers) + told.unknown
        most_tokens = sum(n for _, n in told.answers) + told.unknown * self.tokens(tenant)
        if tenant not in self.recorded:
            return None
        if len(sure) <= requests <= most and sum(sure) <= tokens <= most_tokens:
            return None
        return (
            f"{tenant}: {requests} requests and {tokens} tokens on record, told were {len(sure)} to {most}"
            f" and {sum(sure)} to {most_tokens}"
        )
