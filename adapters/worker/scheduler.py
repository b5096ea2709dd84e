"""vLLM's schedulers, which let grammars be compiled without disturbing a step, and name blocks to zero.

vLLM compiles grammars in threads of the engine's process, several threads for each, which take the processor
from the steps of everybody. Here they have a low priority, and there are enough of them that one long
compilation does not hold up the next customer's.

They name the blocks of the KV cache that a step gives out, for the worker to zero; see ``not_finite``.
"""

from __future__ import annotations

import copy
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from adapters.worker.not_finite import zeroes_new_blocks

NICE = 10
THREADS = 4
# In vLLM's additional_config:
ADAPTERS = "loraplex_adapters"
DORA = "loraplex_dora"


def scheduler_of(config: Any) -> str | None:
    """The name of the scheduler for ``config`` (SchedulerConfig); None where it is not vLLM's usual one."""
    if config.scheduler_cls is not None:
        return None
    cls = PoliteAsyncScheduler if config.async_scheduling else PoliteScheduler
    return f"{cls.__module__}.{cls.__qualname__}"


def adapters_of(config: Any) -> int:
    """How many adapters share the slots of the engine that ``config`` (VllmConfig) describes; 0: none do."""
    return int((config.additional_config or {}).get(ADAPTERS, 0))


def serves_dora(config: Any) -> bool:
    """Whether the engine that ``config`` (VllmConfig) describes has room for DoRA's scales on a GPU."""
    return bool((config.additional_config or {}).get(DORA))


def _count_adapters(scheduler: Any) -> None:
    """vLLM lets adapters of ``max_loras`` run at the same time, which is the number of slots elsewhere."""
    if adapters := adapters_of(scheduler.vllm_config):
        scheduler.lora_config = copy.copy(scheduler.lora_config)
        scheduler.lora_config.max_loras = adapters


def _give_way() -> None:
    """Lowers this thread's priority; the threads that it starts inherit it on Linux."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


def _polite(arguments: dict[str, Any]) -> dict[str, Any]:
    manager = arguments["structured_output_manager"]
    if hasattr(manager, "executor"):
        threads = max(THREADS, manager.executor._max_workers)
        manager.executor.shutdown(wait=False)
        manager.executor = ThreadPoolExecutor(threads, "grammar", initializer=_give_way)
    return arguments


class PoliteScheduler(Scheduler):  # type: ignore[misc]  # vLLM is not typed for us
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**_polite(arguments))
        _count_adapters(self)
        if zeroes_new_blocks():
            self.needs_kv_cache_zeroing = True


class PoliteAsyncScheduler(AsyncScheduler):  # type: ignore[misc]
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**_polite(arguments))
        _count_adapters(self)
        if zeroes_new_blocks():
            self.needs_kv_cache_zeroing = True
