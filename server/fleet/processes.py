"""A fleet on this machine as plain processes: replicas and a gateway, started again when they die.

    replicas   PORT + 1, PORT + 2 …   (their LORAPLEX_REPLICA_URL is 127.0.0.1)
    gateway    PORT

For more than one machine, or for scaling, take systemd, Compose, Kubernetes or Ray; see docs/fleet.md.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from server.settings import Settings

logger = logging.getLogger(__name__)

# Seconds before a process is started again: doubled while it keeps dying, to at most the second.
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
# One that ran for so long has not died at its start.
SETTLED_S = 60.0
STOP_PATIENCE_S = 90.0


@dataclass(slots=True)
class Member:
    """One process of the fleet; ``settings`` over those of the environment, by name without the prefix."""

    name: str
    settings: Mapping[str, str]
    process: asyncio.subprocess.Process | None = None
    starts: int = 0
    wait: float = field(default=FIRST_WAIT_S)


def members(settings: Settings, replicas: int) -> list[Member]:
    """What is to run: ``replicas`` replicas, then a gateway on the settings' own port."""
    key = settings.fleet_key.get_secret_value() if settings.fleet_key else secrets.token_urlsafe(32)
    made = [
        Member(
            f"replica-{number}",
            {
                "ROLE": "replica",
                "FLEET_KEY": key,
                "HOST": "127.0.0.1",
                "PORT": str(settings.port + number),
                "REPLICA_URL": f"http://127.0.0.1:{settings.port + number}",
            },
        )
        for number in range(1, replicas + 1)
    ]
    return [*made, Member("gateway", {"ROLE": "gateway", "FLEET_KEY": key})]


def up(settings: Settings, replicas: int, config: Path | None) -> int:
    """Runs the fleet until SIGINT or SIGTERM; returns the exit status.

    The gateway is stopped first, and then the replicas: each ends what it has to answer.
    """
    logging.basicConfig(level=logging.INFO, format="fleet: %(message)s", stream=sys.stderr)
    return asyncio.run(_up(members(settings, replicas), config))


async def _up(fleet: list[Member], config: Path | None) -> int:
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    keeping = [asyncio.create_task(_keep(member, config, stopping)) for member in fleet]
    await stopping.wait()
    await _stop(fleet[-1])
    await asyncio.gather(*map(_stop, fleet[:-1]))
    for task in keeping:
        task.cancel()
    await asyncio.gather(*keeping, return_exceptions=True)
    return 0


async def _keep(member: Member, config: Path | None, stopping: asyncio.Event) -> None:
    """Starts the process, and starts it again whenever it ends."""
    clock = asyncio.get_running_loop().time
    options = ["--config", str(config)] if config is not None else []
    environment = os.environ | {f"LORAPLEX_{name}": value for name, value in member.settings.items()}
    while not stopping.is_set():
        began = clock()
        member.starts += 1
        member.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "server", "serve", *options), env=environment, start_new_session=True
        )
        logger.info("%s has process %d", member.name, member.process.pid)
        status = await member.process.wait()
        if stopping.is_set():
            return
        member.wait = FIRST_WAIT_S if clock() - began > SETTLED_S else min(LONGEST_WAIT_S, 2 * member.wait)
        logger.warning("%s ended with %d; it starts again in %.0f s", member.name, status, member.wait)
        await asyncio.sleep(member.wait)


async def _stop(member: Member) -> None:
    process = member.process
    if process is None or process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(STOP_PATIENCE_S):
            await process.wait()
    except TimeoutError:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
