"""A server process on the fake engine, which does what a file orders when it gets SIGUSR1.

``serve`` is called in a process that was forked from one which has imported this file, so that a start takes
tenths of a second. Orders are JSON: ``{"do": "die"}``, ``"hang"``, ``"not_finite"`` with the ``model`` that
made it, and ``"activate"`` with the ``seconds`` that the next loads into a slot take.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import signal
from functools import partial
from pathlib import Path
from typing import Any

from adapters.model import BaseModel
from server import __main__, app
from server.app import create_app
from server.settings import Settings
from tests.support.fakes import FakeEngine, Times

STEP, START = 0.01, 0.5  # seconds for a token, and for the engine to start again
MAX_RUNNING = 24


def serve(settings: Settings, base: BaseModel, folder: Path, descriptors: int) -> None:
    """What ``python -m server serve`` does, with its output in ``folder / "log" / "server.log"``."""
    log = os.open(folder / "log" / "server.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.setsid()
    if descriptors:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    assert isinstance(settings.gpu_slots, int)
    assert isinstance(settings.host_slots, int)
    engine = FakeEngine(
        base,
        gpu_slots=settings.gpu_slots,
        host_slots=settings.host_slots,
        max_running=MAX_RUNNING,
        times=Times(step=STEP, start=START, stage=0.01, activate=0.002, page=0.001),
    )

    async def start(_: Settings) -> FakeEngine:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, obey, engine, folder / "order")
        return engine

    gc.freeze()
    app.create_app = partial(create_app, start_engine=start)  # type: ignore[assignment]
    status = __main__._serve(settings)
    if engine.violations:
        (folder / "violations").write_text("\n".join(engine.violations))
    raise SystemExit(status)


def obey(engine: Any, order: Path) -> None:
    """Do to ``engine`` what the file says."""
    asked = json.loads(order.read_text())
    match asked["do"]:
        case "die":
            engine.die()
        case "hang":
            engine.hang()
        case "activate":
            engine.times.activate = asked["seconds"]
        case "not_finite":
            held = {engine._loads[i].name for i in engine._host}
            for name in held:
                if name.startswith(asked["model"]):
                    engine.on_fault(name, "not_finite")
