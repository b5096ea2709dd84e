"""The two servers behind one interface, each a process of its own on a free port of 127.0.0.1."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from adapters.worker.cpu.features import multiplies_bfloat16
from server.demo.base import BASE_NAME
from server.demo.process import free_port, running, tail
from tests.bench.adapters import Adapter
from tests.bench.client import Target

MAX_MODEL_LEN = 2048
SLOT_PATIENCE, PREEMPT_AFTER = 2.0, 10.0  # seconds; Loraplex's defaults
ADAPTER_NAME = "support"
START = 300.0

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def dtype_of_this_machine() -> str:
    """The model's own, unless the processor has no instructions for it, where nobody would choose it."""
    return "bfloat16" if multiplies_bfloat16() else "float32"


def processor_s(*pids: int) -> float:
    """What these processes have used so far, all their threads, also those that have ended."""
    # The number of another process's clock (CPUCLOCK_SCHED), as clock_getcpuclockid(3) makes it.
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


@dataclass(frozen=True, slots=True)
class Setup:
    """What both servers are started with. ``max_num_seqs`` is the most sequences in a batch.

    On CPU each token costs bare vLLM as much as ``max_lora_rank``, whatever its adapter's own rank.
    """

    gpu_slots: int = 4
    host_slots: int = 16
    max_num_seqs: int = 16
    max_lora_rank: int = 16
    dtype: str = field(default_factory=dtype_of_this_machine)

    def __str__(self) -> str:
        return f"{self.host_slots}-{self.max_num_seqs}-{self.max_lora_rank}-{self.dtype}"


LARGE = Setup(host_slots=32, max_lora_rank=64)


class Server(ABC):
    """One server of the comparison; ``running`` may be entered again and again, one after the other."""

    name: str
    ready_path: str

    def __init__(self, base: Path, work: Path) -> None:
        self._base = base
        self._work = work
        self._http = httpx.AsyncClient(timeout=300, trust_env=False)
        self.setup = Setup()
        self.url = ""
        self._process: psutil.Process | None = None
        self._loaded: set[Adapter] = set()

    @asynccontextmanager
    async def running(self, setup: Setup) -> AsyncIterator[None]:
        """The process, ready; it and everything it started have ended when the block has."""
        port = free_port(0)
        self.setup, self.url = setup, f"http://127.0.0.1:{port}"
        self._loaded.clear()
        log = self._work / f"{self.name}.log"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("LORAPLEX_", "VLLM_"))}
        env = inherited | ENVIRONMENT | self.environment(port)
        async with running(self.command(port), env, log) as process:
            try:
                await self._until_ready(process, log)
                self._process = psutil.Process(process.pid)
                yield
            finally:
                # A server that is still starting has no streams to end, and may not listen to a signal.
                patience = 30 if self._process else 3
                self._process = None
                if process.returncode is None:
                    process.terminate()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(process.wait(), patience)
                # The session is the server's own: what is left in it are engine processes it lost.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    async def _until_ready(self, process: asyncio.subprocess.Process, log: Path) -> None:
        try:
            await self._ready(process, log)
        except TimeoutError:
            raise RuntimeError(f"{self.name} was not ready after {START:.0f} s:\n{tail(log)}") from None

    async def _ready(self, process: asyncio.subprocess.Process, log: Path) -> None:
        async with asyncio.timeout(START):
            while True:
                if process.returncode is not None:
                    raise RuntimeError(f"{self.name} ended with status {process.returncode}:\n{tail(log)}")
                with contextlib.suppress(httpx.TransportError):
                    if (await self._http.get(self.url + self.ready_path)).status_code == 200:
                        return
                await asyncio.sleep(0.3)

    def api_cpu_seconds(self) -> float:
        """CPU time of the process that answers HTTP, without the engine's processes, since its start.

        Read from its clock (``clock_getcpuclockid(3)``): ``/proc`` counts in ticks of 10 ms.
        """
        assert self._process is not None, "the server is not running"
        return time.clock_gettime((~self._process.pid << 3) | 2)

    def footprint(self) -> dict[str, float]:
        """Memory, RSS (MiB), threads, open files: ``api_…`` of that process, ``engine_…`` of its children."""
        assert self._process is not None, "the server is not running"
        sides = {"api": [self._process], "engine": self._process.children(recursive=True)}
        return {f"{side}_{what}": n for side, who in sides.items() for what, n in _footprint(who).items()}

    def api_memory(self) -> float:
        """MiB of the process that answers HTTP, as ``footprint`` has it; takes milliseconds."""
        assert self._process is not None, "the server is not running"
        return _own_memory(self._process) / (1 << 20)

    async def aclose(self) -> None:
        await self._http.aclose()

    @abstractmethod
    def command(self, port: int) -> list[str]: ...

    @abstractmethod
    def environment(self, port: int) -> dict[str, str]: ...

    @abstractmethod
    async def install(self, adapters: Iterable[Adapter]) -> None:
        """What an operator does once: afterwards the adapters are on disk, from start to start.

        Loraplex answers a few tokens with each, so it must not be the same start that is measured.
        """

    @abstractmethod
    async def prepare(self, adapters: Iterable[Adapter]) -> None:
        """Before ``adapters``, which are installed, are measured on a server that has just started."""

    async def load(self, adapter: Adapter) -> None:
        """What the server must be told right before an adapter's first request; nothing a second time."""
        if adapter not in self._loaded:
            self._loaded.add(adapter)
            await self._load(adapter)

    @abstractmethod
    async def _load(self, adapter: Adapter) -> None: ...

    @abstractmethod
    def request(self, adapter: Adapter | None, body: dict[str, Any]) -> Target:
        """A completion by ``adapter``, or by the base model."""


