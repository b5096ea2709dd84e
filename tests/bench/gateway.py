"""``python -m tests.bench.gateway``: what the way through a gateway costs, on engines without a model.

One process that has everything, then a replica behind a gateway, each with the same streams: tokens a
second, time to the first token, and processor time of each process for 1,000 tokens, and how much of that is
the program's own, which the kernel's work for the connections is not. ``--pairs`` repeats both in turn, so
that other load of the machine falls on both; the medians are printed. The streams have their tokens at the
same moments, 33 times a second, as an engine gives them. What a process takes while nobody asks is told
apart.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import aiohttp
import psutil

from server.demo.process import free_port

KEY, FLEET_KEY = "admin-key-of-the-bench", "fleet-key-of-the-bench"
MODULE = "tests.support.fake_server"
STARTED_WITHIN_S = 300.0
IDLE_S = 20.0


@dataclass
class Process:
    """One process of a fleet."""

    url: str
    process: subprocess.Popen[bytes]

    @property
    def cpu(self) -> tuple[float, float]:
        """Seconds of processor time so far, and those of the program's own."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system), float(times.user)


@dataclass
class Seen:
    """``cpu`` is in ms for 1,000 tokens, of the process that was asked and of its replica."""

    tokens_per_s: float
    first_ms: float
    cpu: float
    own: float
    replica_cpu: float = 0.0


@contextmanager
def started(data: Path, role: str, streams: int, profile: str | None = None) -> Iterator[Process]:
    port = free_port(0)
    told = {
        "MODEL": "/models/fake",
        "SERVED_MODEL_NAME": "fake",
        "DATA_DIR": str(data),
        "PORT": str(port),
        "ROLE": role,
        "ADMIN_KEY": KEY,
        "FLEET_KEY": FLEET_KEY,
        "LOG_LEVEL": "warning",
    }
    running = {"FAKE_RUNNING": str(streams)}
    command = [sys.executable, *(["-m", "cProfile", "-o", profile] if profile else []), "-m", MODULE]
    process = subprocess.Popen(
        command,
        env=os.environ | {f"LORAPLEX_{name}": value for name, value in told.items()} | running,
    )
    try:
        yield Process(f"http://127.0.0.1:{port}", process)
    finally:
        process.terminate()
        process.wait(30)


async def until_ready(session: aiohttp.ClientSession, one: Process) -> None:
    deadline = time.monotonic() + STARTED_WITHIN_S
    while time.monotonic() < deadline:
        try:
            async with session.get(f"{one.url}/ready") as answer:
                if answer.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.2)
    raise TimeoutError(f"{one.url} is not ready")


async def customer(session: aiohttp.ClientSession, one: Process, name: str) -> dict[str, str]:
    admin = {"Authorization": f"Bearer {KEY}"}
    for path, body in (("", {"id": name, "base_allowed": True}), (f"/{name}/keys", {})):
        async with session.post(f"{one.url}/admin/v1/tenants{path}", json=body, headers=admin) as answer:
            assert answer.status == 201, await answer.text()
            told = await answer.json()
    return {"Authorization": f"Bearer {told['key']}"}


async def stream(
    session: aiohttp.ClientSession, one: Process, key: dict[str, str], tokens: int
) -> tuple[int, float]:
    """(tokens, seconds to the first one)."""
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": "fake", "messages": messages, "max_tokens": tokens, "stream": True}
    began, first, seen = time.perf_counter(), 0.0, 0
    async with session.post(f"{one.url}/v1/chat/completions", json=body, headers=key) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if b'"content":"' in line or b'"content": "' in line:
                seen += b'"content":""' not in line
                first = first or time.perf_counter() - began
    return seen, first


async def measured(
    session: aiohttp.ClientSession,
    one: Process,
    key: dict[str, str],
    streams: int,
    tokens: int,
    replica: Process | None = None,
) -> Seen:
    (cpu, own), other, began = one.cpu, replica.cpu[0] if replica else 0.0, time.perf_counter()
    done = await asyncio.gather(*(stream(session, one, key, tokens) for _ in range(streams)))
    seconds, total = time.perf_counter() - began, sum(seen for seen, _ in done)
    assert total >= 0.9 * streams * tokens, total
    scale = 1e6 / total
    return Seen(
        total / seconds,
        1000 * median(first for _, first in done),
        (one.cpu[0] - cpu) * scale,
        (one.cpu[1] - own) * scale,
        (replica.cpu[0] - other) * scale if replica else 0.0,
    )


async def compare(streams: int, tokens: int, pairs: int, profile: str | None) -> list[tuple[str, Seen]]:
    """Of each pair, one process alone and a gateway with a replica."""
    found: list[tuple[str, Seen]] = []
    with ExitStack() as stack:
        folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2)]
        alone = stack.enter_context(started(folders[0], "all", streams))
        replica = stack.enter_context(started(folders[1], "replica", streams))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await until_ready(session, replica)
            gateway = stack.enter_context(started(folders[1], "gateway", streams, profile))
            for one in (gateway, alone):
                await until_ready(session, one)
            keys = {one.url: await customer(session, one, "bench") for one in (gateway, alone)}
            idle = gateway.cpu[0], alone.cpu[0]
            await asyncio.sleep(IDLE_S)
            idle = gateway.cpu[0] - idle[0], alone.cpu[0] - idle[1]
            print(
                f"idle: {1000 * idle[0] / IDLE_S:.1f} ms of processor time a second in a gateway,"
                f" {1000 * idle[1] / IDLE_S:.1f} in one process alone",
                flush=True,
            )
            for number in range(pairs + 1):
                for name, one, behind in (("alone", alone, None), ("gateway", gateway, replica)):
                    seen = await measured(session, one, keys[one.url], streams, tokens, behind)
                    if number:  # the first pair warms up
                        found.append((name, seen))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=200, help="of each stream")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--profile", help="a file for cProfile's statistics of the gateway")
    args = parser.parse_args()
    found = asyncio.run(compare(args.streams, args.tokens, args.pairs, args.profile))
    for name in ("alone", "gateway"):
        rows = [seen for each, seen in found if each == name]
        print(
            f"{name}: {median(row.tokens_per_s for row in rows):.0f} tokens/s,"
            f" first token after {median(row.first_ms for row in rows):.1f} ms,"
            f" {median(row.cpu for row in rows):.0f} ms of processor time for 1,000 tokens,"
            f" {median(row.own for row in rows):.0f} of them the program's own"
            f" (its replica: {median(row.replica_cpu for row in rows):.0f})"
        )


if __name__ == "__main__":
    main()
