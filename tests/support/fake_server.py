"""``python -m tests.support.fake_server``: the server as its own process, on an engine without a model.

``FAKE_MODULES`` are the linear layers that its base has: JSON, name -> [in, out]. ``FAKE_RUNNING`` is how
many requests run at once, and with it all have their tokens at the same moments, 33 times a second.
"""

from __future__ import annotations

import json
import os
from functools import partial

import server.app
from adapters.model import BaseModel, ModuleShape
from server.__main__ import _serve
from server.engine.serving import resolve
from server.inference.dialects.registry import DIALECTS
from server.settings import Settings
from tests.support.fakes import FakeEngine, Times


async def _start(settings: Settings) -> FakeEngine:
    resolve(DIALECTS["chat"].request_model({}))  # takes seconds, in which the first request would wait
    modules = {
        n: ModuleShape(*sizes) for n, sizes in json.loads(os.environ.get("FAKE_MODULES", "{}")).items()
    }
    base = BaseModel(name=settings.served_model_name, modules=modules, max_lora_rank=8, fingerprint="fake")
    slots = settings.gpu_slots if isinstance(settings.gpu_slots, int) else 2
    most = int(os.environ.get("FAKE_RUNNING", "0"))
    times = Times(step=0.03, in_step=True) if most else Times(step=0.05)
    return FakeEngine(base, gpu_slots=slots, host_slots=2 * slots, max_running=most or 8, times=times)


if __name__ == "__main__":
    server.app.create_app = partial(server.app.create_app, start_engine=_start)  # type: ignore[assignment, arg-type]
    raise SystemExit(_serve(Settings.load(None)))
