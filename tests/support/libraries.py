"""What is imported once, before the tests' processes, and those of servers and engines, are forked from it.

Nothing of the tests: each of their processes has folders and databases of its own.
"""

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
    # with a reference
    "peft",
    "transformers.models.llama.modeling_llama",
    # with a server's first request
    "vllm.entrypoints.openai.chat_completion.protocol",
    "vllm.entrypoints.openai.completion.protocol",
    # with an engine
    "server.engine.arguments",
    "server.engine.metered",
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "vllm.lora.worker_manager",
    "adapters.worker.extension",
    # with a process of a server
    "server.__main__",
    "uvloop",
    # with the process that compiles grammars
    "xgrammar",
):
    with contextlib.suppress(ImportError):  # whoever needs it says so
        importlib.import_module(name)

with contextlib.suppress(Exception):  # a server says so
    importlib.import_module("server.engine.contract").check()  # reads the source of vLLM, once in a process

gc.collect()
gc.freeze()  # or each process would look through all of it
