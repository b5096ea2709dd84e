"""Hot swap under load: clients that stream from one adapter while its live version changes under them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.support.site import Site, bearer


@dataclass(frozen=True)
class Streamed:
    """An answer, and which swaps were done when it was asked for and when it had ended."""

    text: str
    begun: int
    ended: int


async def swap_under_load(
    site: Site,
    key: str,
    body: Mapping[str, Any],
    swap: Callable[[], Awaitable[Any]],
    *,
    clients: int,
    swaps: int,
    every: float,
    all_ask: bool = False,
) -> list[Streamed]:
    """The answers of ``clients``, each asking again and again; ``swap`` is awaited ``every`` so many seconds,
    with ``all_ask`` not before an answer was asked for after the last one.

    Fails at the first answer that is an error or breaks off.
    """
    done, stop = 0, False
    answers: list[Streamed] = []

    async def stream() -> str:
        text, reason = "", None
        async with site.http.stream(
            "POST", "/v1/chat/completions", json={**body, "stream": True}, headers=bearer(key)
        ) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                    text += choice["delta"].get("content") or ""
                    reason = choice["finish_reason"] or reason
        assert reason in ("stop", "length"), text
        return text

    async def client() -> None:
        while not stop:
            begun = done
            text = await stream()
            answers.append(Streamed(text, begun, done))

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
        for _ in range(swaps):
            await asyncio.sleep(every)
            before = len(answers)
            while all_ask and len(answers) <= before + clients:
                await asyncio.sleep(0.002)
            await swap()
            done += 1
        await asyncio.sleep(every)
        stop = True
    return answers
