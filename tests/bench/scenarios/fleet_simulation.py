"""Placement beside least loaded, random and plain rendezvous routing, in virtual time; no server, no model.

Four crowds (8 and 64 replicas × 1,000 and 10,000 adapters), each with steady and with moving popularity.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace

from tests.bench.fleet_simulation import ROUTERS, Crowd, Engine, Outcome, alone, simulate
from tests.bench.scenario import Goal, Measure, Round, Simulation, Values
from tests.bench.stats import jain, percentile

ENGINE = Engine()
CROWDS = {
    f"{replicas} × {adapters:,}{', moving' if moves else ''}": Crowd(
        replicas,
        adapters,
        seconds=24.0 if replicas < 64 else 16.0,
        warm=4.0 if replicas < 64 else 8.0,
        moves=moves,
    )
    for replicas in (8, 64)
    for adapters in (1_000, 10_000)
    for moves in (None, 2.0)
}


def measure(round_: Round) -> Values:
    return dict(_measured(round_))


def _measured(round_: Round) -> Iterator[tuple[str, float]]:
    for title, crowd in CROWDS.items():
        if round_.quick and crowd.replicas > 8:
            continue
        crowd = replace(crowd, seconds=round_.seconds(crowd.seconds, 3.0), seed=round_.number)
        crowd = replace(crowd, warm=min(crowd.warm, crowd.seconds / 3))
        share = percentile(simulate(alone(crowd), ENGINE, "placement").first_token, 99)
        for router in ROUTERS:
            for key, value in _seen(simulate(crowd, ENGINE, router), crowd, share):
                yield f"{title}/{router}/{key}", value


def _seen(outcome: Outcome, crowd: Crowd, share: float) -> Iterator[tuple[str, float]]:
    p99 = percentile(outcome.first_token, 99)
    yield "hits", 100 * outcome.hits / outcome.requests
    yield "slots", 100 * outcome.slot_hits / outcome.requests
    yield "p99", 1000 * p99
    yield "ratio", p99 / share
    yield "jain", jain([outcome.produced[f"replica-{number}"] for number in range(crowd.replicas)])
    yield "loads", 1000 * outcome.loads / outcome.requests
    yield "copies", outcome.placed / crowd.adapters


def _measures() -> Iterator[Measure]:
    for title in CROWDS:
        for router in ROUTERS:
            ours = router == "placement"
            for key, name, unit, goal in (
                ("hits", "in memory", "%", Goal("value", "≥", 95)),
                ("slots", "in a slot", "%", None),
                ("p99", "p99 first token", "ms", None),
                ("ratio", "p99 to one engine alone", "×", Goal("value", "≤", 2)),
                ("jain", "Jain of replicas' tokens", "", Goal("value", "≥", 0.95)),
                ("loads", "loads of 1,000 requests", "", None),
                ("copies", "copies of each", "×", None),
            ):
                yield Measure(
                    f"{title}/{router}/{key}", f"{title}, {router}: {name}", unit, goal if ours else None
                )


SCENARIO = Simulation(
    "fleet-simulation",
    tuple(_measures()),
    measure,
    settings={"engine": asdict(ENGINE), "crowds": {title: asdict(each) for title, each in CROWDS.items()}},
    runs=1,
    longest=7200.0,
)
