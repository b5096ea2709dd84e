"""``python -m tests.support.fake_server``: the server as its own process, on an engine without a model."""

from __future__ import annotations

from functools import partial

import server.app
from adapters.model import BaseModel
from server.__main__ import _serve
from server.engine.serving import resolve
from server.inference.dialects.registry import DIALECTS
from server.settings import Settings
from tests.support.fakes import FakeEngine, Times


async def _start(settings: Settings) -> FakeEngine:
    resolve(DIALECTS["chat"].request_model({}))  # takes seconds, in which the first request would wait
    base = BaseModel(name=settings.served_model_name, modules={}, max_lora_rank=8, fingerprint="fake")
    return FakeEngine(base, gpu_slots=2, host_slots=4, times=Times(step=0.05))


if __name__ == "__main__":
    server.app.create_app = partial(server.app.create_app, start_engine=_start)  # type: ignore[assignment, arg-type]
    raise SystemExit(_serve(Settings.load(None)))
