"""SIGKILL for the whole server at random moments, under uploads, deletes, go-lives, inference and batches.

After each the server is started again, and what it has is held against what was acknowledged: every change
whole or not there at all, one entry in the audit for each, what is live answers, every answer that came
before the last write of usage began is in the usage, and every file and batch is there; at the end each line
of each batch has one answer. ``KILLS=200`` takes a while, ``DB=postgres`` another database.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.store.blobs import digest_of
from tests.service.accounts.test_usage_process import Server
from tests.service.batches.test_batches import CHAT, jsonl, line
from tests.support import changes, crashes
from tests.support.changes import Change, State
from tests.support.databases import empty
from tests.support.ports import unused
from tests.support.site import ADMIN_KEY, bearer

KILLS = int(os.environ.get("KILLS", "3"))
DB = os.environ.get("DB", "sqlite")
LINES = 6  # of a batch
pytestmark = pytest.mark.timeout(max(1200, KILLS * 60))

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
    sure: int = 0  # requests that are on record
    asked: int = 0
    answers: list[float] = field(default_factory=list)  # when they came

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
                assert await self._answer("fixed") in (200, 503)
        except httpx.TransportError:
            return

    async def _answer(self, name: str, live: int | None = None) -> int:
        self.asked += 1
        body = {"model": name, "prompt": "hi", "max_tokens": 3}
        answer = await self.http.post("/v1/completions", json=body, headers=bearer(self.key))
        if answer.status_code == 200:
            self.answers.append(time.time())
            assert live is None or answer.headers["x-loraplex-version"] == f"{name}@{live}"
        return answer.status_code

    async def look(self, written: float) -> None:
        """After a restart: all is there that was acknowledged, and what was not is whole or absent."""
        used = await self.http.get(f"/admin/v1/usage?tenant={self.id}", headers=ADMIN)
        recorded = sum(row["requests"] for row in used.json()["data"])
        self.answers = [at for at in self.answers if at < written]
        assert self.sure + len(self.answers) <= recorded <= self.asked
        self.sure, self.asked, self.answers = recorded, recorded, []
        self._take(now := await self.seen())
        for name, (live, _) in now.items():
            assert await self._answer(name, live) == 200
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


@dataclass
class Batcher:
    """Has one batch after the other answered; ``files`` and ``batches`` are those that were acknowledged."""

    http: httpx.AsyncClient
    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, str] = field(default_factory=dict)  # id -> id of its file
    number: int = 0

    async def run(self) -> None:
        """Until the server is gone."""
        try:
            while True:
                self.number += 1
                content = jsonl(line(f"{self.number}-{n}") for n in range(LINES))
                sent: dict[str, Any] = {
                    "files": {"file": ("in.jsonl", content)},
                    "data": {"purpose": "batch"},
                }
                file = (await self._call("POST", "/v1/files", **sent))["id"]
                self.files[file] = content
                body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
                batch = (await self._call("POST", "/v1/batches", json=body))["id"]
                self.batches[batch] = file
                while (await self._call("GET", f"/v1/batches/{batch}"))["status"] != "completed":
                    await asyncio.sleep(0.05)
        except httpx.TransportError:
            return

    async def look(self) -> None:
        """All files are there, byte by byte, and all batches."""
        for file, content in self.files.items():
            answer = await self.http.get(f"/v1/files/{file}/content", headers=bearer(self.key))
            assert answer.content == content
        for batch, file in self.batches.items():
            assert (await self._call("GET", f"/v1/batches/{batch}"))["input_file_id"] == file

    async def finish(self) -> None:
        """Every batch ends, with one answer to each line."""
        for batch, file in self.batches.items():
            async with asyncio.timeout(240):
                while (found := await self._call("GET", f"/v1/batches/{batch}"))["status"] != "completed":
                    await asyncio.sleep(0.05)
            answer = await self.http.get(
                f"/v1/files/{found['output_file_id']}/content", headers=bearer(self.key)
            )
            said = [json.loads(one)["custom_id"] for one in answer.text.splitlines()]
            assert said == [json.loads(one)["custom_id"] for one in self.files[file].splitlines()]

    async def _call(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        answer = await self.http.request(method, path, headers=bearer(self.key), **content)
        assert answer.status_code in (200, 201), answer.text
        return dict(answer.json())


async def test_all_that_was_acknowledged_and_nothing_half(tmp_path: Path) -> None:
    port = unused()
    seed = int(os.environ.get("SEED", "1"))
    rng = random.Random(seed)
    async with (
        empty(DB, tmp_path) as url,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
    ):
        server = Server(tmp_path, http, port, changes={"database_url": url})
        await server.start()
        try:
            customers = [await _customer(http, f"t{n}", random.Random(seed * 100 + n)) for n in range(3)]
            batcher = Batcher(http, (await _customer(http, "batches", rng)).key)
            for number in range(KILLS):
                if number % 20 == 19:
                    print(f"{number + 1} of {KILLS}", flush=True)
                work = [asyncio.create_task(one.run()) for one in (*customers, batcher)]
                work += [asyncio.create_task(one.ask()) for one in customers]
                await asyncio.sleep(rng.uniform(0.05, 2.0))
                with suppress(TimeoutError):  # a machine with other work may not have come to a change yet
                    async with asyncio.timeout(60):
                        while sum(one.acknowledged for one in customers) <= number:
                            await asyncio.sleep(0.01)
                await server.end(signal.SIGKILL)
                written = crashes.last_write(tmp_path)
                await asyncio.gather(*work)
                await server.start()
                for one in customers:
                    await one.look(written)
                await batcher.look()
                _hold_blobs(tmp_path / "data", customers)
                checked = (await http.get("/admin/v1/check", headers=ADMIN)).json()
                assert checked["ok"], checked
            await batcher.finish()
            changed, answers = sum(one.acknowledged for one in customers), sum(one.sure for one in customers)
            print(
                f"\n{KILLS} kills, {DB}: {changed} changes, {answers} answers on record,"
                f" {len(batcher.files)} files, {len(batcher.batches)} batches"
            )
            assert changed >= KILLS
            assert answers >= KILLS
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
