"""What is disturbed: a data folder and the server on it, life after life, with its databases."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from server.demo.base import BASE_NAME, CHECKOUT, cache_folder, prepare
from server.demo.process import free_port, tail
from server.settings import Settings
from tests.bench.chaos import server
from tests.bench.servers import ENVIRONMENT
from tests.support import tiny
from tests.support.ports import unused
from tests.support.services import PostgresServer, RedisServer
from tests.support.site import ADMIN_KEY, bearer

START = 300.0  # seconds for a server to become ready
GIVE_UP = 30.0  # seconds after which a client gives a request up, as its own timeout would
GIVE_UP_REAL = 300.0  # longer than the real engine takes to start again
CORE, WORKER, GUARD = "VLLM::EngineCore", "VLLM::Worker", "guard.py"  # processes of the real engine
STALL_REAL = 45.0  # seconds; less takes compiling the first step, where a machine has other work too
ROOM = {"data": 96, "db": 48, "log": 16}  # MiB of the disks that can be filled

_processes = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Kind:
    """Where a run takes place: which engine, which database, and whether disks of its own can be mounted."""

    real: bool = False
    postgres: bool = False
    disks: bool = False

    def __str__(self) -> str:
        database = "PostgreSQL and Redis" if self.postgres else "SQLite"
        return f"{'real' if self.real else 'fake'} engine, {database}"


@dataclass
class Service:
    """``lives`` counts starts; ``ends`` has the exit statuses of those that have ended."""

    kind: Kind
    work: Path
    clock: Path  # holds the seconds by which the server's clock is off
    postgres: PostgresServer | None = None
    redis: RedisServer | None = None
    port: int = field(default_factory=lambda: free_port(0))
    lives: int = 0
    ends: list[int] = field(default_factory=list)
    descriptors: int = 0
    spare_port: int = field(default_factory=unused)  # of the standby that PostgreSQL may have
    started_in: float = 0.0  # seconds that the last start took until all was ready
    process: Any = None
    keep: bool = True  # whether ``watch`` starts it again

    def __post_init__(self) -> None:
        self.url = f"http://127.0.0.1:{self.port}"
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2)
        patience = GIVE_UP_REAL if self.kind.real else GIVE_UP
        self.http = httpx.AsyncClient(base_url=self.url, timeout=patience, trust_env=False, limits=limits)
        for name in ROOM:
            (self.work / name).mkdir(exist_ok=True)
        self.database_url = f"sqlite:///{self.database}"
        if self.postgres:
            hosts = (f"host=127.0.0.1:{port}" for port in (self.postgres.port, self.spare_port))
            self.database_url = f"postgresql://loraplex@/postgres?{'&'.join(hosts)}"

    # --- processes -------------------------------------------------------------------------------

    def start(self) -> None:
        self._started = time.monotonic()
        self.process = self._real() if self.kind.real else self._fake(self.port)
        self.lives += 1

    def second(self) -> Any:
        """Another server on the same folder."""
        return self._fake(free_port(0))

    def _fake(self, port: int) -> Any:
        fields = self._settings(port) | {"gpu_slots": 4, "host_slots": 6, "engine_stall": 2.0}
        settings = Settings(model=f"/models/{tiny.NAME}", max_lora_rank=8, slot_patience=0.2, **fields)
        process = _processes.Process(
            target=server.serve, args=(settings, tiny.base(), self.work, self.descriptors)
        )
        process.start()
        return process

    def _real(self) -> Any:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("LORAPLEX_", "VLLM_"))}
        engine = {"dtype": "float32", "max_num_seqs": 8}
        fields = self._settings(self.port) | {
            "model": prepare(cache_folder()),
            "served_model_name": BASE_NAME,
            "gpu_slots": 2,
            "host_slots": 4,
            "max_lora_rank": 16,
            "max_model_len": 512,
            "engine_stall": STALL_REAL,
            "engine_args": json.dumps(engine),
        }
        settings = {f"LORAPLEX_{name.upper()}": str(value) for name, value in fields.items()}
        command = (sys.executable, "-m", "server", "serve")
        with (self.work / "log" / "server.log").open("ab") as out:
            env = inherited | ENVIRONMENT | settings
            return subprocess.Popen(
                command, env=env, cwd=CHECKOUT, stdout=out, stderr=out, start_new_session=True
            )

    def _settings(self, port: int) -> dict[str, Any]:
        return {
            "port": port,
            "data_dir": self.work / "data",
            "database_url": self.database_url,
            "database_timeout": 2.0,
            "admin_key": ADMIN_KEY,
            "log_level": "warning",
            "drain_timeout": 3,
            "engine_restarts": 50,
            "disk_reserve": 4 << 20,
            **({"limits_redis_url": self.redis.url} if self.redis else {}),
        }

    @property
    def database(self) -> Path:
        return self.work / "db" / "loraplex.db"

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def status(self) -> int | None:
        """The process's exit status, None while it runs."""
        return self.process.poll() if self.kind.real else self.process.exitcode  # type: ignore[no-any-return]

    async def watch(self) -> None:
        """Start it again whenever its process has ended, until cancelled."""
        while True:
            if self.keep and (status := self.status()) is not None:
                self.ends.append(status)
                self.start()
            await asyncio.sleep(0.1)

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    async def again(self) -> None:
        """A new life in peace, so that what the last one remembers does not count."""
        lives = self.lives
        self.signal(signal.SIGTERM)
        async with asyncio.timeout(START):
            while self.lives == lives:
                await asyncio.sleep(0.05)
        await self.until_ready()

    def engine(self) -> list[psutil.Process]:
        """All that the server has started, but for its guard."""
        children = psutil.Process(self.pid).children(recursive=True)
        return [child for child in children if not _says(child, GUARD)]

    def called(self, name: str) -> psutil.Process:
        """The youngest of the server's processes with ``name`` in its name or its command line."""
        children = psutil.Process(self.pid).children(recursive=True)
        return max((one for one in children if _says(one, name)), key=lambda one: one.create_time())

    def order(self, **what: Any) -> None:
        """To the fake engine."""
        (self.work / "order").write_text(json.dumps(what))
        self.signal(signal.SIGUSR1)

    def limit(self, which: int, most: int) -> None:
        resource.prlimit(self.pid, which, (most, resource.RLIM_INFINITY))

    def fail_disk(self, name: str, error: int) -> None:
        """What the server writes in its folder ``name`` fails with ``error``; with 0 no longer."""
        with self.clock.with_name("disk").open("r+b") as file:
            if error:
                file.seek(4)
                file.write(f"{self.work / name}/".encode() + b"\0")
                file.flush()
            file.seek(0)
            file.write(struct.pack("i", error))

    def set_clock(self, seconds: int) -> None:
        """The server's wall clock is off by so many seconds."""
        with self.clock.open("r+b") as file:
            file.write(struct.pack("q", seconds))

    # --- its answers -----------------------------------------------------------------------------

    async def until_ready(self) -> None:
        async with asyncio.timeout(START):
            while not await self.ready():
                if not self.keep and self.status() is not None:
                    raise RuntimeError(f"the server did not start:\n{tail(self.work / 'log' / 'server.log')}")
                await asyncio.sleep(0.1)
        self.started_in = time.monotonic() - self._started

    async def ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return (await self.http.get("/ready", timeout=5)).status_code == 200
        return False

    async def admin(self, method: str, path: str, **content: Any) -> httpx.Response:
        return await self.http.request(method, f"/admin/v1{path}", headers=bearer(ADMIN_KEY), **content)

    # --- the end ---------------------------------------------------------------------------------

    async def close(self) -> None:
        self.keep = False
        if self.process is not None and self.status() is None:
            for number, patience in ((signal.SIGCONT, 0), (signal.SIGTERM, 30), (signal.SIGKILL, 5)):
                self.signal(number)
                deadline = time.monotonic() + patience
                while self.status() is None and time.monotonic() < deadline:
                    await asyncio.sleep(0.1)
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        await self.http.aclose()
        if self.postgres:
            self.postgres.stop()
        if self.redis:
            self.redis.kill()


