"""The plan with 1,000 customers, 10,000 adapters and 100,000 requests, in virtual time; no server, no model.

The same requests are sent twice: each adapter on its own, and a hundred to one so that there are only 100.
A third time 128 adapters of rank 1 to 64 share 32 slots (RANK_SLOTS), and a worker finds a place for each.
"""

from __future__ import annotations

from dataclasses import asdict, replace

from tests.bench.scenario import Goal, Measure, Round, Simulation, Values
from tests.bench.simulation import Machine, Simulated, Traffic, simulate
from tests.bench.stats import median, percentile

MACHINE = Machine()
MANY = Traffic()
FEW = 100  # adapters
SHARED = Machine(gpu_slots=128, shared=32)


def measure(round_: Round) -> Values:
    traffic = replace(MANY, requests=round_.count(MANY.requests, 5_000), seed=round_.number)
    few = median(_events(simulate(replace(traffic, adapters=FEW), MACHINE)))
    many = simulate(traffic, MACHINE)
    events = _events(many)
    shared = simulate(traffic, SHARED)
    return {
        "median": median(events) * 1e6,
        "p99": percentile(events, 99) * 1e6,
        "slowest_p99": _slowest(many) * 1e6,
        "median_few": few * 1e6,
        "growth": median(events) / few,
        "median_shared": median(_events(shared)) * 1e6,
        "p99_shared": percentile(_events(shared), 99) * 1e6,
        "placing": median(shared.placing) * 1e6,
        "placing_p99": percentile(shared.placing, 99) * 1e6,
        "moves": shared.moves / len(shared.placing),
        "unanswered_shared": traffic.requests - shared.outcomes.total(),
        "events": len(events),
        "requests": traffic.requests,
        "completed": many.outcomes["completed"],
        "refused": many.outcomes["refused"] + many.outcomes["timed out"],
        "unanswered": traffic.requests - many.outcomes.total(),
        "longest_wait": max(many.waits),
        "handovers": many.effects["Deactivate"],
        "drains": many.drains,
        "virtual": many.virtual,
        "wall": many.wall,
    }


def _events(simulated: Simulated) -> list[float]:
    return [seconds for event in simulated.seconds.values() for seconds in event]


def _slowest(simulated: Simulated) -> float:
    """The p99 of that kind of event whose p99 is the highest, of those that are not rare."""
    return max(percentile(event, 99) for event in simulated.seconds.values() if len(event) >= 1_000)


SCENARIO = Simulation(
    "scale",
    (
        Measure("median", "plan, one event, median", "µs", Goal("value", "≤", 50)),
        Measure("p99", "plan, one event, p99", "µs", Goal("value", "≤", 500)),
        Measure("slowest_p99", "plan, the slowest kind of event, p99", "µs"),
        Measure("median_few", f"plan, one event, median with {FEW} adapters", "µs"),
        Measure("growth", f"median with {MANY.adapters:,} adapters to {FEW}", "×", Goal("value", "≤", 2)),
        Measure("median_shared", "shared slots: plan, one event, median", "µs", Goal("value", "≤", 50)),
        Measure("p99_shared", "shared slots: plan, one event, p99", "µs", Goal("value", "≤", 500)),
        Measure("placing", "shared slots: a place for an adapter, median", "µs"),
        Measure("placing_p99", "shared slots: a place for an adapter, p99", "µs", Goal("value", "≤", 500)),
        Measure("moves", "shared slots: adapters that move for one"),
        Measure("unanswered_shared", "shared slots: requests without an outcome", "", Goal("value", "≤", 0)),
        Measure("events", "events of the plan"),
        Measure("requests", "requests"),
        Measure("completed", "requests completed"),
        Measure("refused", "requests refused"),
        Measure("unanswered", "requests without an outcome", "", Goal("value", "≤", 0)),
        Measure("longest_wait", "longest wait of a request that ran", "s"),
        Measure("handovers", "slots handed over"),
        Measure("drains", "slots drained for it"),
        Measure("virtual", "simulated", "s"),
        Measure("wall", "wall time", "s"),
    ),
    measure,
    settings={"machine": asdict(MACHINE), "shared": asdict(SHARED), "traffic": asdict(MANY)},
    runs=1,
    longest=3600.0,
)
