"""Faults of processes: the server's, and the engine's, fake and real."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import time
from collections.abc import Awaitable, Callable

import psutil

from tests.bench.chaos.service import CORE, GUARD, STALL_REAL, WORKER
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


async def kill_at_start(world: World) -> str:
    """Three times, each at another moment of the start."""
    await kill_server(world)
    for _ in range(3):
        async with asyncio.timeout(30):
            while world.service.status() is not None:
                await asyncio.sleep(0.02)
        await asyncio.sleep(world.rng.uniform(0, 1.5))
        await kill_server(world)
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


def end(name: str, number: signal.Signals) -> Callable[[World], Awaitable[str]]:
    """A signal that ends one of the engine's processes; what is left of the engine must end too."""

    async def make(world: World) -> str:
        family = [world.service.called(CORE), world.service.called(WORKER)]
        world.service.called(name).send_signal(number)
        await _all_gone(family, 10)
        return ""

    return make


async def kill_guard(world: World) -> str:
    """Who watches that nothing outlives the server: the server goes on, and has another one."""
    await _kill_guard(world)
    return "replaced"


async def kill_guard_and_server(world: World) -> str:
    await _kill_guard(world)
    return await kill_server(world)


async def _kill_guard(world: World) -> None:
    guard = world.service.called(GUARD)
    guard.kill()
    async with asyncio.timeout(5):
        while True:
            with contextlib.suppress(ValueError):
                if world.service.called(GUARD) != guard:
                    return
            await asyncio.sleep(0.1)


def stop(*names: str) -> Callable[[World], Awaitable[str]]:
    """SIGSTOP for longer than the watchdog waits, and SIGCONT, when another engine has begun."""

    async def make(world: World) -> str:
        stopped = [world.service.called(name) for name in names]
        for process in stopped:
            process.suspend()
        try:
            await _all_gone(stopped, STALL_REAL + 15)
        finally:
            for process in stopped:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()
        return ""

    return make


async def no_memory(world: World) -> str:
    """Core and worker may not take a page more."""
    limited = [world.service.called(CORE), world.service.called(WORKER)]
    for process in limited:
        most = (process.memory_info().vms, resource.RLIM_INFINITY)
        resource.prlimit(process.pid, resource.RLIMIT_AS, most)
    for _ in range(200):
        if not all(map(_runs, limited)):
            return "the engine ended, and was replaced"
        await asyncio.sleep(0.1)
    for process in limited:
        resource.prlimit(process.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "it went on"


async def _all_gone(processes: list[psutil.Process], within: float) -> None:
    """Raises Missed if one still runs after so many seconds."""
    deadline = time.monotonic() + within
    while left := [process for process in processes if _runs(process)]:
        if time.monotonic() > deadline:
            raise Missed(f"{len(left)} processes of the lost engine still run after {within:g} s")
        await asyncio.sleep(0.1)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
