"""Faults of disks, files and databases."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import redis.asyncio
from sqlalchemy import make_url

from adapters.model import WEIGHTS_FILE
from tests.bench.chaos.world import PATIENCE, Missed, World

# --- disks and files -----------------------------------------------------------------------------


def full(disk: str) -> Callable[[World], Awaitable[str]]:
    async def fill(world: World) -> str:
        with _filled(world.service.work / disk):
            await world.a_while()
        return ""

    return fill


async def nothing_grows(world: World) -> str:
    """No byte can be written to a file beyond its end, as if all disks were full; new files stay empty."""
    world.service.limit(resource.RLIMIT_FSIZE, 0)
    await world.a_while()
    world.service.limit(resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
    return ""


async def read_only(world: World) -> str:
    """What is opened in the data folder from now on."""
    data = str(world.service.work / "data")
    for command in (("mount", "--bind", data, data), ("mount", "-o", "remount,bind,ro", data)):
        subprocess.run(command, check=True)
    try:
        await world.a_while()
    finally:
        subprocess.run(("umount", "-l", data), check=True)
    return ""


async def damaged(world: World) -> str:
    """A byte of an adapter's file is another one after a restart."""
    digest = await world.spare("damaged")
    number = world.number
    file = world.service.work / "data" / "blobs" / digest / WEIGHTS_FILE
    with file.open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        last = weights.read(1)[0]
        weights.seek(-1, os.SEEK_END)
        weights.write(bytes([last ^ 1]))
    await world.service.again()
    await world.until("damaged", 503, "adapter_damaged")
    if await world.upload("damaged", number) != digest:
        raise Missed("the same files have another digest")
    await world.until("damaged", 200)
    return ""


@contextlib.contextmanager
def _filled(disk: Path) -> Iterator[None]:
    """A disk on which there is no room."""
    filler = disk / "filler"
    try:
        with filler.open("wb") as file:
            while (free := shutil.disk_usage(disk).free) > 0:
                with contextlib.suppress(OSError):  # the server took some meanwhile
                    os.posix_fallocate(file.fileno(), file.tell(), free)
                file.seek(0, os.SEEK_END)
            yield
    finally:
        filler.unlink()


# --- databases -----------------------------------------------------------------------------------


async def lock_database(world: World) -> str:
    with _locked(world.service.database):
        await asyncio.sleep(world.rng.uniform(4, 7))
    return ""


async def die_while_locked(world: World) -> str:
    with _locked(world.service.database):
        world.service.order(do="die")
        await asyncio.sleep(world.rng.uniform(4, 6))
    return ""


async def restart_postgres(world: World) -> str:
    server = _postgres(world)
    await asyncio.to_thread(server.stop)
    await asyncio.to_thread(server.start)
    return ""


async def postgres_away(world: World) -> str:
    server = _postgres(world)
    await asyncio.to_thread(server.stop)
    await asyncio.sleep(world.rng.uniform(4, 6))
    await asyncio.to_thread(server.start)
    return ""


async def kill_postgres(world: World) -> str:
    """Its other processes notice, and the next start recovers."""
    server = _postgres(world)
    await asyncio.to_thread(server.kill)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            await asyncio.to_thread(server.start)
            return ""
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.5)


async def stop_postgres(world: World) -> str:
    """Its connections stay open and say nothing."""
    main = psutil.Process(_postgres(world).process.pid)
    stopped = [main, *main.children(recursive=True)]
    for process in stopped:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
    await asyncio.sleep(world.rng.uniform(6, 9))
    for process in stopped:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
    return ""


async def cut_connections(world: World) -> str:
    """Five times, as a failover or a proxy does."""
    url = make_url(_postgres(world).url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(url)
    for _ in range(5):
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        )
        await asyncio.sleep(0.3)
    await connection.close()
    return ""


async def kill_redis(world: World) -> str:
    """For some seconds there is none; the one after it knows nothing."""
    assert world.service.redis is not None
    await asyncio.to_thread(world.service.redis.kill)
    await world.a_while()
    await asyncio.to_thread(world.service.redis.start)
    return ""


async def restart_redis(world: World) -> str:
    assert world.service.redis is not None
    await asyncio.to_thread(world.service.redis.kill)
    await asyncio.to_thread(world.service.redis.start)
    return ""


async def stop_redis(world: World) -> str:
    assert world.service.redis is not None
    world.service.redis.process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(3)
    world.service.redis.process.send_signal(signal.SIGCONT)
    return ""


async def flush_redis(world: World) -> str:
    assert world.service.redis is not None
    async with redis.asyncio.Redis.from_url(world.service.redis.url) as client:
        await client.flushall()
    return ""


def _postgres(world: World) -> Any:
    assert world.service.postgres is not None
    return world.service.postgres


@contextlib.contextmanager
def _locked(database: Path) -> Iterator[None]:
    """Another process writes."""
    with contextlib.closing(sqlite3.connect(database, timeout=5)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.rollback()
