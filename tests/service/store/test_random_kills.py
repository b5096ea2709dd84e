"""SIGKILL for the whole server at random moments, under uploads, deletes, go-lives and inference.

After each the server is started again, and what it has is held against what was acknowledged: every change
whole or not there at all, one entry in the audit for each, and what is live answers. ``KILLS=200`` takes a
while.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.store.blobs import digest_of
from tests.service.accounts.test_usage_process import Server
from tests.support import changes
from tests.support.changes import Change, State
from tests.support.site import ADMIN_KEY, bearer

KILLS = int(os.environ.get("KILLS", "3"))
pytestmark = pytest.mark.timeout(max(300, KILLS * 60))

NAMES = ("a", "b")
ADMIN = bearer(ADMIN_KEY)


@dataclass
class Customer:
    """Makes one change after the other. ``state`` is what it knows to be there."""

    http: httpx.AsyncClient
    id: str
    rng: random.Random
    key: str = ""
    state: State = field(default_factory=dict)
    pending: Change | None = None  # sent, and not seen yet
    told: bool = False  # whether it was acknowledged
    acknowledged: int = 0
    answers: int = 0

    @property
    def url(self) -> str:
        return f"/admin/v1/tenants/{self.id}/adapters"

    async def run(self) -> None:
        """Until the server is gone."""
        try:
            while True:
                self.pending, self.told = changes.choose(self.rng, self.state, NAMES), False
                answer = await changes.make(self.http, self.url, self.pending)
                assert answer.status_code < 300, (self.pending, answer.text)
                self.told = True
                self._take(await self.seen())
        except httpx.TransportError:
            return

    async def ask(self) -> None:
        """Inference, until the server is gone: each answer says which version gave it."""
        try:
            while True:
                body = {"model": "fixed", "prompt": "hi", "max_tokens": 3}
                answer = await self.http.post("/v1/completions", json=body, headers=bearer(self.key))
                assert answer.status_code in (200, 503), answer.text
                self.answers += answer.status_code == 200
        except httpx.TransportError:
            return

    async def look(self) -> None:
        """After a restart: all is there that was acknowledged, and what was not is whole or absent."""
        self._take(now := await self.seen())
        for name, (live, _) in now.items():
            body = {"model": name, "prompt": "hi", "max_tokens": 1}
            answer = await self.http.post("/v1/completions", json=body, headers=bearer(self.key))
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-loraplex-version"] == f"{name}@{live}"
        audit = (await self.http.get(f"/admin/v1/audit?tenant={self.id}&limit=1000", headers=ADMIN)).json()
        changes = [row for row in audit["data"] if (row["target"] or "").partition("@")[0] in NAMES]
        assert len(changes) == self.acknowledged, [row["action"] for row in changes]

    async def seen(self) -> State:
        """What the server says is there, of the adapters that change."""
        listed = (await self.http.get(self.url, headers=ADMIN)).json()["data"]
        return changes.seen(listed, NAMES)

    def _take(self, now: State) -> None:
        """``now`` is there: what was known before, with the change that was acknowledged, or may be made."""
        changed = self.pending is not None and changes.follows(self.state, now, self.pending)
        assert changed or (now == self.state and not self.told), (self.state, self.pending, self.told, now)
        self.acknowledged += changed
        self.state, self.pending, self.told = now, None, False


async def test_all_that_was_acknowledged_and_nothing_half(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    seed = int(os.environ.get("SEED", "1"))
    rng = random.Random(seed)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        server = Server(tmp_path, http, port)
        await server.start()
        try:
            customers = [await _customer(http, f"t{n}", random.Random(seed * 100 + n)) for n in range(3)]
            for _ in range(KILLS):
                work = [asyncio.create_task(one.run()) for one in customers]
                work += [asyncio.create_task(one.ask()) for one in customers]
                await asyncio.sleep(rng.uniform(0.05, 2.0))
                await server.end(signal.SIGKILL)
                await asyncio.gather(*work)
                await server.start()
                for one in customers:
                    await one.look()
                _hold_blobs(tmp_path / "data", customers)
            assert sum(one.acknowledged for one in customers) >= KILLS
            assert sum(one.answers for one in customers) >= KILLS
        finally:
            server.process.kill()
            server.process.join()


async def _customer(http: httpx.AsyncClient, id_: str, rng: random.Random) -> Customer:
    (await http.post("/admin/v1/tenants", json={"id": id_}, headers=ADMIN)).raise_for_status()
    made: Any = (await http.post(f"/admin/v1/tenants/{id_}/keys", json={}, headers=ADMIN)).json()
    (await changes.make(http, f"/admin/v1/tenants/{id_}/adapters", ("upload", "fixed", 9))).raise_for_status()
    return Customer(http, id_, rng, made["key"])


def _hold_blobs(data: Path, customers: list[Customer]) -> None:
    """Every version's bytes are there, and are those that its digest says."""
    for digest in {d for one in customers for _, versions in one.state.values() for d in versions.values()}:
        assert digest_of(data / "blobs" / digest) == digest
