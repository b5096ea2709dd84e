"""Faults under load: ``python -m tests.bench.chaos``, or ``make chaos``.

Eight clients of four customers ask a real engine short questions while one more uploads. A fault is made,
and undone if it is of a kind that ends by itself; a server whose process has ended is started again, as an
orchestrator would. A fault passes if every answer was right or refused with a code,
everything acknowledged is still there, no process of the engine is left without a server, and there is
service again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import secrets
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from server.demo.base import BASE_NAME, CHECKOUT, cache_folder, prepare
from server.demo.process import free_port, tail
from tests.bench.servers import ENVIRONMENT

START = 300.0  # seconds for a server to become ready
AGAIN = 150.0  # seconds after a fault within which there must be service
CALM = 10.0  # seconds of load before a fault, and of answers after which it is survived
GIVE_UP = 30.0  # seconds after which a client gives a request up, as its own timeout would
TENANTS = ("north", "south", "east", "west")
LIMITED = "west"  # has limits, where there is a Redis to count them in
PROMPTS = ("My parcel has not arrived.", "Why is the sky blue?")
OUT = CHECKOUT / "bench-results" / "chaos.md"
ADAPTER = CHECKOUT / "config" / "demo" / "acme"


class Redis:
    """A Redis of the bench's own, which forgets everything when it ends."""

    def __init__(self) -> None:
        self._port = free_port(0)
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Listening when it returns."""
        command = ("redis-server", "--port", str(self._port), "--bind", "127.0.0.1", "--save", "")
        quiet = asyncio.subprocess.DEVNULL
        self._process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet, cwd="/")
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", self._port)
                    writer.close()
                    return
                await asyncio.sleep(0.05)

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


class Service:
    """One data folder and the server on it, life after life."""

    def __init__(self, base: Path, work: Path, **settings: str) -> None:
        self.port = free_port(0)
        self.url = f"http://127.0.0.1:{self.port}"
        self.data, self.log = work / "data", work / "server.log"
        self.admin_key = secrets.token_urlsafe(24)
        self.http = httpx.AsyncClient(base_url=self.url, timeout=GIVE_UP, trust_env=False)
        self.process: asyncio.subprocess.Process | None = None
        self.redis: Redis | None = None
        self.ends: list[int] = []  # exit statuses of its lives
        self._settings = {
            "MODEL": str(base),
            "SERVED_MODEL_NAME": BASE_NAME,
            "PORT": str(self.port),
            "DATA_DIR": str(self.data),
            "ADMIN_KEY": self.admin_key,
            "GPU_SLOTS": "2",
            "MAX_LORA_RANK": "16",
            "MAX_MODEL_LEN": "512",
            "ENGINE_ARGS": json.dumps({"dtype": "float32", "max_num_seqs": 8}),
            "ENGINE_STALL": "10",
            **settings,
        }

    async def start(self, port: int | None = None) -> asyncio.subprocess.Process:
        """A process on the folder; at another ``port`` it is a second one, which is not kept."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("LORAPLEX_", "VLLM_"))}
        settings = self._settings | ({"PORT": str(port)} if port else {})
        env = inherited | ENVIRONMENT | {f"LORAPLEX_{name}": value for name, value in settings.items()}
        with self.log.open("ab") as out:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "server", "serve"),
                env=env,
                cwd=CHECKOUT,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        if port is None:
            self.process = process
        return process

    async def until_ready(self) -> None:
        async with asyncio.timeout(START):
            while not await self.ready():
                if self.process is not None and self.process.returncode is not None:
                    raise RuntimeError(f"the server did not start:\n{tail(self.log)}")
                await asyncio.sleep(0.3)

    async def ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return (await self.http.get("/ready", timeout=5)).status_code == 200
        return False

    def engine(self) -> list[psutil.Process]:
        """The engine's processes, the worker last."""
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    async def watch(self) -> None:
        """Start it again whenever its process has ended, until cancelled."""
        while True:
            assert self.process is not None
            self.ends.append(await self.process.wait())
            await asyncio.sleep(0.5)
            await self.start()

    async def stop(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), 40)
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        await self.http.aclose()

    async def admin(self, method: str, path: str, **content: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.admin_key}"}
        return await self.http.request(method, f"/admin/v1{path}", headers=headers, **content)


