"""A server that is killed in the middle of what it does: the process that dies.

``run``, ``migrate`` (for ``test_crashes``) and ``serve`` (for ``test_usage_process``) are called
in a process of their own, forked from one that has imported this file, so that each begins within
milliseconds.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import Engine, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import configure_mappers

from adapters.database.database import Database, newest_revision
from adapters.model import BaseModel
from server import __main__, app
from server.accounts.usage import Usage, UsageWriter
from server.app import create_app
from server.engine.calls import Answer, Call
from server.http.routes import router_of
from server.settings import Settings
from tests.support.fakes import FakeEngine, Times
from tests.support.site import ADMIN_KEY, bearer

# Before the fork, or each process would do so.
router_of()
newest_revision()
configure_mappers()

# What changes the disk in a way that a start can see, or waits for it.
CALLS = ("mkdir", "write", "fsync", "rename", "chmod", "unlink", "rmdir")

# Set in the tasks of the operation, not in those of the server: roll-ups and usage commit whenever they do.
_operating = ContextVar("_operating", default=False)

# (method, path below /admin/v1, JSON or files)
Operation = tuple[str, str, dict[str, Any]]


class Death:
    """Counts steps, in the order in which they begin, and kills the process as the ``at``-th one begins.

    ``steps`` are their names: a function of ``os``, ``commit``, ``committed``, or a statement in SQL.
    """

    def __init__(self, at: int | None) -> None:
        self.steps: list[str] = []
        self._at = at
        self._lock = threading.Lock()

    def step(self, name: str) -> None:
        with self._lock:
            self.steps.append(name)
            if len(self.steps) == self._at:
                os.kill(os.getpid(), signal.SIGKILL)

    def watch_files(self) -> None:
        for name in CALLS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def watch_commits(self) -> None:
        real = AsyncSession.commit

        async def commit(session: AsyncSession) -> None:
            ours = _operating.get()
            if ours:
                self.step("commit")
            await real(session)
            if ours:
                self.step("committed")

        AsyncSession.commit = commit  # type: ignore[method-assign]

    def watch_statements(self) -> None:
        event.listen(Engine, "before_cursor_execute", lambda *args: self.step(args[2].split("(")[0].strip()))
        event.listen(Engine, "commit", lambda _: self.step("commit"))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.step(name)
            return real(*args, **kwargs)

        return call


def run(folder: Path, base: BaseModel, operation: Operation, at: int | None, said: Connection) -> None:
    """Starts the server on ``folder`` and does ``operation``; says the status, then the steps it took."""
    gc.freeze()  # or the server's start would look through all that was imported before the fork
    asyncio.run(_run(folder, base, operation, Death(at), said))


def migrate(url: str, at: int | None, said: Connection) -> None:
    """Opens the database at ``url``, whatever its schema; says 0, then the steps it took."""
    death = Death(at)
    death.watch_statements()
    asyncio.run(_open(url))
    said.send(0)
    said.send(death.steps)


async def _open(url: str) -> None:
    database = Database(url)
    await database.open()
    await database.close()


async def _run(folder: Path, base: BaseModel, operation: Operation, death: Death, said: Connection) -> None:
    async def start(_: Settings) -> FakeEngine:
        return FakeEngine(base)

    settings = Settings(
        model=f"/models/{base.name}", data_dir=folder, admin_key=ADMIN_KEY, gpu_slots=2, max_lora_rank=8
    )
    served = create_app(settings, start_engine=start)  # type: ignore[arg-type]
    async with (
        served.router.lifespan_context(served),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(served),
            base_url="http://server/admin/v1",
            headers=bearer(ADMIN_KEY),
        ) as client,
    ):
        death.watch_files()
        death.watch_commits()
        method, path, sent = operation
        _operating.set(True)
        response = await client.request(method, path, **sent)
        said.send(response.status_code)
        await _all(served.state.services.tasks)
        said.send(death.steps)


async def _all(tasks: Iterable[Awaitable[None]]) -> None:
    """What goes on after the answer: a deleted version's files are removed."""
    await asyncio.gather(*tasks)


class _Listing(FakeEngine):
    """Appends ``request id, user`` of every customer's call it takes to a file, which outlives it."""

    def __init__(self, base: BaseModel, file: Path) -> None:
        super().__init__(base, max_running=16, max_model_len=1 << 16, times=Times(step=0.002))
        self._list = _appending(file)

    async def answer(self, call: Call, request: Any) -> Answer:
        if request.user is not None:  # else it is a probe of the server's own
            os.write(self._list, f"{call.id} {request.user}\n".encode())
        return await super().answer(call, request)


def _appending(file: Path) -> int:
    return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def _list_ends(file: Path) -> None:
    """Appends ``request id, time`` of every record of usage to a file, before the recorder has it."""
    ends, take = _appending(file), UsageWriter.record

    def record(recorder: UsageWriter, used: Usage) -> None:
        os.write(ends, f"{used.request_id} {time.time()}\n".encode())
        take(recorder, used)

    UsageWriter.record = record  # type: ignore[method-assign]


def _list_writes(file: Path) -> None:
    """Appends, after each write of usage, when it began: what was recorded before that is on disk."""
    writes, flush = _appending(file), UsageWriter.flush

    async def flushed(recorder: UsageWriter) -> None:
        began = time.time()
        await flush(recorder)
        os.write(writes, f"{began}\n".encode())

    UsageWriter.flush = flushed  # type: ignore[method-assign]


def last_write(folder: Path) -> float:
    """When the last write of usage began that ended before a server on ``folder`` was killed."""
    file = folder / "written"
    return max(map(float, file.read_text().split()), default=0.0) if file.exists() else 0.0


def serve_with(descriptors: int, settings: Settings, base: BaseModel, folder: Path) -> None:
    """``serve`` under ``ulimit -n``."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    serve(settings, base, folder)


def serve(settings: Settings, base: BaseModel, folder: Path) -> None:
    """What ``python -m server serve`` does, signals and all.

    The engine lists in ``folder / "taken"`` what it takes; ``folder / "ended"`` says when each of it ended,
    ``folder / "written"`` when each write of usage began.
    """
    engine = _Listing(base, folder / "taken")
    _list_ends(folder / "ended")
    _list_writes(folder / "written")

    async def start(_: Settings) -> FakeEngine:
        return engine

    gc.freeze()
    app.create_app = partial(create_app, start_engine=start)  # type: ignore[assignment]
    status = __main__._serve(settings)
    assert not engine.violations, engine.violations
    raise SystemExit(status)
