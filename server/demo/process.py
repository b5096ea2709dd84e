"""A server as a child process: started, waited for, and always stopped again."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from server.demo.base import CHECKOUT
from server.demo.client import DemoError

POLL = 0.3  # seconds between two looks at /ready
STOP_PATIENCE = 60.0  # seconds for streams to end and the engine to stop
TAIL = 20  # log lines shown where the server did not start


def free_port(wanted: int, host: str = "127.0.0.1") -> int:
    """``wanted`` if nobody listens there, else a port that is free now."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise DemoError(f"there is no free port on {host}")


@asynccontextmanager
async def running(
    command: Sequence[str], env: Mapping[str, str], log: Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    """``command`` in a session of its own, so that a Ctrl-C reaches it once, as our SIGTERM.

    Its output goes to ``log``. It has ended when the block has, whatever ended the block.
    """
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command, env=env, cwd=CHECKOUT, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        await _stop(process)


async def _stop(process: asyncio.subprocess.Process) -> None:
    """SIGTERM, and after ``STOP_PATIENCE`` or a second Ctrl-C the end, for its own children too."""
    try:
        if process.returncode is None:
            process.terminate()
            await asyncio.wait_for(process.wait(), STOP_PATIENCE)
    except TimeoutError:
        pass
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)


async def wait_until_ready(
    process: asyncio.subprocess.Process, client: httpx.AsyncClient, log: Path, patience: float = 600.0
) -> None:
    """Returns once ``/ready`` says so; DemoError with the end of ``log`` if that does not happen."""
    deadline = asyncio.get_running_loop().time() + patience
    while asyncio.get_running_loop().time() < deadline:
        if process.returncode is not None:
            raise DemoError(f"the server ended with status {process.returncode}:\n{tail(log)}")
        try:
            if (await client.get("/ready")).status_code == 200:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        await asyncio.sleep(POLL)
    raise DemoError(f"the server was not ready after {patience:.0f} s:\n{tail(log)}")


def tail(log: Path) -> str:
    """The last lines of ``log``, and where the others are."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
    return "\n".join([*lines, f"(the whole log: {log})"])
