"""The benchmark ``scale`` in small: every request has its outcome, and nothing is left behind."""

from __future__ import annotations

from dataclasses import replace

import pytest

from server.scheduling.nouns import Capacity
from server.scheduling.plan import Plan
from tests.bench.simulation import LONGEST, Machine, TimedPlan, Traffic, requests, simulate
from tests.support.fakes import Times

CROWDED = Machine(gpu_slots=4, host_slots=12, max_running=16, limits={"queue_timeout": 5.0, "max_queued": 8})
SMALL = Traffic(tenants=50, adapters=200, popularity=200, requests=2_000, rate=16.0)


def test_every_request_of_a_crowd_has_one_outcome() -> None:
    """More than can be served: bursts fill queues, and some wait too long."""
    done = simulate(SMALL, CROWDED)
    assert done.outcomes.total() == SMALL.requests
    assert set(done.outcomes) == {"completed", "refused", "timed out"}
    assert done.effects["Run"] == done.outcomes["completed"] == len(done.waits)
    assert done.effects["Refuse"] == SMALL.requests - done.outcomes["completed"]
    assert 0 <= done.effects["Stage"] - done.effects["Evict"] <= CROWDED.host_slots
    assert 0 <= done.effects["Activate"] - done.effects["Deactivate"] <= CROWDED.gpu_slots


def test_popular_adapters_get_their_slots_beside_an_endless_row_of_others() -> None:
    """Near what the slots can do: who has had most waits longest, but nobody without end."""
    traffic = Traffic(tenants=125, adapters=1_250, popularity=1_250, requests=2_000, rate=14.0)
    done = simulate(traffic, Machine(gpu_slots=8, host_slots=64, max_running=32))
    assert done.outcomes == {"completed": traffic.requests}


def test_adapters_that_share_slots_always_have_a_place_where_the_plan_counts_one() -> None:
    """The engine complains of one that has none; nobody waits without end for ranks that are free."""
    traffic = Traffic(tenants=125, adapters=1_250, popularity=1_250, requests=600, rate=14.0)
    done = simulate(traffic, Machine(gpu_slots=24, host_slots=64, max_running=32, shared=8))
    assert done.outcomes == {"completed": traffic.requests}
    assert len(done.placing) == done.effects["Activate"]
    assert done.moves


def test_a_simulation_is_the_same_every_time() -> None:
    traffic = Traffic(tenants=5, adapters=20, popularity=20, requests=200)
    first, second = simulate(traffic, CROWDED), simulate(traffic, CROWDED)
    assert (first.waits, first.effects, first.virtual) == (second.waits, second.effects, second.virtual)


def test_an_answer_takes_a_step_for_each_of_its_tokens() -> None:
    """One request: staged, activated, then run; ``tokens`` in a step divide the time."""
    (only,) = requests(Traffic(requests=1))
    times = Times(stage=1.0, step=0.5)
    slow = simulate(Traffic(requests=1), Machine(times=times))
    fast = simulate(Traffic(requests=1), Machine(times=times, tokens=LONGEST))
    assert slow.waits == fast.waits == [pytest.approx(1.0, abs=0.02)]
    assert slow.virtual - fast.virtual == pytest.approx((only.output_tokens - 1) * 0.5, abs=0.1)


def test_fewer_adapters_change_nothing_else() -> None:
    many, few = requests(SMALL), requests(replace(SMALL, adapters=10))
    assert [replace(r, adapter=0) for r in many] == [replace(r, adapter=0) for r in few]
    assert {r.adapter for r in few} == set(range(10))
    assert len({r.adapter for r in many}) > 100


def test_every_event_of_the_plan_is_timed() -> None:
    plan = TimedPlan(Plan(Capacity(gpu_slots=1, host_slots=1, max_running=1)))
    assert set(plan.seconds) >= {"submitted", "cancelled", "progressed", "finished", "activated", "tick"}
    assert not {"check", "snapshot", "next_deadline"} & set(plan.seconds)
