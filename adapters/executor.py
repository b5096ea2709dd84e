"""How the engine waits for its workers on a CPU.

vLLM's engine process looks for the end of a step again and again, for a second at least, and so takes a whole
core for as long as anything runs. It is one of the cores that are not the workers' but left for the server,
for that process itself and for loads; with two cores it is the only one. (To wait for vLLM's notice from the
beginning, instead of after that second, does not help: most are lost, and what is lost costs five seconds.)

    MultiprocExecutor    one process per worker; what it answers comes through shared memory
    PatientExecutor      looks for an answer every 2 ms
"""

from __future__ import annotations

import time

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

# Seconds, of a step's 10 to 100 ms. At 0.3 ms the API process, on the same core, takes a fifth longer for a
# token.
LOOK_AGAIN = 0.002


class PatientExecutor(MultiprocExecutor):  # type: ignore[misc]  # vLLM is not typed for us
    """Uses ``response_mqs``, and of each ``_spin_condition.wait``."""

    def _init_executor(self) -> None:
        super()._init_executor()
        for queue in self.response_mqs:
            # None where the answers come from another machine.
            if (condition := queue._spin_condition) is not None:
                condition.wait = _wait


def _wait(timeout_ms: int | None = None) -> None:
    """In place of ``SpinCondition.wait``, whose caller looks for the answer before each call."""
    time.sleep(LOOK_AGAIN)