@dataclass
class Load:
    """The clients, what they were told, and what was acknowledged: (tenant, adapter) of every upload."""

    service: Service
    keys: dict[str, str]
    files: dict[str, bytes]
    right: dict[tuple[str, str], str] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    served: list[float] = field(default_factory=list)  # when an answer came
    acknowledged: set[tuple[str, str]] = field(default_factory=set)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for tenant in TENANTS * 2:
                group.create_task(self._client(tenant))
            group.create_task(self._uploader())

    async def _client(self, tenant: str) -> None:
        for prompt in itertools.cycle(PROMPTS):
            await self.ask(tenant, prompt)
            await asyncio.sleep(0.1)

    async def ask(self, tenant: str, prompt: str) -> None:
        body = {"model": "support", "prompt": prompt, "max_tokens": 8, "temperature": 0}
        headers = {"Authorization": f"Bearer {self.keys[tenant]}"}
        try:
            answer = await self.service.http.post("/v1/completions", headers=headers, json=body)
        except httpx.HTTPError as exc:
            self.outcomes[type(exc).__name__] += 1
            await asyncio.sleep(0.5)
            return
        if answer.status_code == 200:
            text = answer.json()["choices"][0]["text"]
            if self.right.setdefault((tenant, prompt), text) != text:
                self.wrong.append(f"{tenant} was told {text!r}")
            self.served.append(time.monotonic())
            self.outcomes["200"] += 1
            return
        code = answer.json()["error"]["code"] if "json" in answer.headers.get("content-type", "") else None
        self.outcomes[f"{answer.status_code} {code}"] += 1
        if code is None or answer.status_code == 500:
            self.wrong.append(f"{answer.status_code} {answer.text[:100]}")
        await asyncio.sleep(min(2.0, float(answer.headers.get("retry-after", 0.5))))

    async def _uploader(self) -> None:
        for number in itertools.count():
            tenant, name = TENANTS[number % len(TENANTS)], f"more-{number}"
            with contextlib.suppress(httpx.HTTPError):
                path = f"/tenants/{tenant}/adapters/{name}/versions"
                made = await self.service.admin("POST", path, files=self.files)
                self.outcomes[f"upload {made.status_code}"] += 1
                if made.status_code == 201:
                    self.acknowledged.add((tenant, name))
            await asyncio.sleep(2)

    async def lost(self) -> set[tuple[str, str]]:
        """What was acknowledged and is not there."""
        there: set[tuple[str, str]] = set()
        for tenant in TENANTS:
            listed = (await self.service.admin("GET", f"/tenants/{tenant}/adapters")).json()
            there |= {(tenant, adapter["name"]) for adapter in listed["data"]}
        return self.acknowledged - there


Fault = Callable[[Service], Awaitable[str]]


async def kill_worker(service: Service) -> str:
    service.engine()[-1].kill()
    return ""


async def stop_engine(service: Service) -> str:
    """Longer than a watchdog of 10 s waits; then it may go on, if it still is there."""
    stopped = service.engine()
    for process in stopped:
        process.suspend()
    await asyncio.sleep(40)
    still = [process for process in stopped if process.is_running()]
    for process in still:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
    return "ended and replaced" if not still else "not noticed: it went on by SIGCONT after 40 s"


async def kill_server(service: Service) -> str:
    """Nobody is left to end the engine; it must end by itself."""
    assert service.process is not None
    engine = service.engine()
    service.process.kill()
    for _ in range(100):
        alive = [process for process in engine if process.is_running()]
        if not alive:
            return ""
        await asyncio.sleep(0.1)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return f"{len(alive)} processes of the engine were left"


async def lock_database(service: Service) -> str:
    """Another process writes for 12 s; what the operator is told meanwhile."""
    with contextlib.closing(sqlite3.connect(service.data / "loraplex.db", timeout=5)) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        try:
            made = await service.admin("POST", "/tenants", json={"id": "meanwhile"})
            told = f"{made.status_code}"
        except httpx.HTTPError as exc:
            told = type(exc).__name__
        waited = time.monotonic() - began
        await asyncio.sleep(max(0.0, 12 - waited))
        other.rollback()
    return f"an admin's write: {told} after {waited:.0f} s"


async def second_server(service: Service) -> str:
    """On the same folder, while uploads run."""
    process = await service.start(port=free_port(0))
    try:
        status = await asyncio.wait_for(process.wait(), 90)
        return f"it ended with status {status}"
    except TimeoutError:
        os.killpg(process.pid, signal.SIGKILL)
        return "it ran"


async def kill_redis(service: Service) -> str:
    """For eight seconds there is none; the one after it knows nothing."""
    assert service.redis is not None
    service.redis.kill()
    await asyncio.sleep(8)
    await service.redis.start()
    return ""


REDIS = "SIGKILL for Redis, another after 8 s"
FAULTS: dict[str, Fault] = {
    "SIGKILL for the engine's worker": kill_worker,
    "SIGSTOP for the engine": stop_engine,
    "SIGKILL for the server": kill_server,
    "database locked by another process": lock_database,
    "a second server on the folder": second_server,
    REDIS: kill_redis,
}


