"""What hostile inputs are sent with: the server under attack, single requests, raw bytes, a process."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import multiprocessing
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

from server.http.connection import raise_descriptors

MIB = 1 << 20
# Seconds after which a request is given up; what takes longer counts as "no answer".
PATIENCE = 12.0
ATTACKER_NICE = 19
# Once: each client that reads certificates takes 20 ms.
TLS = httpx.create_ssl_context()


@dataclass(frozen=True)
class Victim:
    """The server under attack: its address, the attacker's key, a gateway's key, and the operator's calls.

    ``attacker`` is a customer who may upload adapters; ``small`` one whose adapters may take 2 MB.
    """

    url: str
    port: int
    base: Path
    base_name: str
    attacker: str
    small: str
    service: str
    control: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.attacker}"}


T = TypeVar("T")
Outcomes = Counter[str]
Attack = Callable[[Victim], Coroutine[None, None, Outcomes]]


async def post(victim: Victim, path: str, **content: Any) -> str:
    """The status of one request, or ``no answer`` or ``closed``."""
    headers = victim.headers | content.pop("headers", {})
    async with httpx.AsyncClient(base_url=victim.url, timeout=PATIENCE, trust_env=False, verify=TLS) as http:
        try:
            return str((await http.post(path, headers=headers, **content)).status_code)
        except httpx.TimeoutException:
            return "no answer"
        except httpx.HTTPError:
            return "closed"


async def together(*sent: Awaitable[str]) -> Outcomes:
    return Counter(await asyncio.gather(*sent))


async def raw(victim: Victim, *pieces: bytes, most: int = 1, seconds: float = PATIENCE) -> str:
    """Send ``pieces``, the last of them up to ``most`` times; the status of what comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", victim.port)
    try:
        async with asyncio.timeout(seconds):
            for piece in pieces[:-1]:
                writer.write(piece)
            for _ in range(most):
                writer.write(pieces[-1])
                await writer.drain()
            line = await reader.readline()
            return line.split()[1].decode() if line else "closed"
    except TimeoutError:
        return "no answer"
    except ConnectionError:
        return "closed"
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def head(path: str, *lines: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: a", *lines, "", ""]).encode()


class Attacker:
    """A process in which attacks run: beside the controls, the customers who must not notice, they would wait
    for what it costs to send two thousand requests, and that would be taken for the server's slowness."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    async def run(self, attack: Callable[..., Coroutine[Any, Any, T]], *given: Any) -> T:
        """What ``attack`` returns there; it and what it is given are picklable."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, _run, attack, given)


@contextlib.asynccontextmanager
async def attacker() -> AsyncIterator[Attacker]:
    """The process has started, and has imported what attacks import, when the block begins.

    In life an attacker is another machine: here its process has the lowest priority, so that what it costs
    itself is not taken for what it costs others.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_begin) as pool:
        ready = Attacker(pool)
        await ready.run(_nothing)
        yield ready


def _begin() -> None:
    raise_descriptors()
    os.nice(ATTACKER_NICE)


def _run(attack: Callable[..., Coroutine[Any, Any, T]], given: tuple[Any, ...]) -> T:
    return asyncio.run(attack(*given))


async def _nothing() -> None:
    """Brings along all that attacks need."""
    importlib.import_module("tests.bench.hostile")
