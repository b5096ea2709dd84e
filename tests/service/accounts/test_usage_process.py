"""Usage of a whole server process that is stopped, or killed, in the middle of what it does.

A thousand requests for each of the two, of clients of which many leave: what clients were told in ``usage``
is what is on record, from before the end and from after the restart on the same folder.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from tests.service.store.test_busy import holding
from tests.support import crashes, tiny
from tests.support.forks import PROCESSES
from tests.support.ports import unused
from tests.support.site import ADMIN_KEY, bearer

TENANTS = ("acme", "globex", "initech")
REQUESTS = 1000
CLIENTS = 32
# (key's id, outcome) -> requests, prompt tokens, output tokens
Sums = dict[tuple[str, str], tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class Told:
    """An answer that its client read to the end. ``key`` is the id of the key it came with."""

    tenant: str
    key: str
    adapter: str | None
    outcome: str
    prompt_tokens: int
    output_tokens: int
    at: float


@dataclass(frozen=True)
class Key:
    """Clients of a ``fickle`` one may leave."""

    tenant: str
    id: str
    secret: str
    fickle: bool


@dataclass
class Clients:
    """Results are by the ``user`` of the request; one that is refused or breaks is made again."""

    http: httpx.AsyncClient
    keys: list[Key]
    restarted: asyncio.Event = field(default_factory=asyncio.Event)
    numbers: Iterable[int] = field(default_factory=lambda: iter(range(REQUESTS)))
    done: int = 0
    told: dict[str, Told] = field(default_factory=dict)
    left: dict[str, tuple[int, float]] = field(default_factory=dict)  # tokens received, and when
    refused: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)

    async def run(self) -> None:
        for number in self.numbers:
            attempt = 0
            while not await self.ask(f"{number}.{attempt}", random.Random(number)):
                await self.restarted.wait()
                attempt += 1
            self.done += 1

    async def ask(self, user: str, rng: random.Random, max_tokens: int | None = None) -> bool:
        """False if it has to be asked again. A client that asks for ``max_tokens`` stays."""
        key = rng.choice(self.keys)
        leave_after = rng.randrange(12) if key.fickle and not max_tokens and rng.random() < 0.6 else None
        words, model = "word " * rng.randrange(1, 9), rng.choice(["a", "b", tiny.NAME])
        chat = {"messages": [{"role": "user", "content": words}]}
        url, prompt = rng.choice([("/v1/chat/completions", chat), ("/v1/completions", {"prompt": words})])
        body = {"model": model, "max_tokens": max_tokens or rng.randrange(1, 20), "user": user} | prompt
        try:
            if rng.random() < 0.5 or max_tokens:
                async with asyncio.timeout(leave_after and leave_after / 100):
                    response = await self.http.post(url, json=body, headers=bearer(key.secret))
                chunks = [response.json()]
            else:
                body |= {"stream": True, "stream_options": {"include_usage": True}}
                async with self.http.stream("POST", url, json=body, headers=bearer(key.secret)) as response:
                    chunks = [chunk async for chunk in _chunks(response, leave_after)]
        except TimeoutError:
            chunks = []
        except httpx.TransportError:
            self.broken.add(user)
            return False
        else:
            if response.status_code == 503:
                self.refused.add(user)
                return False
            assert response.status_code == 200, response.text
        if not chunks or (used := chunks[-1].get("usage")) is None:
            assert leave_after is not None
            self.left[user] = len(chunks), time.time()
            return True
        finish = next(c["finish_reason"] for chunk in reversed(chunks) for c in chunk["choices"])
        self.told[user] = Told(
            key.tenant,
            key.id,
            None if model == tiny.NAME else model,
            "cut" if finish == "abort" else "completed",
            used["prompt_tokens"],
            used["completion_tokens"],
            time.time(),
        )
        return True


async def _chunks(response: httpx.Response, most: int | None) -> AsyncIterator[dict[str, Any]]:
    """Those with a token or with the usage; ``most`` of them."""
    async for line in response.aiter_lines():
        if most == 0:
            return
        if line.startswith("data: {"):
            chunk = json.loads(line[6:])
            if chunk["choices"] and chunk["choices"][0].get("delta", {}).get("role"):
                continue
            yield chunk
            most = most and most - 1


@dataclass
class Server:
    """A process on ``folder``, on the same port every time."""

    folder: Path
    http: httpx.AsyncClient
    port: int
    process: Any = None
    changes: dict[str, Any] = field(default_factory=dict)  # of its settings

    async def start(self) -> None:
        fields = {"port": self.port, "drain_timeout": 0.3, "log_level": "error", **self.changes}
        settings = tiny.settings(self.folder / "data", **fields)
        arguments = (settings, tiny.base(), self.folder)
        self.process = PROCESSES.Process(target=crashes.serve, args=arguments)
        self.process.start()
        async with asyncio.timeout(120):
            while not await self._ready():
                assert self.process.is_alive(), self.process.exitcode
                await asyncio.sleep(0.05)

    async def _ready(self) -> bool:
        with suppress(httpx.TransportError):
            return (await self.http.get("/ready")).status_code == 200
        return False

    async def end(self, sig: signal.Signals) -> None:
        os.kill(self.process.pid, sig)
        await asyncio.to_thread(self.process.join, 120)
        assert self.process.exitcode == (-sig if sig == signal.SIGKILL else 0)

    def taken(self) -> dict[str, str]:
        """Request ids by ``user``, of all that the engine took."""
        lines = [line.split() for line in (self.folder / "taken").read_text().splitlines()]
        found = {user: id_ for id_, user in lines}
        assert len(found) == len(lines)
        return found

    def ended(self) -> dict[str, float]:
        """When, by request id: up to a tenth of a second after a client has left."""
        lines = [line.split() for line in (self.folder / "ended").read_text().splitlines()]
        return {id_: float(at) for id_, at in lines}

    def rows(self) -> dict[str, sqlite3.Row]:
        """What the engine took, by request id; no request has two. Refused ones are there and add nothing."""
        with sqlite3.connect(self.folder / "data" / "loraplex.db") as connection:
            connection.row_factory = sqlite3.Row
            rows = connection.execute("SELECT * FROM usage").fetchall()
        assert len({row["request_id"] for row in rows}) == len(rows)
        refused = [row for row in rows if not row["requests"]]
        assert not any(row["prompt_tokens"] or row["output_tokens"] or row["cost"] for row in refused)
        found = {row["request_id"]: row for row in rows if row["requests"]}
        assert len(found) == sum(row["requests"] for row in rows)
        return found


async def prepared(http: httpx.AsyncClient) -> list[Key]:
    """Tenants with two adapters and two keys each."""
    admin = {"headers": bearer(ADMIN_KEY)}
    keys = []
    for seed, tenant in enumerate(TENANTS):
        (await http.post("/admin/v1/tenants", json={"id": tenant}, **admin)).raise_for_status()
        for name in ("a", "b"):
            folder = tiny.adapter(2 * seed + (name == "b"))
            files = {n: (folder / n).read_bytes() for n in (CONFIG_FILE, WEIGHTS_FILE)}
            url = f"/admin/v1/tenants/{tenant}/adapters/{name}/versions"
            (await http.post(url, files=files, **admin)).raise_for_status()
        for fickle in (False, True):
            made = (await http.post(f"/admin/v1/tenants/{tenant}/keys", json={}, **admin)).json()
            keys.append(Key(tenant, made["id"], made["key"], fickle))
    return keys


async def reported(http: httpx.AsyncClient) -> Sums:
    answer = await http.get("/admin/v1/usage?by=key,outcome", headers=bearer(ADMIN_KEY))
    return {
        (row["key"], row["outcome"]): (row["requests"], row["prompt_tokens"], row["output_tokens"])
        for row in answer.json()["data"]
    }


def summed(used: Iterable[tuple[str, str, int, int]]) -> Sums:
    """Of (key, outcome, prompt tokens, output tokens)."""
    totals: dict[tuple[str, str], list[int]] = {}
    for key, outcome, prompt_tokens, output_tokens in used:
        total = totals.setdefault((key, outcome), [0, 0, 0])
        total[:] = total[0] + 1, total[1] + prompt_tokens, total[2] + output_tokens
    return {group: (total[0], total[1], total[2]) for group, total in totals.items()}


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
async def test_what_clients_were_told_is_on_record(sig: signal.Signals, tmp_path: Path) -> None:
    port = unused()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        # What is short can end on a machine that is busy, too; the long ones take a minute and more.
        server = Server(tmp_path, http, port, changes={"drain_timeout": 20.0})
        await server.start()
        try:
            clients = Clients(http, await prepared(http))
            async with asyncio.TaskGroup() as group:
                for _ in range(CLIENTS):
                    group.create_task(clients.run())
                while clients.done < REQUESTS // 2:
                    await asyncio.sleep(0.01)
                for seed in range(4):
                    group.create_task(clients.ask(f"long{seed}", random.Random(seed), max_tokens=30_000))
                while not (long := {user for user in server.taken() if user.startswith("long")}):
                    await asyncio.sleep(0.01)
                await server.end(sig)
                written = crashes.last_write(tmp_path)
                await server.start()
                clients.restarted.set()
            sums = await reported(http)
            await server.end(signal.SIGTERM)
        finally:
            server.process.kill()

    rows, taken = server.rows(), server.taken()
    missing = {user for user, id_ in taken.items() if id_ not in rows}
    assert rows.keys() <= set(taken.values())
    assert clients.done == REQUESTS
    assert len(clients.left.keys() & taken.keys()) > REQUESTS // 20
    assert clients.refused.isdisjoint(taken)
    if sig == signal.SIGTERM:
        assert missing == set()
        assert clients.broken.isdisjoint(taken), "what ran could end, or was cut and told so"
        assert {rows[taken[user]]["outcome"] for user in long} == {"cut"}, "longer than the drain"
    else:
        assert long <= missing, "it was killed in the middle"
        ends = {user: told.at for user, told in clients.told.items()}
        ends |= {user: at for user, (_, at) in clients.left.items()}
        ended = server.ended()
        early = {user: written - ended.get(taken[user], ends[user]) for user in missing & ends.keys()}
        assert all(seconds < 0 for seconds in early.values()), "the last write has all that ended before it"

    for user, told in clients.told.items():
        if user not in missing:
            row = rows[taken[user]]
            found = Told(*(row[name] for name in Told.__slots__[:-1]), told.at)
            assert found == told
    for user in (clients.left.keys() & taken.keys()) - missing:
        row = rows[taken[user]]
        assert row["outcome"] in ("disconnected", "completed", "cut")
        assert row["output_tokens"] >= clients.left[user][0]

    columns = ("key", "outcome", "prompt_tokens", "output_tokens")
    assert sums == summed(tuple(row[name] for name in columns) for row in rows.values())
    stayed = {key.id for key in clients.keys if not key.fickle}
    assert {group: total for group, total in sums.items() if group[0] in stayed} == summed(
        tuple(getattr(told, name) for name in columns)
        for user, told in clients.told.items()
        if told.key in stayed and user not in missing
    )


async def test_a_kill_while_the_database_is_held_loses_no_answer_that_is_in_the_journal(
    tmp_path: Path,
) -> None:
    port = unused()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600) as http:
        server = Server(tmp_path, http, port)
        await server.start()
        try:
            clients = Clients(http, await prepared(http))
            other = await holding(tmp_path / "data" / "loraplex.db")
            for number in range(5):
                assert await clients.ask(str(number), random.Random(number), max_tokens=3)
            journals = tmp_path / "data" / "usage"
            async with asyncio.timeout(240):
                while sum(file.read_bytes().count(b"\n") for file in journals.glob("*.jsonl")) < 5:
                    await asyncio.sleep(0.05)
            await server.end(signal.SIGKILL)
            other.execute("ROLLBACK")
            other.close()
            assert server.rows() == {}
            await server.start()
            taken, rows = server.taken(), server.rows()
            assert rows.keys() == {taken[user] for user in clients.told}
            for user, told in clients.told.items():
                row = rows[taken[user]]
                assert (row["prompt_tokens"], row["output_tokens"]) == (
                    told.prompt_tokens,
                    told.output_tokens,
                )
        finally:
            server.process.kill()
            server.process.join()