@dataclass(frozen=True)
class Row:
    """``again`` is the longest time without an answer around the fault, in seconds; inf if it did not end."""

    fault: str
    said: str
    again: float
    outcomes: Counter[str]
    wrong: Sequence[str]
    lost: int
    ends: Sequence[int]

    @property
    def misses(self) -> list[str]:
        found = []
        if self.again > AGAIN:
            found.append("no service again")
        if self.lost:
            found.append(f"{self.lost} lost")
        if self.wrong:
            found.append(f"{len(self.wrong)} wrong answers, as {self.wrong[0]}")
        if "left" in self.said or "not noticed" in self.said or self.said == "it ran" or ": 500" in self.said:
            found.append(self.said)
        return found


def longest_pause(served: Sequence[float], start: float, end: float) -> float:
    """The longest time without an answer between ``start`` and ``end``, in seconds."""
    times = [start, *sorted(t for t in served if start <= t <= end), end]
    return max(b - a for a, b in itertools.pairwise(times))


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| fault | what was seen | longest time without an answer | clients were told | |",
        "| --- | --- | ---: | --- | --- |",
    ]
    for row in rows:
        told = ", ".join(f"{count} × {what}" for what, count in row.outcomes.most_common())
        seen = [row.said] if row.said else []
        if row.ends:
            seen.append(f"the server ended with {', '.join(map(str, row.ends))} and was started again")
        verdict = f"missed: {'; '.join(row.misses)}" if row.misses else "met"
        lines.append(f"| {row.fault} | {'; '.join(seen) or '–'} | {row.again:.1f} s | {told} | {verdict} |")
    return "\n".join(lines)


async def steady(service: Service, load: Load) -> bool:
    """Wait until there were answers for ``CALM`` seconds; False if that does not come within ``AGAIN``.

    A fault needs a moment to show, so nothing counts in the first ``CALM`` seconds.
    """
    await asyncio.sleep(CALM)
    deadline, since = time.monotonic() + AGAIN, None
    while (now := time.monotonic()) < deadline:
        if await service.ready() and load.served and load.served[-1] > now - CALM / 2:
            since = since or now
            if now - since >= CALM:
                return True
        else:
            since = None
        await asyncio.sleep(0.5)
    return False


async def disturbed(base: Path, name: str) -> Row:
    """One fault, on a server and a folder of its own."""
    work = Path(tempfile.mkdtemp(prefix="chaos-"))
    redis = Redis() if name == REDIS else None
    service = Service(base, work, **({"LIMITS_REDIS_URL": redis.url} if redis else {}))
    tasks: list[asyncio.Task[None]] = []
    try:
        if redis:
            await redis.start()
            service.redis = redis
        await service.start()
        await service.until_ready()
        files = {file: (ADAPTER / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE)}
        load = Load(service, {}, files)
        for tenant in TENANTS:
            limits = {"requests_per_minute": 100_000} if redis and tenant == LIMITED else {}
            await service.admin("POST", "/tenants", json={"id": tenant, "limits": limits})
            made = await service.admin("POST", f"/tenants/{tenant}/adapters/support/versions", files=files)
            made.raise_for_status()
            load.acknowledged.add((tenant, "support"))
            load.keys[tenant] = (await service.admin("POST", f"/tenants/{tenant}/keys", json={})).json()[
                "key"
            ]
        tasks = [asyncio.create_task(service.watch()), asyncio.create_task(load.run())]
        await asyncio.sleep(CALM)
        load.outcomes.clear()
        start = time.monotonic()
        said = await FAULTS[name](service)
        survived = await steady(service, load)
        lost = await load.lost()
        again = longest_pause(load.served, start, time.monotonic()) if survived else math.inf
        return Row(name, said, again, load.outcomes, load.wrong, len(lost), service.ends)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await service.stop()
        if redis:
            redis.kill()
        shutil.rmtree(work, ignore_errors=True)


async def measure(names: Sequence[str]) -> list[Row]:
    base = prepare(cache_folder())
    rows = []
    for name in names:
        rows.append(await disturbed(base, name))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Make faults under load, and look at what was promised.")
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}; all if none")
    given = parser.parse_args()
    if unknown := set(given.faults) - set(FAULTS):
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    rows = asyncio.run(measure([name for name in FAULTS if not given.faults or name in given.faults]))
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(table(rows) + "\n")
    print(f"\n{table(rows)}\n\nwritten to {OUT}")
    return int(any(row.misses for row in rows))


if __name__ == "__main__":
    sys.exit(main())
