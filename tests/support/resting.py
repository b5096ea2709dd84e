"""How tests have an engine leave its core to others; without importing vLLM."""

from __future__ import annotations

# For ENGINE_ARGS, by name: JSON has no classes.
RESTING = {"distributed_executor_backend": "tests.support.resting_executor.RestingExecutor"}
# Calls that change how it waits.
REST, AS_SERVED = "rest", "as_served"
