"""A server to be attacked, whose engine is the tests' fake one: ``python -m tests.bench.hostile_server``.

Everything that a hostile input reaches in the API process is the real thing but for vLLM's front end.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from functools import partial

import server.app
from server.__main__ import _serve
from server.app import create_app
from server.engine.serving import resolve
from server.inference.dialects.registry import DIALECTS
from server.settings import Settings
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times


async def _start(settings: Settings) -> FakeEngine:
    resolve(DIALECTS["chat"].request_model({}))  # takes seconds, in which the first request would wait
    engine = FakeEngine(replace(tiny.base(), name=settings.served_model_name), times=Times(step=0.02))
    # It keeps what it was asked for tests to look at, which would be taken for the server's growing memory.
    engine.calls, engine.ops = deque(maxlen=16), deque(maxlen=16)  # type: ignore[assignment]
    return engine


if __name__ == "__main__":
    server.app.create_app = partial(create_app, start_engine=_start)  # type: ignore[assignment]
    raise SystemExit(_serve(Settings.load(None)))