class Loraplex(Server):
    """Each adapter is the only one of a customer of the same name."""

    name = "loraplex"
    ready_path = "/ready"

    def __init__(self, base: Path, work: Path) -> None:
        super().__init__(base, work)
        self._admin_key = secrets.token_urlsafe(24)
        self._keys: dict[Adapter | None, str] = {}

    def command(self, port: int) -> list[str]:
        return [sys.executable, "-m", "server", "serve"]

    def environment(self, port: int) -> dict[str, str]:
        settings = {
            "MODEL": str(self._base),
            "SERVED_MODEL_NAME": BASE_NAME,
            "HOST": "127.0.0.1",
            "PORT": str(port),
            "DATA_DIR": str(self._work / "data"),
            "ADMIN_KEY": self._admin_key,
            "GPU_SLOTS": str(self.setup.gpu_slots),
            "HOST_SLOTS": str(self.setup.host_slots),
            "MAX_LORA_RANK": str(self.setup.max_lora_rank),
            "MAX_MODEL_LEN": str(MAX_MODEL_LEN),
            "SLOT_PATIENCE": str(SLOT_PATIENCE),
            "PREEMPT_AFTER": str(PREEMPT_AFTER),
            "ENGINE_ARGS": json.dumps({"dtype": self.setup.dtype, "max_num_seqs": self.setup.max_num_seqs}),
        }
        return {f"LORAPLEX_{name}": value for name, value in settings.items()}

    async def install(self, adapters: Iterable[Adapter]) -> None:
        missing = [a for a in dict.fromkeys((None, *adapters)) if a not in self._keys]
        if missing:
            widest = max((a.rank for a in missing if a), default=0)
            async with self.running(Setup(max_lora_rank=max(widest, 16))):
                for adapter in missing:
                    self._keys[adapter] = await self._customer(adapter)

    async def prepare(self, adapters: Iterable[Adapter]) -> None:
        _read_into_page_cache(self._work / "data")

    async def _customer(self, adapter: Adapter | None) -> str:
        tenant = adapter.name if adapter else "base-only"
        fields = {"id": tenant, "weight": adapter.weight if adapter else 1.0, "base_allowed": True}
        await self._admin("POST", "/tenants", json=fields)
        if adapter is not None:
            files = {name: (adapter.folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
            await self._admin("POST", f"/tenants/{tenant}/adapters/{ADAPTER_NAME}/versions", files=files)
        return str((await self._admin("POST", f"/tenants/{tenant}/keys", json={})).json()["key"])

    async def limit(self, adapter: Adapter, limits: dict[str, int]) -> None:
        """From now on, for the adapter's customer; what it asked for before does not count."""
        await self._admin("PATCH", f"/tenants/{adapter.name}", json={"limits": limits})

    async def _admin(self, method: str, path: str, **content: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self._admin_key}"}
        response = await self._http.request(method, f"{self.url}/admin/v1{path}", headers=headers, **content)
        if not response.is_success:
            raise RuntimeError(f"Loraplex refused {path}: {response.status_code} {response.text}")
        return response

    async def _load(self, adapter: Adapter) -> None:
        """Nothing: the first request loads it."""

    def request(self, adapter: Adapter | None, body: dict[str, Any]) -> Target:
        headers = {"Authorization": f"Bearer {self._keys[adapter]}"}
        model = ADAPTER_NAME if adapter else BASE_NAME
        return Target(f"{self.url}/v1/completions", headers, {"model": model, **body})


class BareVllm(Server):
    """vLLM's own server, with adapters loaded while it runs; model names are adapter names."""

    name = "vllm"
    ready_path = "/health"

    def command(self, port: int) -> list[str]:
        options = {
            "model": self._base,
            "served-model-name": BASE_NAME,
            "host": "127.0.0.1",
            "port": port,
            "dtype": self.setup.dtype,
            "max-num-seqs": self.setup.max_num_seqs,
            "max-model-len": MAX_MODEL_LEN,
            "max-loras": self.setup.gpu_slots,
            "max-cpu-loras": self.setup.host_slots,
            "max-lora-rank": self.setup.max_lora_rank,
        }
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enable-lora", *flags]

    def environment(self, port: int) -> dict[str, str]:
        return {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}

    async def install(self, adapters: Iterable[Adapter]) -> None:
        """Nothing: vLLM knows an adapter from its load on."""

    async def prepare(self, adapters: Iterable[Adapter]) -> None:
        for adapter in adapters:
            _read_into_page_cache(adapter.folder)

    async def _load(self, adapter: Adapter) -> None:
        body = {"lora_name": adapter.name, "lora_path": str(adapter.folder)}
        response = await self._http.post(f"{self.url}/v1/load_lora_adapter", json=body)
        if response.status_code != 200:
            raise RuntimeError(f"vLLM refused to load {adapter.name}: {response.status_code} {response.text}")

    def request(self, adapter: Adapter | None, body: dict[str, Any]) -> Target:
        model = adapter.name if adapter else BASE_NAME
        return Target(f"{self.url}/v1/completions", {}, {"model": model, **body})


SERVERS: dict[str, type[Server]] = {cls.name: cls for cls in (Loraplex, BareVllm)}


def _footprint(processes: Iterable[psutil.Process]) -> dict[str, float]:
    sums = dict.fromkeys(("memory", "rss", "threads", "files"), 0.0)
    for process in processes:
        sums["memory"] += _own_memory(process) / (1 << 20)
        sums["rss"] += process.memory_info().rss / (1 << 20)
        sums["threads"] += process.num_threads()
        sums["files"] += process.num_fds()
    return sums


def _own_memory(process: psutil.Process) -> int:
    """Bytes of what it has written to; what it shares with others counts in equal parts.

    Not the pages of files that it maps, which the system drops when it needs room: a library's pages count
    for less while another process maps it too, and so move with what else the machine does.
    """
    rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
    return sum(int(kib) << 10 for kib in re.findall(r"^Pss_(?:Anon|Shmem): +(\d+) kB$", rollup, re.MULTILINE))


def _read_into_page_cache(folder: Path) -> None:
    """So that what is measured is a load, and not whether the disk happened to be asked before."""
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as content:
            while content.read(1 << 22):
                pass
