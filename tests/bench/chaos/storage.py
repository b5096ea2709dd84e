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
from adapters.store import backup
from adapters.store.blobs import BlobStore
from adapters.store.check import check_offline
from tests.bench.chaos.processes import kill_server
from tests.bench.chaos.world import PATIENCE, SPARE, Missed, World

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


def failing(disk: str, error: int) -> Callable[[World], Awaitable[str]]:
    """All that is written there fails, to files that are open, too."""

    async def fail(world: World) -> str:
        world.service.fail_disk(disk, error)
        try:
            await world.a_while()
        finally:
            world.service.fail_disk(disk, 0)
        return ""

    return fail


async def damaged(world: World) -> str:
    """A byte of an adapter's file is another one after a restart."""
    digest = await world.spare("damaged")
    _damage(_blob(world, digest))
    await world.service.again()
    return await _refused_until_mended(world, "damaged", "changed", digest)


async def damaged_under_it(world: World) -> str:
    """The same while the server runs."""
    digest = await world.spare("damaged")
    _damage(_blob(world, digest))
    return await _refused_until_mended(world, "damaged", "changed", digest)


async def gone_under_it(world: World) -> str:
    """An adapter's files are gone."""
    digest = await world.spare("lost")
    await asyncio.to_thread(shutil.rmtree, _blob(world, digest))
    return await _refused_until_mended(world, "lost", "missing", digest)


async def _refused_until_mended(world: World, name: str, reason: str, digest: str) -> str:
    """Named, and that version alone answered 503, until the same files are uploaded again."""
    number = world.number
    await world.spare("beside")
    # What is in memory was whole when it was read, and leaves it when nobody asks.
    await world.until(name, 503, "adapter_damaged", every=2)
    found = (await world.service.admin("GET", "/check")).json()["damaged"]
    named = [(one["reason"], one["versions"]) for one in found]
    if named != [(reason, [f"{SPARE}/{name}@1"])]:
        raise Missed(f"the check names {found}")
    await world.until("beside", 200)
    if await world.upload(name, number) != digest:
        raise Missed("the same files have another digest")
    await world.until(name, 200)
    return ""


def _blob(world: World, digest: str) -> Path:
    return world.service.work / "data" / "blobs" / digest


def _damage(blob: Path) -> None:
    with (blob / WEIGHTS_FILE).open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        last = weights.read(1)[0]
        weights.seek(-1, os.SEEK_END)
        weights.write(bytes([last ^ 1]))


async def killed_in_a_backup(world: World) -> str:
    """The backup before it is as it was, and the next one is whole."""
    name = f"chaos-{world.rng.randrange(10**6)}"
    folder = world.service.work / "data" / "backups" / name
    await _back_up(world, name)
    await _restored(world, folder)
    await world.spare("later")
    running = asyncio.create_task(world.service.admin("POST", "/backup", json={"name": name}))
    while not running.done() and not list(folder.glob(".*-*")):
        await asyncio.sleep(0.001)
    await asyncio.sleep(world.rng.uniform(0, 0.02))
    cut = not running.done()
    await kill_server(world)
    await asyncio.gather(running, return_exceptions=True)
    await _restored(world, folder)
    await world.service.until_ready()
    await _back_up(world, name)
    await _restored(world, folder)
    left = [path.name for path in folder.rglob(".*-*")]
    await asyncio.to_thread(shutil.rmtree, folder)
    if left:
        raise Missed(f"a backup that was killed has left {', '.join(left)}")
    return "cut" if cut else "it had ended"


async def _back_up(world: World, name: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while (made := await world.service.admin("POST", "/backup", json={"name": name})).status_code != 201:
        if made.status_code != 503 or time.monotonic() > deadline:
            raise Missed(f"a backup got {made.status_code} {made.text[:200]}")
        await asyncio.sleep(0.5)
    if (said := made.json())["broken"] or said["missing"]:
        raise Missed(f"a backup lacks {said}")


async def _restored(world: World, folder: Path) -> None:
    """All rows of the backup and all their bytes are there elsewhere."""
    into = world.service.work / f"restored-{world.rng.randrange(10**9)}"
    url, blobs = f"sqlite:///{into / 'loraplex.db'}", into / "blobs"
    made = await asyncio.to_thread(backup.restore, folder, url, blobs)
    found = await check_offline(url, BlobStore(into, max_bytes=1 << 30), repair=False)
    await asyncio.to_thread(shutil.rmtree, into)
    if made.broken or made.missing or not found.is_ok or not found.versions:
        raise Missed(f"what was restored has {made}, {found}")


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


async def killed_and_promoted(world: World) -> str:
    """The next failover goes back to the port of the one that was lost."""
    return await _fail_over(world, signal.SIGKILL)


async def silent_and_promoted(world: World) -> str:
    """Its machine is gone: what was connected to it hears nothing."""
    return await _fail_over(world, signal.SIGSTOP)


async def _fail_over(world: World, how: signal.Signals) -> str:
    service, lost = world.service, _postgres(world)
    standby = await asyncio.to_thread(lost.standby, service.spare_port)
    await asyncio.sleep(world.rng.uniform(0.5, 1.5))
    main = psutil.Process(lost.process.pid)
    whole = [main, *main.children(recursive=True)]
    for process in whole:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(how)
    began = time.monotonic()
    await asyncio.to_thread(standby.promote)
    took = time.monotonic() - began
    service.postgres, service.spare_port = standby, lost.port
    await asyncio.sleep(world.rng.uniform(4, 6))
    for process in whole:  # fenced, before it could come back
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    await asyncio.to_thread(lost.process.wait)
    return f"promoted in {took:.1f} s"


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


def slow_redis(seconds: float, times: int) -> Callable[[World], Awaitable[str]]:
    """Each command waits for as long, as beside others' long scripts."""

    async def make(world: World) -> str:
        assert world.service.redis is not None
        async with redis.asyncio.Redis.from_url(world.service.redis.url, socket_timeout=60) as client:
            for _ in range(times):
                await client.execute_command("DEBUG", "SLEEP", seconds)
                await asyncio.sleep(0.02)
        return ""

    return make


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
