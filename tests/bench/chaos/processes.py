"""Faults of processes: the server's, and the engine's, fake and real."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import time
from collections.abc import Awaitable, Callable

import psutil

from tests.bench.chaos.world import Missed, World


async def kill_server(world: World) -> str:
    """Nobody is left to end the engine; it must end by itself."""
    engine = world.service.engine()
    world.killed.append(time.monotonic())
    world.service.signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while alive := [process for process in engine if _runs(process)]:
        if time.monotonic() > deadline:
            for process in alive:
                process.kill()
            raise Missed(f"{len(alive)} processes of the engine were left")
        await asyncio.sleep(0.1)
    return ""


async def end_server(world: World) -> str:
    lives = world.service.lives
    world.service.signal(signal.SIGTERM)
    async with asyncio.timeout(60):
        while world.service.lives == lives:
            await asyncio.sleep(0.05)
    if status := world.service.ends[-1]:
        raise Missed(f"it ended with {status}")
    return ""


async def stop_server(world: World) -> str:
    world.service.signal(signal.SIGSTOP)
    await asyncio.sleep(3)
    world.service.signal(signal.SIGCONT)
    return ""


async def second_server(world: World) -> str:
    second = await asyncio.to_thread(world.service.second)
    await asyncio.to_thread(second.join, 60)
    if second.exitcode is None:
        second.kill()
        raise Missed("a second server ran on the folder")
    return f"it ended with status {second.exitcode}"


async def few_descriptors(world: World) -> str:
    """256, and 400 idle connections from one address."""
    service = world.service
    service.descriptors = 256
    await service.again()
    opened = [asyncio.open_connection("127.0.0.1", service.port) for _ in range(400)]
    taken = [
        one[1] for one in await asyncio.gather(*opened, return_exceptions=True) if isinstance(one, tuple)
    ]
    began, answered = time.monotonic(), 0
    while time.monotonic() - began < 4:
        with contextlib.suppress(Exception):
            answered += (await service.http.get("/health", timeout=2)).status_code == 200
        await asyncio.sleep(0.2)
    for writer in taken:
        writer.transport.abort()
    service.descriptors = 0
    await service.again()
    if not answered:
        raise Missed("nobody was answered beside 400 idle connections")
    return ""


def clock(seconds: int) -> Callable[[World], Awaitable[str]]:
    async def jump(world: World) -> str:
        world.service.set_clock(seconds)
        await world.a_while()
        world.service.set_clock(0)
        return ""

    return jump


# --- the engine ----------------------------------------------------------------------------------


async def die(world: World) -> str:
    world.service.order(do="die")
    return ""


async def hang(world: World) -> str:
    world.service.order(do="hang")
    return ""


async def slow_activation(world: World) -> str:
    """Longer than the watchdog waits."""
    world.service.order(do="activate", seconds=4.0)
    await asyncio.sleep(6)
    world.service.order(do="activate", seconds=0.002)
    return ""


async def kill_core(world: World) -> str:
    world.service.engine()[0].kill()
    return ""


async def kill_worker(world: World) -> str:
    world.service.engine()[-1].kill()
    return ""


async def kill_guard(world: World) -> str:
    """Who watches that nothing outlives the server; the server itself goes on."""
    for child in psutil.Process(world.service.pid).children(recursive=True):
        if "guard.py" in " ".join(child.cmdline()):
            child.kill()
            return ""
    raise Missed("there was no guard")


async def stop_engine(world: World) -> str:
    """Longer than a watchdog of 10 s waits; then it may go on, if it still is there."""
    stopped = world.service.engine()
    for process in stopped:
        process.suspend()
    await asyncio.sleep(25)
    still = [process for process in stopped if _runs(process)]
    for process in still:
        process.resume()
    if still:
        raise Missed("not noticed: it went on by SIGCONT")
    return "ended and replaced"


async def no_memory(world: World) -> str:
    """The engine may not take a page more."""
    core = world.service.engine()[0]
    resource.prlimit(core.pid, resource.RLIMIT_AS, (core.memory_info().vms, resource.RLIM_INFINITY))
    for _ in range(200):
        if not _runs(core):
            return "the engine ended, and was replaced"
        await asyncio.sleep(0.1)
    resource.prlimit(core.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "it went on"


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
