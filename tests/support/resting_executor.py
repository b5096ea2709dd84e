"""An executor for tests, where two engines and other tests share two cores."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from vllm.distributed.device_communicators import shm_broadcast

from adapters.worker.cpu.executor import POLL_INTERVAL_S, YieldingExecutor
from tests.support.forks import instead_of_spawn
from tests.support.resting import AS_SERVED, REST

instead_of_spawn()  # in every process that starts one of an engine

NAP_S = 0.001
_rests = True  # of this process, until it is told to wait as it is served


def _rest() -> None:
    """In place of vLLM's ``sched_yield``: a worker looks for its next step all the time, for a second."""
    if _rests:
        time.sleep(NAP_S)
    else:
        _yield()


_yield = shm_broadcast.sched_yield
shm_broadcast.sched_yield = _rest  # also in workers, which import this to read their configuration


class RestingExecutor(YieldingExecutor):
    """Looks for an answer every 2 ms at any time, and so leaves its core to others, as its workers do.

    As it is served, its process takes a whole core while anything runs.
    """

    def _yielding(self, wait: Callable[..., None]) -> Callable[..., None]:
        as_served = super()._yielding(wait)

        def nap_or_wait(timeout_ms: int | None = None) -> None:
            if _rests:
                time.sleep(POLL_INTERVAL_S)
            else:
                as_served(timeout_ms)

        return nap_or_wait

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        global _rests
        if method in (REST, AS_SERVED):
            _rests = method == REST
            return []
        return super().collective_rpc(method, *args, **kwargs)
