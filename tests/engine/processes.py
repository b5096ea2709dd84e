"""The server as a process of its own, on a real engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from adapters.worker.cpu.onednn import CAPACITY
from server.demo.process import free_port
from tests.support.forks import FIRST, TITLE, WANTED, Served
from tests.support.resting import RESTING
from tests.support.site import bearer

START = 600.0
LINES_SHOWN = 60  # of a server's log, where a test fails
CORE = "EngineCore"
FEW_KERNELS = "128"  # of oneDNN, made at the start: 512 of them take a second
Which = Literal["all", "first", "server", "nothing"]  # of a server and its engines is forked


class Running:
    """A server and its engine. ``started_in`` is how long it took to be ready, in seconds."""

    def __init__(self, process: asyncio.subprocess.Process | Served, log: Path, port: int) -> None:
        self.process = process
        self.log = log
        self.http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600)
        self.started_in = 0.0

    @property
    def admin(self) -> dict[str, str]:
        """The headers of the operator."""
        (key,) = re.findall(r"Admin key \(shown this once, keep it\): (\S+)", self.log.read_text())
        return bearer(key)

    def lines(self) -> list[dict[str, Any]]:
        """The documents of its log, so far."""
        whole, _, _ = self.log.read_text().rpartition("\n")  # the last may be half written
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]

    async def until_ready(self) -> None:
        began = time.monotonic()
        async with asyncio.timeout(START):
            while True:
                assert self.process.returncode is None, self.log.read_text()[-2000:]
                try:
                    if (await self.http.get("/ready")).status_code == 200:
                        self.started_in = time.monotonic() - began
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.2)

    async def exit_status(self, within: float = 240) -> int:
        async with asyncio.timeout(within):
            return await self.process.wait()

    def family(self) -> list[psutil.Process]:
        """Every process below the server."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def core(self) -> psutil.Process:
        """The process that runs vLLM's core."""
        return max(self._called(CORE), key=lambda one: one.create_time())

    async def next_child(self, known: Iterable[psutil.Process] = ()) -> None:
        """Wait for a process below the server that is none of ``known``: a core gets its name late."""
        before = {*known, psutil.Process(self.process.pid)}
        async with asyncio.timeout(240):
            while not any(_of_engine(" ".join(_command(one))) for one in {*self.family()} - before):
                await asyncio.sleep(0.05)

    def worker(self) -> psutil.Process:
        """The process that runs the model."""
        return max(self._called("VLLM::Worker"), key=lambda one: one.create_time())

    def _called(self, name: str) -> list[psutil.Process]:
        found = []
        for one in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                if name in " ".join([one.name(), *one.cmdline()]):
                    found.append(one)
        assert found, f"no {name} among {self.family()}"
        return found

    async def upload(self, tenant: str, adapter: str, folder: Path) -> httpx.Response:
        files = {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
        url = f"/admin/v1/tenants/{tenant}/adapters/{adapter}/versions"
        return await self.http.post(url, files=files, headers=self.admin)

    async def tenant(self, name: str, **fields: Any) -> dict[str, str]:
        """A new customer; returns the headers of its key."""
        made = await self.http.post("/admin/v1/tenants", json={"id": name, **fields}, headers=self.admin)
        assert made.status_code == 201, made.text
        key = await self.http.post(f"/admin/v1/tenants/{name}/keys", json={}, headers=self.admin)
        return bearer(key.json()["key"])


async def gone(processes: Iterable[psutil.Process], within: float) -> list[psutil.Process]:
    """Wait until ``processes`` have ended, at most ``within`` seconds; those that have not."""
    deadline = time.monotonic() + within
    while left := [one for one in processes if _runs(one)]:
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(0.1)
    return left


def _of_engine(command: str) -> bool:
    return "spawn_main" in command or command.startswith((f"{TITLE} {CORE}", f"VLLM::{CORE}"))


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@asynccontextmanager
async def starting(
    base: Path, data: Path, *, forked: Which = "all", **settings: str
) -> AsyncIterator[Running]:
    """A server's process, from its first moment. What is left of it ends with the block.

    Its engines' processes and itself are ``forked`` from one that has imported vLLM; or itself and its first
    engine, or itself alone, and it starts the others as it does elsewhere. With "nothing", and where it is a
    gateway, which needs no vLLM, it is started as an operator does.
    """
    # Not one that the system hands out to others while the model is being loaded.
    port = free_port(random.randrange(20_000, 32_000))
    log = data / "server.log"
    settings = {
        "MODEL": str(base),
        "DATA_DIR": str(data),
        "PORT": str(port),
        "GPU_SLOTS": "2",
        "MAX_LORA_RANK": "8",
        "MAX_MODEL_LEN": "512",
        **settings,
    }
    settings["ENGINE_ARGS"] = json.dumps({**RESTING, **json.loads(settings.get("ENGINE_ARGS", "{}"))})
    environment = os.environ | {f"LORAPLEX_{name}": value for name, value in settings.items()}
    process: asyncio.subprocess.Process | Served
    wanted = environment.get(WANTED) and forked != "nothing" and settings.get("ROLE") != "gateway"
    if forked == "first" and wanted:
        environment[WANTED] = FIRST
    elif forked != "all":
        environment.pop(WANTED, None)
    if wanted:
        environment[CAPACITY] = FEW_KERNELS
        process = Served(environment, log)
    else:
        environment.pop(WANTED, None)
        with log.open("ab") as out:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "server", "serve"),
                env=environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
    running = Running(process, log, port)
    try:
        yield running
    except BaseException:
        print(f"{log}, its last lines:", *log.read_text().splitlines()[-LINES_SHOWN:], sep="\n")
        raise
    finally:
        await running.http.aclose()
        # The whole session: the engine outlives a server that is killed where a test has failed.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


@asynccontextmanager
async def server(base: Path, data: Path, *, forked: Which = "all", **settings: str) -> AsyncIterator[Running]:
    """The same, ready to serve."""
    async with starting(base, data, forked=forked, **settings) as running:
        await running.until_ready()
        yield running
