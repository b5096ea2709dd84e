"""The benchmark ``fleet-simulation`` in small: who routes by residency hits more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.bench.fleet_simulation import (
    BEAT_S,
    ROUTERS,
    Crowd,
    Engine,
    Fleet,
    Outcome,
    Traffic,
    alone,
    simulate,
)
from tests.bench.stats import jain, percentile

ENGINE = Engine(gpu_slots=24, host_slots=80, max_running=32)
CROWD = Crowd(replicas=4, adapters=240, tenants=40, rate=12.0, cv=1.0, seconds=20.0, warm=5.0)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return {router: simulate(CROWD, ENGINE, router) for router in ROUTERS}


def hits(outcome: Outcome) -> float:
    return outcome.hits / outcome.requests


def test_all_are_asked_the_same(outcomes: dict[str, Outcome]) -> None:
    assert len({outcome.requests for outcome in outcomes.values()}) == 1
    for outcome in outcomes.values():
        assert outcome.requests - len(outcome.first_token) < 100, "those that still wait at the end"


def test_placement_finds_adapters_in_memory(outcomes: dict[str, Outcome]) -> None:
    assert hits(outcomes["placement"]) >= 0.95
    assert hits(outcomes["placement"]) > hits(outcomes["least loaded"]) + 0.1
    assert hits(outcomes["placement"]) > hits(outcomes["random"]) + 0.1


def test_placement_spreads_the_load(outcomes: dict[str, Outcome]) -> None:
    spread = {
        router: jain([outcome.produced[f"replica-{number}"] for number in range(CROWD.replicas)])
        for router, outcome in outcomes.items()
    }
    assert spread["placement"] >= 0.95
    assert spread["placement"] > spread["rendezvous"]


def test_first_tokens_come_as_from_one_engine_with_its_share(outcomes: dict[str, Outcome]) -> None:
    share = simulate(alone(CROWD), ENGINE, "placement")
    assert percentile(outcomes["placement"].first_token, 99) <= 2 * percentile(share.first_token, 99)


def test_a_simulation_is_the_same_every_time(outcomes: dict[str, Outcome]) -> None:
    again = simulate(CROWD, ENGINE, "placement")
    assert (again.first_token, again.produced) == (
        outcomes["placement"].first_token,
        outcomes["placement"].produced,
    )


def test_a_new_replica_takes_its_share_without_a_storm() -> None:
    """It joins at 5 s, and loads no more than what moves may bring it and its own cold ones."""
    crowd = replace(CROWD, seconds=45.0, warm=25.0)
    traffic, fleet = Traffic(crowd), Fleet(crowd, ENGINE, "placement")
    fleet.remember(traffic.versions()[::-1])
    fleet.later(5.0, lambda: fleet.join("late"))
    outcome = fleet.run(traffic.requests())
    served = outcome.produced["late"] / outcome.produced.total()
    assert 0.5 / 5 <= served <= 1.5 / 5
    loads = len(fleet._placed["late"])
    assert loads <= 2 * crowd.adapters / 5 + 8, loads
    assert percentile(outcome.first_token, 99) < 0.2
    assert BEAT_S == 2.0
