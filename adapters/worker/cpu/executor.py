"""How the engine waits for its workers on a CPU.

vLLM's engine process looks for the end of a step again and again, for a second at least, and so takes a whole
core for as long as anything runs. It is one of the cores that are not the workers' but left for the server,
for that process itself and for loads; with two cores it is the only one, and a load gets what is left of it.

    MultiprocExecutor    one process per worker; what it answers comes through shared memory
    YieldingExecutor     looks for an answer every 2 ms while an adapter is loaded

Not all the time: where cores rest between two looks, on a virtual machine at least, a token costs the API
process a quarter more, and a step of 60 ms comes some ms later. (To wait for vLLM's notice from the
beginning, instead of after that second, does not help either: most are lost, and what is lost costs five
seconds.)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

POLL_INTERVAL_S = 0.002  # of a step's 10 to 100 ms


class YieldingExecutor(MultiprocExecutor):  # type: ignore[misc]  # vLLM is not typed for us
    """Sleeps between two looks for a worker's answer while an adapter is loading, and gives its core away.

    Uses vLLM's ``response_mqs`` and replaces ``_spin_condition.wait`` of each; the answers of
    ``LoraplexWorker.loraplex_page`` say whether a load is going on.
    """

    _loading = False

    def _init_executor(self) -> None:
        super()._init_executor()
        for queue in self.response_mqs:
            # None where the answers come from another machine.
            if (condition := queue._spin_condition) is not None:
                condition.wait = self._yielding(condition.wait)

    def _yielding(self, wait: Callable[..., None]) -> Callable[..., None]:
        """In place of ``SpinCondition.wait``, whose caller looks for the answer before each call."""

        def nap_or_wait(timeout_ms: int | None = None) -> None:
            if self._loading:
                time.sleep(POLL_INTERVAL_S)
            else:
                wait(timeout_ms=timeout_ms)

        return nap_or_wait

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        answers = super().collective_rpc(method, *args, **kwargs)
        if method == "loraplex_page":
            self._loading = any(answer["staging"] for answer in answers)
        return answers
