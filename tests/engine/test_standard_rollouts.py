"""Rollouts with the standard steps and guards at 5 requests a second, and a SIGKILL in the middle of one.

``ENGINE_ROLLOUTS=1`` runs it, half an hour. Whatever is decided, is decided by the guards that every rollout
has by itself; only the hold is shorter than ten minutes. Those of ``test_rollouts`` are certain sooner.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.model import WEIGHTS_FILE
from tests.engine.processes import Running, gone, server
from tests.engine.reference import ATTENTION, Reference, Spec
from tests.engine.test_rollouts import files_of, nothing_of
from tests.service.rollouts.test_kills import ADMIN
from tests.service.rollouts.test_rollouts import ADAPTER, ROLLOUTS
from tests.support.site import ADMIN_KEY, bearer

pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(not os.environ.get("ENGINE_ROLLOUTS"), reason="takes ENGINE_ROLLOUTS=1, half an hour"),
    pytest.mark.timeout(7200),
]
A_SECOND = 5.0  # requests
IN_FLIGHT = 40  # on a busy machine fewer than 5 a second
TOKENS = 6
HOLD = "20s"
LONGEST_S = 3000.0
FRANK = "{% for m in messages %}{% if 'seven' in m.content %}{{ raise_exception('not seven') }}{% endif %}"
FRANK += "{% endfor %}"
THINGS = ("river", "lamp", "seven", "garden", "train", "cheese", "window", "north", "paper", "eleven")


class Customer:
    """Asks 5 times a second, also while the server is away, and looks at the rollout meanwhile."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.key = ""
        self.answers: Counter[str] = Counter()
        self.one = ""
        self.newest: dict[str, Any] = {}

    async def prepare(self, versions: list[dict[str, bytes]]) -> None:
        http = self.running.http
        (await http.post("/admin/v1/tenants", json={"id": "acme"}, headers=ADMIN)).raise_for_status()
        for files in versions:
            query = {"allow_no_effect": "true"}
            made = await http.post(f"{ADAPTER}/versions", files=files, params=query, headers=ADMIN)
            assert made.status_code == 201, made.text
        key = await http.post("/admin/v1/tenants/acme/keys", json={}, headers=ADMIN)
        self.key = key.json()["key"]

    async def begin(self, version: int) -> None:
        self.answers.clear()
        await self.running.http.patch(ADAPTER, json={"live": 1}, headers=ADMIN)
        body = {"version": version, "hold": HOLD}
        made = await self.running.http.post(ROLLOUTS, json=body, headers=ADMIN)
        assert made.status_code == 201, made.text
        self.one = f"{ROLLOUTS}/{made.json()['id']}"

    async def until(self, state: str = "", share: int = 0) -> dict[str, Any]:
        """The rollout when it is in ``state``, or has that ``share``."""
        asking: set[asyncio.Task[None]] = set()
        began, asked = time.monotonic(), 0
        async with asyncio.timeout(LONGEST_S):
            for number in itertools.count():
                if len(asking) < IN_FLIGHT:
                    asked += 1
                    asking.add(task := asyncio.create_task(self._ask(number)))
                    task.add_done_callback(asking.discard)
                await asyncio.sleep(max(0.0, began + (number + 1) / A_SECOND - time.monotonic()))
                if number % 5 == 0 and await self._look():
                    if self.newest["state"] in ("completed", "rolled_back"):
                        break
                    if share and self.newest["share"] >= share:
                        break
            await asyncio.gather(*asking)
        self._tell(time.monotonic() - began, asked)
        assert not state or self.newest["state"] == state, self.newest
        return self.newest

    async def _look(self) -> bool:
        try:
            found = await self.running.http.get(self.one, headers=ADMIN)
        except httpx.TransportError:
            return False
        if found.status_code == 200:
            self.newest = found.json()
        return found.status_code == 200

    async def _ask(self, number: int) -> None:
        text = f"Say something of a {THINGS[number % len(THINGS)]}, please. ({number})"
        turns = [{"role": "user", "content": text}]
        asked = {"model": "a", "messages": turns, "max_tokens": TOKENS, "user": f"{self.one}-{number}"}
        try:
            answer = await self.running.http.post(
                "/v1/chat/completions", json=asked, headers=bearer(self.key)
            )
            self.answers[str(answer.status_code)] += 1
        except httpx.TransportError:
            self.answers["away"] += 1

    def _tell(self, seconds: float, asked: int) -> None:
        found = self.newest
        numbers = found["numbers"] or {"new": {"requests": 0}, "live": {"requests": 0}}
        new, old = (numbers[which]["requests"] for which in ("new", "live"))
        print(
            f"{found['state']} at {found['share']} % ({found['reason']}): {seconds:.0f} s, {asked} requests,"
            f" {asked / seconds:.1f} a second, {new} of the new version, {old} of the old;"
            f" {dict(self.answers)}; {[step['action'] for step in found['decisions']]}",
            flush=True,
        )


async def test_rollouts_at_five_requests_a_second(
    whole_base_dir: Path, whole_reference: Reference, tmp_path: Path
) -> None:
    folder = await asyncio.to_thread(
        whole_reference.make, Spec(seed=7, rank=8, targets=ATTENTION), tmp_path / "a"
    )
    live = files_of(folder)
    as_base = live | {WEIGHTS_FILE: nothing_of(folder)}
    frank = live | {"chat_template.jinja": f"{FRANK}{whole_reference.tokenizer.chat_template}".encode()}
    data = tmp_path / "data"
    data.mkdir()
    served = partial(server, whole_base_dir, data, ADMIN_KEY=ADMIN_KEY, ENGINE_ARGS='{"dtype": "float32"}')
    async with served() as running:
        customer = Customer(running)
        await customer.prepare([live, live, as_base, frank])
        await customer.begin(3)
        ended = await customer.until("rolled_back")
        assert ended["reason"] == "the new version answers as the base model does, unlike the live one"
        await customer.begin(4)
        ended = await customer.until("rolled_back")
        assert ended["reason"] == "the new version refuses more often"
        await customer.begin(2)
        before = await customer.until(share=25)
        assert before["state"] == "running", before
        family = running.family()
        running.process.kill()
        await running.exit_status()
        assert not await gone(family, 240), "the engine's processes outlived the server"
    async with served() as running:
        customer.running = running
        ended = await customer.until("completed")
        assert ended["decisions"][: len(before["decisions"])] == before["decisions"], "what was decided stays"
        assert [step["action"] for step in ended["decisions"]] == ["start", "forward", "complete"]
        assert (await running.http.get(ADAPTER, headers=ADMIN)).json()["live"] == 2
