"""All scenarios. Those of one setup run in this order in one process, so what must be cold comes early."""

from tests.bench.scenario import Scenario, Simulation
from tests.bench.scenarios import (
    batches,
    churn,
    cold,
    fleet_simulation,
    hog,
    limited,
    noisy,
    overhead,
    overload,
    replay,
    residency,
    rollout_cost,
    rollouts,
    scale,
    starvation,
    storm,
    trace_cost,
    weights,
)

SCENARIOS: dict[str, Scenario | Simulation] = {
    module.SCENARIO.name: module.SCENARIO
    for module in (
        scale,
        overhead,
        cold,
        storm,
        starvation,
        hog,
        churn,
        noisy,
        weights,
        replay,
        residency,
        overload,
        limited,
        fleet_simulation,
        rollouts,
        rollout_cost,
        trace_cost,
        batches,
    )
}
_ALONE = (
    "replay", "residency", "overload", "limited", "fleet-simulation", "rollouts", "rollout-cost", "batches",
    "trace-cost",
)  # fmt: skip
FULL_RUN = tuple(name for name in SCENARIOS if name not in _ALONE)