def _says(process: psutil.Process, name: str) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return name in " ".join([process.name(), *process.cmdline()])
    return False


@contextlib.contextmanager
def folder(kind: Kind, root: Path) -> Iterator[Path]:
    """A folder for a service, with disks of its own in it where the machine allows."""
    work = root / str(kind).replace(" ", "-").replace(",", "")
    work.mkdir()
    mounted = []
    try:
        if kind.disks:
            for name, size in ROOM.items():
                (work / name).mkdir()
                subprocess.run(mount(work / name, f"size={size}m"), check=True)
                mounted.append(work / name)
        yield work
    finally:
        for path in mounted:
            subprocess.run(("umount", "-l", path), check=False)
        shutil.rmtree(work, ignore_errors=True)


def mount(path: Path, options: str) -> tuple[str, ...]:
    return ("mount", "-t", "tmpfs", "-o", options, "chaos", str(path))


def can_mount(root: Path) -> bool:
    """Whether this process may mount a disk, as root with that right can."""
    probe = root / "probe"
    probe.mkdir()
    if subprocess.run(mount(probe, "size=1m"), capture_output=True, check=False).returncode:
        return False
    subprocess.run(("umount", probe), check=True)
    return True


def lie(root: Path) -> bool:
    """Have all servers preload ``clock.c`` and ``disk.c``, which obey files in ``root``. Call it before the
    first start; False without a compiler."""
    (root / "clock").write_bytes(struct.pack("q", 0))
    (root / "disk").write_bytes(bytes(1024))
    compiler = shutil.which("cc")
    if compiler is None:
        return False
    libraries = {root / f"{name}.so": Path(__file__).with_name(f"{name}.c") for name in ("clock", "disk")}
    for library, source in libraries.items():
        command = (compiler, "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl")
        if subprocess.run(command, check=False).returncode:
            return False
    os.environ |= {"LD_PRELOAD": " ".join(map(str, libraries))}
    os.environ |= {"CHAOS_CLOCK": str(root / "clock"), "CHAOS_DISK": str(root / "disk")}
    return True


def start_forking() -> None:
    """The process that servers are forked from, with all that they import."""
    protocols = [f"vllm.entrypoints.openai.{kind}.protocol" for kind in ("chat_completion", "completion")]
    _processes.set_forkserver_preload(["tests.bench.chaos.server", *protocols])
    multiprocessing.forkserver.ensure_running()
    for name in ("LD_PRELOAD", "CHAOS_CLOCK", "CHAOS_DISK"):
        os.environ.pop(name, None)
