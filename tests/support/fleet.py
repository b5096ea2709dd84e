"""A fleet in one process, for tests: a gateway and replicas on fake engines, each a real server on a port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from adapters.model import BaseModel
from server.app import create_app, listening
from server.settings import Settings
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.ports import unused
from tests.support.site import Site, serving

FLEET_KEY = "fleet-key-of-the-tests"


class Freezer:
    """ASGI around an app that can be made to say nothing, as a process that was stopped.

    With ``before_the_end``, as soon as an answer is whole but for the end of its connection. ``slow`` is how
    long each answer about its state takes, in seconds.
    """

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.going = asyncio.Event()
        self.going.set()
        self.before_the_end = False
        self.slow = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def later(message: Any) -> None:
            ends = message["type"] == "http.response.body" and not message.get("more_body")
            if self.before_the_end and ends and scope["path"].endswith("/open"):
                self.going.clear()
            await self.going.wait()
            await send(message)

        if scope["type"] == "http":
            await self.going.wait()
            if scope["path"].endswith("/state"):
                await asyncio.sleep(self.slow)
            await self.app(scope, receive, later)
        else:
            await self.app(scope, receive, send)


@dataclass
class FakeReplica:
    engine: FakeEngine
    app: FastAPI
    freezer: Freezer
    server: uvicorn.Server
    port: int

    @property
    def services(self) -> Any:
        return self.app.state.services

    @property
    def id(self) -> str:
        return str(self.app.state.replica.id)

    @property
    def said(self) -> int:
        """Tokens of all answers that run there."""
        return sum(sum(run.produced.values()) for run in self.engine.running)

    def freeze(self) -> None:
        self.freezer.going.clear()

    async def kill(self) -> None:
        """As its process would end: connections break, and nothing is told or tidied up."""
        for one in self.server.servers:
            one.close()
        self.app.state.replica._beating.cancel()
        for connection in list(self.server.server_state.connections):
            transport: Any = connection.transport  # type: ignore[union-attr]
            getattr(transport, "_transport", transport).abort()
        await asyncio.sleep(0)


@dataclass
class Fleet:
    gateway: Site
    replicas: list[FakeReplica] = field(default_factory=list)

    @property
    def directory(self) -> Any:
        return self.gateway.services.completions.answers.directory

    async def until(self, holds: Callable[[], bool], seconds: float = 60.0) -> None:
        async with asyncio.timeout(seconds):
            while not holds():
                await asyncio.sleep(0.01)

    async def all_known(self) -> None:
        """The gateway has heard of every replica."""
        ids = {replica.id for replica in self.replicas}
        await self.until(lambda: ids <= {one.id for one in self.directory.all() if one.said})

    def busy(self) -> FakeReplica:
        """The one at which something runs."""
        (found,) = [one for one in self.replicas if one.engine.running]
        return found

    def other(self, replica: FakeReplica) -> FakeReplica:
        (found,) = [one for one in self.replicas if one is not replica]
        return found


@asynccontextmanager
async def replica(
    folder: Path,
    times: Times | None = None,
    base: BaseModel | None = None,
    *,
    engine: FakeEngine | None = None,
    port: int | None = None,
    **changes: Any,
) -> AsyncIterator[FakeReplica]:
    """On ``engine`` and ``port``, or one made for it and a free one."""
    port = port or unused()
    chosen = tiny.settings(folder, role="replica", fleet_key=FLEET_KEY, port=port, **changes)
    assert isinstance(chosen.gpu_slots, int)
    assert isinstance(chosen.host_slots, int)
    slots = {"gpu_slots": chosen.gpu_slots, "host_slots": chosen.host_slots}
    engine = engine or FakeEngine(base or tiny.base(), **slots, times=times or Times(step=0.02))

    async def start(_: Settings) -> FakeEngine:
        return engine

    app = create_app(chosen, start_engine=start)  # type: ignore[arg-type]
    freezer = Freezer(app)
    config = uvicorn.Config(freezer, host="127.0.0.1", port=port, log_config=None, lifespan="on")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        if task.done():
            task.result()
            raise RuntimeError("the replica did not start")
        await asyncio.sleep(0.01)
    assert app.state.replica._beating is None, "it is announced when it listens"
    listening(app)
    yield FakeReplica(engine, app, freezer, server, port)
    freezer.going.set()
    server.should_exit = True
    server.force_exit = True
    await task
    assert engine.violations == []


@asynccontextmanager
async def fleet(
    folder: Path,
    replicas: int = 2,
    times: Times | None = None,
    base: BaseModel | None = None,
    **changes: Any,
) -> AsyncIterator[Fleet]:
    """All on one data folder and its SQLite database."""
    async with AsyncExitStack() as stack:
        made = [
            await stack.enter_async_context(replica(folder, times, base, **changes)) for _ in range(replicas)
        ]
        of_gateway = {"role": "gateway", "fleet_key": FLEET_KEY, "replica_stall": 1.0}
        settings = tiny.settings(folder, **(of_gateway | changes))
        gateway = await stack.enter_async_context(serving(create_app(settings)))
        whole = Fleet(gateway, made)
        await whole.all_known()
        yield whole
