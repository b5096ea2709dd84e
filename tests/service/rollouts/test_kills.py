"""SIGKILL for the whole server in the middle of a rollout: it goes on, and nothing is done twice or halved.

``KILLS=50`` takes a while.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.accounts.test_usage_process import Server
from tests.service.rollouts.test_rollouts import ADAPTER, QUICK, ROLLOUTS
from tests.support import tiny
from tests.support.ports import unused
from tests.support.site import ADMIN_KEY, bearer

KILLS = int(os.environ.get("KILLS", "2"))
pytestmark = pytest.mark.timeout(max(1200, KILLS * 60))

ADMIN = bearer(ADMIN_KEY)


class Client:
    """Asks, and looks at the rollout, as long as the server is there."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self.asked = 0

    async def set_up(self) -> None:
        (await self.http.post("/admin/v1/tenants", json={"id": "acme"}, headers=ADMIN)).raise_for_status()
        for seed in (1, 2):
            files = {path.name: path.read_bytes() for path in tiny.adapter(seed).iterdir()}
            files = {name: data for name, data in files.items() if name.startswith("adapter_")}
            made = await self.http.post(f"{ADAPTER}/versions", files=files, headers=ADMIN)
            assert made.status_code == 201, made.text
        await self.http.patch(ADAPTER, json={"live": 1}, headers=ADMIN)
        keys = await self.http.post("/admin/v1/tenants/acme/keys", json={}, headers=ADMIN)
        self.key = keys.json()["key"]

    async def begin(self, **changes: Any) -> None:
        body = QUICK | {"steps": [20, 40, 60, 80, 100]} | changes
        made = await self.http.post(ROLLOUTS, json=body, headers=ADMIN)
        assert made.status_code == 201, made.text
        self.one = f"{ROLLOUTS}/{made.json()['id']}"

    async def ask(self) -> None:
        """Until the server is gone or the rollout has ended."""
        try:
            while (await self.rollout())["state"] == "running":
                for number in range(20):
                    body = {"model": "a", "prompt": "hi", "max_tokens": 2, "user": f"{self.asked}-{number}"}
                    answer = await self.http.post("/v1/completions", json=body, headers=bearer(self.key))
                    assert answer.status_code in (200, 503), answer.text
                self.asked += 1
        except httpx.TransportError:
            return

    async def rollout(self) -> dict[str, Any]:
        return dict((await self.http.get(self.one, headers=ADMIN)).json())

    async def hold(self) -> dict[str, Any]:
        """What answers is what the rollout says, and each decision is in the audit once."""
        for _ in range(20):  # it may take a step between two calls
            rollout = await self.rollout()
            adapter = (await self.http.get(ADAPTER, headers=ADMIN)).json()
            audit = (await self.http.get("/admin/v1/audit?tenant=acme", headers=ADMIN)).json()["data"]
            if (await self.rollout())["decisions"] == rollout["decisions"]:
                break
        share = rollout["share"]
        split = {"1": 100 - share, "2": share} if 0 < share < 100 else None
        live = 2 if rollout["state"] == "completed" else 1
        assert (adapter["live"], adapter["split"]) == (live, split), rollout
        actions = [row["action"] for row in reversed(audit) if row["action"].startswith("rollout.")]
        decided = [f"rollout.{decision['action']}" for decision in rollout["decisions"]]
        newest = len(actions) - actions[::-1].index("rollout.create")
        assert actions[newest:] == decided
        return rollout


async def test_a_kill_changes_nothing(tmp_path: Path) -> None:
    port = unused()
    rng = random.Random(int(os.environ.get("SEED", "1")))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        server, client = Server(tmp_path, http, port), Client(http)
        await server.start()
        try:
            await client.set_up()
            await client.begin()
            for _ in range(KILLS):
                asking = asyncio.create_task(client.ask())
                await asyncio.sleep(rng.uniform(0.5, 3.0))
                await server.end(signal.SIGKILL)
                await asking
                await server.start()
                if (await client.hold())["state"] != "running":
                    await client.http.patch(ADAPTER, json={"live": 1}, headers=ADMIN)
                    await client.begin()
            async with asyncio.timeout(240):
                await client.ask()
            ended = await client.hold()
            assert (ended["state"], ended["share"]) == ("completed", 100)
        finally:
            server.process.kill()
            server.process.join()
