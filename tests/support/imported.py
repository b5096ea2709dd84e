"""What the tests' fork server imports before it forks: all that a server and its engine need."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os

import setproctitle

setproctitle.getproctitle()  # finds its room behind the environment, as long as that is where it was

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

for name in (
    "tests.support.crashes",
    # with a server's first request
    "vllm.entrypoints.openai.chat_completion.protocol",
    "vllm.entrypoints.openai.completion.protocol",
    # with an engine
    "server.engine.arguments",
    "server.engine.metered",
    "tests.support.resting_executor",
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "vllm.lora.worker_manager",
    "adapters.worker.extension",
    # with a process of a server
    "server.__main__",
    "uvloop",
):
    with contextlib.suppress(ImportError):  # whoever needs it says so
        importlib.import_module(name)

importlib.import_module("server.engine.contract").check()  # reads the source of vLLM, once in a process

gc.collect()
gc.freeze()  # or each process would look through all of it
