"""Each rule of the plan by example, with an explicit clock: requests, and room in the engine."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.model import Tier
from server.scheduling.nouns import (
    Activate,
    Capacity,
    Deactivate,
    Evict,
    HostEntry,
    Refusal,
    Refuse,
    Run,
    Slot,
    Stage,
    State,
    Warmed,
)
from server.scheduling.plan import Plan
from tests.support.plans import ask, load, make, run

# --- a request's life ----------------------------------------------------------------------------


def test_a_cold_request_is_staged_then_activated_then_runs() -> None:
    plan = make()
    assert plan.submitted(0.0, ask("r1")) == [Stage("a", 1)]
    assert repr(plan) == "<Plan slots[-] host[a+] claims[a] running=0/8 waiting=1>"
    assert plan.staged(0.1, 1, size_bytes=7) == [Activate("a", 1)]
    assert repr(plan) == "<Plan slots[a+:0] host[] claims[a] running=0/8 waiting=1>"
    assert plan.activated(0.2, 1) == [Run("r1")]
    assert repr(plan) == "<Plan slots[a:1] host[] claims[] running=1/8 waiting=0>"
    assert plan.finished(1.0, "r1") == []
    assert repr(plan) == "<Plan slots[a:0] host[] claims[] running=0/8 waiting=0>"
    assert plan.next_deadline() is None
    plan.check()


def test_the_base_model_needs_no_slot() -> None:
    plan = make()
    assert plan.submitted(0.0, ask("r1", None)) == [Run("r1")]


def test_a_request_joins_a_load_under_way() -> None:
    plan = make()
    plan.submitted(0.0, ask("r1"))
    assert plan.submitted(0.0, ask("r2")) == []
    plan.staged(0.1, 1)
    assert plan.submitted(0.1, ask("r3", tenant="other")) == []
    assert plan.activated(0.2, 1) == [Run("r1"), Run("r3"), Run("r2")]


def test_a_request_for_an_active_version_overtakes_one_that_waits_for_a_load() -> None:
    plan = make(gpu=2)
    load(plan, 0.0, "a", 1)
    assert plan.submitted(0.0, ask("cold", "b", tenant="a")) == [Stage("b", 2)]
    run(plan, 0.1, "hot", "a")


def test_ids_of_loads_start_where_they_are_told_to() -> None:
    plan = Plan(Capacity(gpu_slots=1, host_slots=1, max_running=1), first_load_id=40)
    assert plan.submitted(0.0, ask("r1")) == [Stage("a", 40)]


def test_a_request_that_is_still_here_cannot_be_submitted_again() -> None:
    plan = make()
    plan.submitted(0.0, ask("waits"))
    plan.submitted(0.0, ask("runs", None))
    for id_ in ("waits", "runs"):
        with pytest.raises(ValueError, match=id_):
            plan.submitted(0.1, ask(id_, None))


@pytest.mark.parametrize(
    "changes", [{"gpu_slots": 0}, {"host_slots": 1}, {"max_running": 0}, {"max_staging": 0}]
)
def test_limits_must_make_sense(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="limits"):
        Capacity(**{"gpu_slots": 2, "host_slots": 2, "max_running": 1, **changes})


@pytest.mark.parametrize("changes", [{"sequences": 0}, {"weight": 0.0}, {"weight": -1.0}])
def test_asks_must_make_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="weight"):
        ask("r1", **changes)


def test_events_that_cannot_have_happened_are_errors() -> None:
    plan = make()
    plan.submitted(0.0, ask("r1"))
    with pytest.raises(ValueError, match="load 1"):
        plan.activated(0.1, 1)
    with pytest.raises(ValueError, match="load 2"):
        plan.staged(0.1, 2)
    with pytest.raises(ValueError, match="never ran"):
        plan.finished(0.1, "r1")


# --- the end of a request ------------------------------------------------------------------------


def test_a_cancelled_waiting_request_leaves_the_load_to_others() -> None:
    plan = make()
    plan.submitted(0.0, ask("r1"))
    assert plan.cancelled(0.1, "r1") == []
    assert plan.staged(0.2, 1) == []
    assert plan.tier_of("a") is Tier.HOST
    assert plan.submitted(0.3, ask("r2")) == [Activate("a", 1)]


def test_a_cancelled_running_request_gives_its_place_to_the_next() -> None:
    plan = make(running=1)
    run(plan, 0.0, "r1", None)
    assert plan.submitted(0.1, ask("r2", None)) == []
    assert plan.cancelled(0.2, "r1") == [Run("r2")]
    assert plan.finished(0.3, "r1") == []
    assert plan.cancelled(0.3, "nobody") == []


def test_a_failed_stage_refuses_all_that_wait_and_burns_the_id() -> None:
    plan = make()
    plan.submitted(0.0, ask("r1"))
    plan.submitted(0.0, ask("r2", tenant="other"))
    assert plan.stage_failed(0.1, 1, "unreadable") == [
        Refuse("r1", Refusal.ADAPTER_UNAVAILABLE, None, "unreadable"),
        Refuse("r2", Refusal.ADAPTER_UNAVAILABLE, None, "unreadable"),
    ]
    assert plan.submitted(0.2, ask("r3")) == [Stage("a", 2)]


def test_a_failed_activation_is_evicted_and_its_slot_is_free() -> None:
    plan = make()
    plan.submitted(0.0, ask("r1"))
    plan.submitted(0.0, ask("r2", "b"))
    plan.staged(0.1, 1)
    plan.staged(0.1, 2)
    assert plan.activation_failed(0.2, 1, "no memory") == [
        Evict("a", 1),
        Refuse("r1", Refusal.ADAPTER_UNAVAILABLE, None, "no memory"),
        Activate("b", 2),
    ]
    assert plan.submitted(0.3, ask("r3")) == [Stage("a", 3)]


def test_a_full_queue_refuses_and_tells_when_to_come_back() -> None:
    plan = make(max_queued=2)
    plan.submitted(0.0, ask("r1"))
    plan.submitted(0.0, ask("r2"))
    (refused,) = plan.submitted(20.0, ask("r3"))
    assert refused == Refuse("r3", Refusal.QUEUE_FULL, 20.0, "2 requests wait already")
    assert plan.submitted(20.0, ask("r4", tenant="other")) == []


def test_a_tenants_own_queue_limit_wins_over_the_servers() -> None:
    plan = make(max_queued=1)
    plan.submitted(0.0, ask("r1", max_queued=2))
    assert plan.submitted(0.0, ask("r2", max_queued=2)) == []
    assert [type(e) for e in plan.submitted(0.0, ask("r3", max_queued=2))] == [Refuse]


def test_a_request_waits_for_queue_timeout_and_no_longer() -> None:
    plan = make(queue_timeout=5.0, slot_patience=100.0)
    plan.submitted(1.0, ask("r1"))
    plan.submitted(2.0, ask("r2"))
    assert plan.next_deadline() == 6.0
    assert plan.tick(5.9) == []
    (refused,) = plan.tick(6.0)
    assert refused == Refuse("r1", Refusal.QUEUE_TIMEOUT, 5.0, "")
    assert plan.next_deadline() == 7.0


def test_a_place_in_the_queue_is_free_when_its_time_is_over() -> None:
    plan = make(queue_timeout=5.0, max_queued=1)
    plan.submitted(0.0, ask("r1"))
    (refused,) = plan.submitted(5.0, ask("r2"))
    assert refused == Refuse("r1", Refusal.QUEUE_TIMEOUT, 5.0)


def test_a_request_that_waited_too_long_does_not_run_any_more() -> None:
    plan = make(queue_timeout=5.0)
    plan.submitted(0.0, ask("r1"))
    assert [type(e) for e in plan.staged(5.0, 1)] == [Refuse]


def test_a_draining_server_refuses_what_waits_and_what_comes() -> None:
    plan = make()
    run(plan, 0.0, "runs", None)
    plan.submitted(0.0, ask("waits"))
    assert plan.drain(1.0) == [Refuse("waits", Refusal.DRAINING, None)]
    assert plan.submitted(1.0, ask("late", None)) == [Refuse("late", Refusal.DRAINING, None)]
    assert plan.staged(1.1, 1) == []
    assert plan.finished(2.0, "runs") == []
    assert repr(plan).endswith("draining>")


def test_a_draining_server_warms_nothing() -> None:
    plan = make(max_staging=1)
    plan.submitted(0.0, ask("r1", "a"))
    plan.warm(0.0, "b", slot=False)
    plan.pin(0.0, "p", True, "p")
    assert Warmed("b", Refusal.DRAINING) in plan.drain(0.1)
    assert plan.staged(0.2, 1) == []
    assert plan.warm(0.3, "c", slot=False) == [Warmed("c", Refusal.DRAINING)]


# --- room in the engine --------------------------------------------------------------------------


def test_max_running_counts_sequences() -> None:
    plan = make(running=4)
    run(plan, 0.0, "r1", None, sequences=3)
    assert plan.submitted(0.0, ask("r2", None, sequences=2)) == []
    assert plan.finished(1.0, "r1") == [Run("r2")]


def test_a_tenants_own_running_limit_holds_only_itself_back() -> None:
    plan = make()
    run(plan, 0.0, "r1", None, tenant="small", max_running=2, sequences=2)
    assert plan.submitted(0.0, ask("r2", None, tenant="small", max_running=2)) == []
    run(plan, 0.0, "r3", None, tenant="other")
    assert plan.finished(1.0, "r1") == [Run("r2")]


def test_a_request_above_its_tenants_limit_runs_when_nothing_else_of_it_does() -> None:
    plan = make()
    run(plan, 0.0, "r1", None, max_running=2, sequences=3)
    assert plan.submitted(0.0, ask("r2", None, max_running=2)) == []


def test_a_request_above_max_running_runs_alone() -> None:
    plan = make(running=2)
    run(plan, 0.0, "r1", None)
    assert plan.submitted(0.0, ask("huge", None, sequences=5)) == []
    assert plan.finished(1.0, "r1") == [Run("huge")]
    assert plan.submitted(1.0, ask("r2", None)) == []
    assert plan.finished(2.0, "huge") == [Run("r2")]


def test_small_requests_pass_a_large_one_for_slot_patience_only() -> None:
    plan = make(running=4, slot_patience=2.0)
    run(plan, 0.0, "r1", None, tenant="x")
    assert plan.submitted(0.0, ask("large", None, tenant="big", sequences=4)) == []
    run(plan, 1.0, "r2", None, tenant="x")
    run(plan, 2.9, "r3", None, tenant="x")
    assert plan.submitted(3.0, ask("r4", None, tenant="x")) == []
    assert "held_for=large" in repr(plan)
    assert plan.finished(4.0, "r1") == []
    assert plan.finished(4.0, "r2") == []
    assert plan.finished(5.0, "r3") == [Run("large")]
    assert plan.finished(6.0, "large") == [Run("r4")]


def test_a_hold_ends_when_another_tenant_is_first() -> None:
    plan = make(running=4, slot_patience=2.0)
    run(plan, 0.0, "r1", None, tenant="big")
    assert plan.submitted(0.0, ask("large", None, tenant="big", sequences=4)) == []
    run(plan, 0.0, "r2", None, tenant="x", prompt_tokens=50)
    assert plan.submitted(2.0, ask("r3", None, tenant="x")) == []
    assert plan.progressed(2.1, "r1", 100, 0) == [Run("r3")]


def test_the_slot_of_the_request_that_is_held_for_is_not_drained() -> None:
    plan = make(gpu=1, running=4, slot_patience=2.0)
    load(plan, 0.0, "a", 1)
    run(plan, 0.0, "r1", None, tenant="x", prompt_tokens=90)
    plan.submitted(0.0, ask("large", "a", sequences=4))
    run(plan, 0.0, "r2", None, tenant="x")
    plan.submitted(1.0, ask("cold", "b"))
    plan.staged(1.1, 2)
    assert plan.tick(3.0) == []
    assert plan.finished(9.0, "r1") == []
    assert plan.finished(9.0, "r2")[0] == Run("large")
    assert plan.finished(10.0, "large") == [Deactivate("a", 1), Activate("b", 2)]


# --- what is seen --------------------------------------------------------------------------------


def test_the_snapshot_tells_slots_tiers_and_queues() -> None:
    plan = make(gpu=2, host=4)
    load(plan, 0.0, "a", 1)
    run(plan, 0.0, "a1", "a", sequences=2)
    plan.pin(0.0, "b", True, "b")
    plan.submitted(0.0, ask("b1", "b"))
    plan.submitted(0.0, ask("c1", "c"))
    plan.staged(0.1, 2, size_bytes=500)

    seen = plan.snapshot()

    assert seen.slots == (
        Slot("a", 1, State.ACTIVE, running=1, draining=False),
        Slot("b", 2, State.ACTIVATING, running=0, draining=False),
    )
    assert seen.host == (
        HostEntry("a", 1, State.ACTIVE, Tier.GPU, pinned=False, size_bytes=0),
        HostEntry("b", 2, State.ACTIVATING, Tier.GPU, pinned=True, size_bytes=500),
        HostEntry("c", 3, State.STAGING, Tier.DISK, pinned=False, size_bytes=0),
    )
    assert seen.queued == {"b": 1, "c": 1}
    assert seen.running == {"a": 2}
    assert seen.counters == {"a": 20.0, "b": 20.0, "c": 20.0}  # newcomers start at the lowest
    assert [plan.tier_of(v) for v in "abcd"] == [Tier.GPU, Tier.GPU, Tier.DISK, Tier.DISK]
    assert plan.known_versions() == {"a", "b", "c"}
    assert not seen.draining
