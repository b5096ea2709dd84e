"""Each rule of the plan by example, with an explicit clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from adapters.model import Tier
from server.scheduling.nouns import (
    Activate,
    Ask,
    Capacity,
    Deactivate,
    Effect,
    Evict,
    HostEntry,
    Preempt,
    Quarantine,
    Refusal,
    Refuse,
    Run,
    Slot,
    Stage,
    State,
    Suspect,
    Warmed,
)
from server.scheduling.plan import Plan
from server.scheduling.suspects import CLEARED_AFTER_REQUESTS, CLEARED_AFTER_TOKENS, TWICE


def make(gpu: int = 1, host: int = 4, running: int = 8, suspects: str = "", **limits: Any) -> Plan:
    capacity = Capacity(gpu_slots=gpu, host_slots=host, max_running=running, **limits)
    return Plan(capacity, suspects=suspects)


def ask(id_: str, version: str | None = "a", tenant: str | None = None, **changes: Any) -> Ask:
    """A request of a tenant named like its version."""
    values = {"prompt_tokens": 10, "max_tokens": 100, **changes}
    return Ask(id=id_, tenant=tenant or version or "base", version=version, **values)


def load(plan: Plan, now: float, version: str, load_id: int) -> None:
    """Bring ``version`` into a slot, with nothing running."""
    assert plan.submitted(now, ask(f"load-{version}", version)) == [Stage(version, load_id)]
    assert plan.staged(now, load_id) == [Activate(version, load_id)]
    assert plan.activated(now, load_id) == [Run(f"load-{version}")]
    assert plan.finished(now, f"load-{version}") == []


def run(plan: Plan, now: float, id_: str, version: str | None, **changes: Any) -> None:
    """Start a request on a version that is active."""
    assert plan.submitted(now, ask(id_, version, **changes)) == [Run(id_)]


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


# --- host entries --------------------------------------------------------------------------------


def test_no_more_than_max_staging_at_once() -> None:
    plan = make(max_staging=2)
    assert plan.submitted(0.0, ask("r1", "a")) == [Stage("a", 1)]
    assert plan.submitted(0.0, ask("r2", "b")) == [Stage("b", 2)]
    assert plan.submitted(0.0, ask("r3", "c")) == []
    assert plan.staged(0.1, 2) == [Activate("b", 2), Stage("c", 3)]


def test_tenants_take_turns_at_staging() -> None:
    plan = make(gpu=1, host=8, max_staging=1)
    for n in range(3):
        plan.submitted(0.0, ask(f"noisy{n}", f"n{n}", tenant="noisy"))
    plan.submitted(0.1, ask("quiet", "q", tenant="quiet"))
    assert Stage("n1", 2) in plan.staged(0.2, 1)
    assert plan.staged(0.3, 2) == [Stage("q", 3)]
    assert plan.staged(0.4, 3) == [Stage("n2", 4)]


def test_the_least_recently_used_idle_entry_makes_room() -> None:
    plan = make(gpu=1, host=3)
    load(plan, 0.0, "a", 1)
    plan.submitted(1.0, ask("b1", "b"))
    assert plan.staged(1.0, 2) == [Deactivate("a", 1), Activate("b", 2)]
    plan.activated(1.0, 2)
    plan.submitted(2.0, ask("c1", "c"))
    plan.staged(2.0, 3)
    plan.cancelled(2.0, "c1")
    assert plan.submitted(3.0, ask("d1", "d")) == [Evict("a", 1), Stage("d", 4)]


def test_a_pinned_entry_is_kept_and_an_unpinned_one_goes() -> None:
    plan = make(gpu=1, host=4)
    load(plan, 0.0, "x", 1)
    run(plan, 0.0, "x1", "x")
    for n, version in enumerate("abc", start=2):
        plan.warm(float(n), version, slot=False)
        plan.staged(float(n), n)
    plan.pin(4.0, "a", True, "a")
    assert plan.submitted(5.0, ask("d1", "d")) == [Evict("b", 3), Stage("d", 5)]
    assert plan.pin(6.0, "a", False, "a") == []
    assert plan.submitted(7.0, ask("e1", "e")) == [Evict("a", 2), Stage("e", 6)]


def test_an_idle_version_in_a_slot_makes_room_as_a_last_resort() -> None:
    plan = make(gpu=1, host=1)
    load(plan, 0.0, "a", 1)
    assert plan.submitted(1.0, ask("b1", "b")) == [Deactivate("a", 1), Evict("a", 1), Stage("b", 2)]


def test_an_overdue_version_pushes_out_one_that_waits_shorter() -> None:
    plan = make(gpu=1, host=2, slot_patience=2.0)
    load(plan, 0.0, "a", 1)
    run(plan, 0.0, "a1", "a")
    assert plan.submitted(0.0, ask("b1", "b")) == [Stage("b", 2)]
    plan.staged(0.1, 2)
    assert plan.submitted(1.0, ask("c1", "c")) == []
    assert plan.submitted(1.5, ask("a2", "a")) == [Run("a2")]
    assert plan.tick(2.0) == []  # b is overdue: a drains
    assert plan.submitted(2.5, ask("a3", "a")) == []
    plan.finished(2.6, "a1")
    assert plan.finished(2.7, "a2") == [Deactivate("a", 1), Activate("b", 2)]
    assert plan.tick(3.0) == [Evict("a", 1), Stage("c", 3)]  # a lost its slot at 2.7, c waits since 1


@pytest.mark.parametrize(("pinned", "victim"), [([], Evict("d", 5)), (["d"], Evict("c", 4))])
def test_the_version_that_waits_shortest_is_pushed_out(pinned: list[str], victim: Evict) -> None:
    plan = make(gpu=1, host=5, max_staging=1, slot_patience=10.0)
    load(plan, 0.0, "a", 1)
    run(plan, 0.0, "a1", "a")
    arrivals = [(0.0, "x", "x"), (0.1, "t1", "t"), (0.1, "t2", "t"), (1.0, "c", "c"), (1.5, "d", "d")]
    for at, version, tenant in arrivals:
        plan.submitted(at, ask(version, version, tenant=tenant))
    for version in pinned:
        plan.pin(2.0, version, True, version)
    staged = [plan.staged(2.0, load_id) for load_id in (2, 3, 4, 5)]
    assert staged == [[Stage("t1", 3)], [Stage("c", 4)], [Stage("d", 5)], []]
    assert plan.tick(10.0) == []
    assert plan.tick(10.1) == [victim, Stage("t2", 6)]


def test_versions_that_wait_for_slots_do_not_push_each_other() -> None:
    plan = make(gpu=1, host=2, slot_patience=2.0)
    load(plan, 0.0, "a", 1)
    run(plan, 0.0, "a1", "a")
    plan.submitted(0.0, ask("b1", "b"))
    plan.staged(0.1, 2)
    plan.submitted(0.5, ask("c1", "c"))
    for now in (2.0, 2.5, 10.0):
        assert plan.tick(now) == []
    assert plan.finished(11.0, "a1") == [Deactivate("a", 1), Activate("b", 2), Evict("a", 1), Stage("c", 3)]


def test_one_entry_and_one_slot_serve_two_busy_versions_in_turn() -> None:
    plan = make(gpu=1, host=1, slot_patience=2.0)
    load(plan, 0.0, "a", 1)
    run(plan, 0.0, "a1", "a")
    assert plan.submitted(1.0, ask("b1", "b")) == []
    assert plan.next_deadline() == 3.0
    assert plan.tick(3.0) == []
    assert plan.submitted(3.1, ask("a2", "a")) == []
    assert repr(plan) == "<Plan slots[a~:1] host[] claims[b! a] running=1/8 waiting=2>"
    assert plan.finished(4.0, "a1") == [Deactivate("a", 1), Evict("a", 1), Stage("b", 2)]
    assert plan.staged(4.1, 2) == [Activate("b", 2)]
    assert plan.activated(4.2, 2) == [Run("b1")]
    assert plan.finished(5.0, "b1") == [Deactivate("b", 2), Evict("b", 2), Stage("a", 3)]


# --- slots ---------------------------------------------------------------------------------------


def test_the_least_recently_used_idle_slot_is_taken_at_once() -> None:
    plan = make(gpu=2)
    load(plan, 0.0, "a", 1)
    run(plan, 0.5, "a1", "a")
    load(plan, 1.0, "b", 2)
    plan.finished(3.0, "a1")
    plan.submitted(4.0, ask("c1", "c"))
    assert plan.staged(4.1, 3) == [Deactivate("b", 2), Activate("c", 3)]


def test_a_busy_slot_is_drained_after_patience_and_handed_over() -> None:
    plan = make(gpu=1, slot_patience=2.0)
    load(plan, 0.0, "a", 1)
    run(plan, 0.0, "a1", "a")
    plan.submitted(1.0, ask("b1", "b"))
    assert plan.staged(1.1, 2) == []
    run(plan, 2.9, "a2", "a")
    assert plan.tick(3.0) == []
    assert plan.submitted(3.1, ask("a3", "a")) == []
    assert plan.finished(4.0, "a1") == []
    assert plan.finished(5.0, "a2") == [Deactivate("a", 1), Activate("b", 2)]
    assert plan.activated(5.0, 2) == [Run("b1")]
    assert plan.next_deadline() == 7.0  # the clock of a starts again where it lost its slot


def test_the_slot_with_the_least_work_left_drains() -> None:
    plan = make(gpu=3, host=8, slot_patience=2.0)
    for n, version in enumerate("abc", start=1):
        load(plan, 0.0, version, n)
        run(plan, 0.0, f"{version}1", version, max_tokens=100)
    plan.progressed(1.0, "b1", 10, 70)
    plan.progressed(1.0, "c1", 10, 60)
    plan.progressed(1.1, "c1", 10, 0)  # too late to be true
    run(plan, 1.0, "b2", "b", max_tokens=20)
    plan.submitted(1.0, ask("d1", "d", tenant="b"))  # which has had the most of them
    plan.staged(1.1, 4)
    assert plan.tick(3.0) == []
    assert repr(plan).startswith("<Plan slots[a:1 b:2 c~:1] host[d] claims[d!]")
    plan.check()


def test_only_as_many_slots_drain_as_versions_are_overdue() -> None:
    plan = make(gpu=3, host=8, slot_patience=2.0)
    for n, version in enumerate("abc", start=1):
        load(plan, 0.0, version, n)
        run(plan, 0.0, f"{version}1", version)
    for n, version in enumerate("de", start=4):
        plan.submitted(float(n), ask(f"{version}1", version, tenant="c"))  # which has had no less than others
        plan.staged(float(n), n)
    drained = {now: [s.draining for s in _slots(plan, now)] for now in (5.9, 6.0, 6.9, 7.0, 20.0)}
    assert [sum(flags) for flags in drained.values()] == [0, 1, 1, 2, 2]
    assert plan.snapshot().drains == 2


def _slots(plan: Plan, now: float) -> tuple[Slot, ...]:
    plan.tick(now)
    return plan.snapshot().slots


def test_draining_is_undone_when_the_waiting_version_goes_away() -> None:
    plan = make(gpu=1, slot_patience=2.0)
    load(plan, 0.0, "a", 1)
    run(plan, 0.0, "a1", "a")
    plan.submitted(0.0, ask("b1", "b"))
    plan.staged(0.1, 2)
    plan.tick(2.0)
    assert plan.submitted(2.1, ask("a2", "a")) == []
    assert plan.cancelled(2.2, "b1") == [Run("a2")]
    assert repr(plan) == "<Plan slots[a:2] host[b] claims[] running=2/8 waiting=0>"


def test_the_slot_with_the_most_work_left_is_opened_again_first() -> None:
    plan = make(gpu=2, slot_patience=2.0)
    for n, version in enumerate("ab", start=1):
        load(plan, 0.0, version, n)
        run(plan, 0.0, f"{version}1", version, max_tokens=n * 100)
    for n, version in enumerate("cd", start=3):
        plan.submitted(0.0, ask(f"{version}1", version))
        plan.staged(0.1, n)
    plan.tick(2.0)
    assert repr(plan).startswith("<Plan slots[a~:1 b~:1] host[c d] claims[c! d!]")
    plan.cancelled(2.1, "c1")
    assert repr(plan).startswith("<Plan slots[a~:1 b:1] host[c d] claims[d!]")


def test_draining_is_undone_when_another_slot_becomes_idle_first() -> None:
    plan = make(gpu=2, slot_patience=2.0)
    for n, version in enumerate("ab", start=1):
        load(plan, 0.0, version, n)
    run(plan, 0.0, "a1", "a", max_tokens=10)
    run(plan, 0.0, "b1", "b")
    plan.submitted(0.0, ask("c1", "c"))
    plan.staged(0.1, 3)
    plan.tick(2.0)
    plan.submitted(2.1, ask("a2", "a"))
    assert plan.finished(2.2, "b1") == [Deactivate("b", 2), Activate("c", 3), Run("a2")]


def test_the_longest_waiting_version_gets_the_slot() -> None:
    plan = make(gpu=1, slot_patience=2.0)
    load(plan, 0.0, "a", 1)
    run(plan, 0.0, "a1", "a")
    plan.submitted(0.0, ask("b1", "b"))
    plan.submitted(0.5, ask("c1", "c"))
    plan.staged(1.0, 3)
    plan.staged(1.5, 2)
    plan.tick(3.0)
    assert plan.finished(4.0, "a1") == [Deactivate("a", 1), Activate("b", 2)]


def test_the_next_slot_is_for_who_has_had_least() -> None:
    plan = make(gpu=1, host=8, max_staging=8, slot_patience=2.0)
    for n in range(3):
        plan.submitted(0.0, ask(f"noisy{n}", f"n{n}", tenant="noisy"))
        plan.staged(0.0, n + 1)
    plan.submitted(0.1, ask("quiet", "q", tenant="quiet"))
    plan.staged(0.1, 4)
    order = []
    for now, load_id, id_ in [(1.0, 1, "noisy0"), (2.0, 4, "quiet"), (3.0, 2, "noisy1"), (4.0, 3, "noisy2")]:
        order += plan.activated(now, load_id)
        plan.finished(now + 0.5, id_)
    assert order == [Run("noisy0"), Run("quiet"), Run("noisy1"), Run("noisy2")]


def test_who_has_had_most_gets_a_slot_after_three_times_the_patience() -> None:
    plan = make(gpu=1, host=8, slot_patience=2.0)
    load(plan, 0.0, "a", 1)
    run(plan, 0.0, "a1", "a")
    plan.submitted(0.0, ask("greedy", None, tenant="greedy"))
    plan.progressed(0.0, "greedy", 10, 100_000)
    plan.submitted(0.0, ask("b1", "b", tenant="greedy"))
    plan.staged(0.0, 2)
    for n, now in enumerate([1.0, 3.0, 5.0], start=3):
        plan.submitted(now, ask(f"c{n}", f"c{n}"))
        plan.staged(now, n)
    assert plan.finished(5.5, "a1") == [Deactivate("a", 1), Activate("c3", 3)]
    plan.activated(5.5, 3)
    assert plan.finished(6.0, "c3") == [Deactivate("c3", 3), Activate("b", 2)]


def test_a_slot_drains_for_one_who_has_had_less_after_a_while() -> None:
    plan = make(gpu=2, host=8, slot_patience=2.0)
    for n, version in enumerate("ab", start=1):
        load(plan, 0.0, version, n)
        run(plan, 0.0, f"{version}1", version, max_tokens=100)
    plan.progressed(0.1, "a1", 10, 50)
    plan.submitted(0.2, ask("c1", "c"))
    assert plan.staged(0.3, 3) == []
    assert repr(plan).startswith("<Plan slots[a:1 b:1] host[c]")
    assert plan.next_deadline() == 0.5  # a quarter of slot_patience after they got their slots
    assert plan.tick(0.5) == []
    assert repr(plan).startswith("<Plan slots[a~:1 b:1] host[c]")
    assert plan.submitted(0.6, ask("a2", "a")) == []
    assert plan.finished(0.7, "a1") == [Deactivate("a", 1), Activate("c", 3)]
    plan.check()


# --- long generations ----------------------------------------------------------------------------


def _hogged(**changes: Any) -> Plan:
    """One slot, in which ``a1`` and ``a2`` run, and ``b1`` has been waiting for it since 0.0."""
    plan = make(gpu=1, host=4, slot_patience=2.0, preempt_after=10.0, queue_timeout=60.0)
    load(plan, 0.0, "a", 1)
    run(plan, 0.0, "a1", "a", max_tokens=1000, resumable=True)
    run(plan, 0.0, "a2", "a", max_tokens=1000, **{"resumable": True, **changes})
    plan.submitted(0.0, ask("b1", "b"))
    assert plan.staged(0.1, 2) == []
    plan.tick(2.0)
    return plan


def test_a_long_generation_is_put_aside_for_one_that_waits_and_goes_on_later() -> None:
    plan = _hogged()
    assert repr(plan).startswith("<Plan slots[a~:2] host[b] claims[b!]")
    assert plan.next_deadline() == 12.0
    assert plan.tick(11.9) == []
    plan.progressed(11.9, "a1", 10, 300)
    assert plan.tick(12.0) == [Preempt("a1"), Preempt("a2")]
    assert plan.tick(12.1) == []
    assert plan.preempted(12.2, "a1") == []
    assert plan.preempted(12.3, "a2") == [Deactivate("a", 1), Activate("b", 2)]
    assert "preempted=2" in repr(plan)
    assert plan.activated(12.4, 2) == [Run("b1")]
    plan.check()
    assert plan.finished(13.0, "b1") == [Deactivate("b", 2), Activate("a", 1)]
    assert plan.activated(13.1, 1) == [Run("a1"), Run("a2")]
    assert plan.finished(20.0, "a1") == []
    assert plan.snapshot().preemptions == 2
    plan.check()


def test_what_was_put_aside_waits_for_as_long_as_it_takes() -> None:
    plan = _hogged()
    plan.tick(12.0)
    plan.preempted(12.2, "a1")
    plan.preempted(12.3, "a2")
    plan.activated(12.4, 2)
    assert plan.tick(1000.0) == []
    assert plan.drain(1000.0) == []  # it had begun before: it may end
    assert plan.finished(1001.0, "b1") == [Deactivate("b", 2), Activate("a", 1)]
    assert plan.activated(1001.0, 1) == [Run("a1"), Run("a2")]


def test_what_was_put_aside_can_be_cancelled_or_end_or_be_refused() -> None:
    plan = _hogged()
    plan.tick(12.0)
    plan.preempted(12.2, "a1")
    plan.preempted(12.3, "a2")
    plan.activated(12.4, 2)
    assert plan.cancelled(13.0, "a1") == []
    plan.check()
    plan.lost(13.5, 1)
    plan.check()
    assert plan.finished(14.0, "b1") == []
    assert plan.stage_failed(15.0, 3, "gone") == [Refuse("a2", Refusal.ADAPTER_UNAVAILABLE, None, "gone")]
    assert plan.finished(16.0, "a2") == []
    plan.check()


def test_a_slot_with_a_request_that_cannot_go_on_later_is_left_alone() -> None:
    plan = _hogged(resumable=False)
    assert plan.tick(12.0) == []
    assert plan.tick(50.0) == []
    assert plan.finished(51.0, "a2") == [Preempt("a1")]
    plan.check()


def test_a_request_that_could_not_be_put_aside_is_not_asked_again() -> None:
    plan = _hogged()
    assert plan.tick(12.0) == [Preempt("a1"), Preempt("a2")]
    assert plan.preempted(12.1, "a1") == []
    assert plan.preempt_refused(12.2, "a2") == []
    plan.check()
    assert plan.tick(30.0) == []
    assert plan.finished(31.0, "a2") == [Deactivate("a", 1), Activate("b", 2)]


def test_another_slot_yields_if_the_one_that_drains_cannot() -> None:
    plan = make(gpu=2, host=4, slot_patience=2.0, preempt_after=10.0)
    for n, version in enumerate("ab", start=1):
        load(plan, 0.0, version, n)
    run(plan, 0.0, "a1", "a", max_tokens=100)
    run(plan, 0.0, "b1", "b", max_tokens=1000, resumable=True)
    plan.submitted(0.0, ask("c1", "c", tenant="b"))
    plan.staged(0.1, 3)
    plan.tick(2.0)
    assert repr(plan).startswith("<Plan slots[a~:1 b:1]")
    assert plan.tick(12.0) == [Preempt("b1")]
    assert repr(plan).startswith("<Plan slots[a:1 b~:1]")
    assert plan.preempted(12.1, "b1") == [Deactivate("b", 2), Activate("c", 3)]
    plan.check()


def test_a_version_that_waits_for_the_engine_keeps_its_slot_until_patience() -> None:
    plan = make(gpu=1, running=1, slot_patience=2.0)
    load(plan, 0.0, "a", 1)
    run(plan, 0.0, "base", None, tenant="x")
    plan.submitted(0.0, ask("a1", "a"))
    plan.submitted(0.0, ask("b1", "b"))
    assert plan.staged(0.1, 2) == []
    assert plan.tick(2.0) == [Deactivate("a", 1), Activate("b", 2)]


def test_a_full_engine_does_not_turn_waiting_into_swapping() -> None:
    plan = make(gpu=1, running=1, slot_patience=2.0)
    run(plan, 0.0, "base", None, tenant="x")
    for n, version in enumerate("abc", start=1):
        plan.submitted(0.0, ask(f"{version}1", version))
        plan.staged(0.1, n)
    plan.activated(0.2, 1)
    assert plan.tick(2.0) == []  # b and c are overdue, but a could not run anything yet
    assert plan.next_deadline() == 2.2
    assert plan.tick(2.2) == [Deactivate("a", 1), Activate("b", 2)]
    plan.activated(2.3, 2)
    assert plan.tick(4.2) == []
    assert plan.tick(4.3) == [Deactivate("b", 2), Activate("c", 3)]


def test_of_several_unused_slots_the_one_filled_first_is_due_first() -> None:
    plan = make(gpu=2, running=1, slot_patience=2.0)
    run(plan, 0.0, "base", None, tenant="x")
    for n, version in enumerate("abc", start=1):
        plan.submitted(0.0, ask(f"{version}1", version))
        plan.staged(0.1, n)
    plan.activated(0.3, 2)
    plan.activated(0.6, 1)
    assert plan.tick(2.0) == []
    assert plan.next_deadline() == 2.3
    assert plan.tick(2.3) == [Deactivate("b", 2), Activate("c", 3)]


def test_no_slot_drains_for_a_version_that_is_not_there_yet() -> None:
    plan = make(gpu=1, slot_patience=2.0)
    load(plan, 0.0, "a", 1)
    run(plan, 0.0, "a1", "a")
    plan.submitted(0.0, ask("b1", "b"))
    assert plan.tick(2.0) == []
    run(plan, 2.1, "a2", "a")
    assert plan.staged(2.5, 2) == []
    assert plan.submitted(2.6, ask("a3", "a")) == []


# --- pins ----------------------------------------------------------------------------------------


def test_a_pinned_idle_slot_is_kept() -> None:
    plan = make(gpu=2, slot_patience=2.0)
    load(plan, 0.0, "a", 1)
    plan.pin(0.0, "a", True, "t")
    load(plan, 1.0, "b", 2)
    plan.submitted(2.0, ask("c1", "c"))
    assert plan.staged(2.1, 3) == [Deactivate("b", 2), Activate("c", 3)]
    plan.activated(2.2, 3)
    plan.submitted(3.0, ask("b1", "b"))
    plan.tick(5.0)
    assert plan.finished(6.0, "c1") == [Deactivate("c", 3), Activate("b", 2)]


def test_pins_of_one_tenant_do_not_keep_the_last_slot() -> None:
    plan = make(gpu=2)
    for n, version in enumerate("ab", start=1):
        load(plan, float(n), version, n)
        plan.pin(float(n), version, True, "t")
    plan.submitted(3.0, ask("c1", "c"))
    assert plan.staged(3.1, 3) == [Deactivate("a", 1), Activate("c", 3)]
    plan.activated(3.2, 3)
    plan.submitted(3.3, ask("d1", "d"))
    assert plan.staged(3.4, 4) == []  # b is pinned again by the rule
    assert plan.finished(3.5, "c1") == [Deactivate("c", 3), Activate("d", 4)]
    plan.activated(3.6, 4)
    assert plan.finished(3.7, "d1") == [Deactivate("d", 4), Activate("a", 1)]


def test_patience_overrides_the_pins_where_every_slot_is_pinned() -> None:
    plan = make(gpu=2, slot_patience=2.0)
    for n, version in enumerate("ab", start=1):
        load(plan, float(n), version, n)
        plan.pin(float(n), version, True, version)
    plan.submitted(3.0, ask("c1", "c"))
    assert plan.staged(3.1, 3) == []
    assert plan.tick(5.0) == [Deactivate("a", 1), Activate("c", 3)]


def test_patience_overrides_the_pins_where_every_entry_is_pinned() -> None:
    plan = make(gpu=1, host=2, slot_patience=2.0)
    for n, version in enumerate("ab", start=1):
        plan.pin(0.0, version, True, version)
        plan.staged(0.0, n)
    plan.activated(0.0, 1)
    assert plan.submitted(1.0, ask("c1", "c")) == []
    assert plan.tick(3.0) == [Evict("b", 2), Stage("c", 3)]


def test_an_overdue_version_waits_for_an_unpinned_entry_where_there_is_one() -> None:
    plan = make(gpu=1, host=2, slot_patience=2.0)
    load(plan, 0.0, "a", 1)
    run(plan, 0.0, "a1", "a")
    plan.pin(0.0, "p", True, "p")
    plan.staged(0.0, 2)
    plan.submitted(0.0, ask("b1", "b"))
    assert plan.tick(2.0) == []
    assert plan.finished(9.0, "a1") == [Deactivate("a", 1), Activate("p", 2), Evict("a", 1), Stage("b", 3)]


def test_of_pinned_entries_an_idle_one_goes_before_one_that_is_waited_for() -> None:
    plan = make(gpu=1, host=3, max_staging=1, slot_patience=2.0)
    load(plan, 0.0, "a", 1)
    run(plan, 0.0, "a1", "a")
    for n, version in enumerate("abc", start=1):
        plan.pin(0.0, version, True, version)
        if n > 1:
            plan.staged(0.0, n)
    plan.submitted(0.0, ask("d1", "d"))
    plan.submitted(1.0, ask("c1", "c"))
    assert plan.tick(2.0) == [Evict("b", 2), Stage("d", 4)]


# --- warm, retire, lost --------------------------------------------------------------------------


def test_warm_stages_and_activates_without_a_request() -> None:
    plan = make(gpu=1, host=2)
    assert plan.warm(0.0, "a", slot=True) == [Stage("a", 1)]
    assert plan.warm(0.0, "b", slot=False) == [Stage("b", 2)]
    assert plan.staged(0.1, 2) == [Warmed("b")]
    assert plan.staged(0.2, 1) == [Activate("a", 1)]
    assert plan.activated(0.3, 1) == [Warmed("a")]
    assert plan.warm(0.4, "a", slot=True) == [Warmed("a")]
    run(plan, 0.5, "r1", "a")


def test_warm_can_add_the_slot_later() -> None:
    plan = make(gpu=2, host=2)
    plan.warm(0.0, "a", slot=False)
    plan.warm(0.0, "b", slot=False)
    assert plan.warm(0.1, "a", slot=True) == []
    assert plan.staged(0.2, 1) == [Activate("a", 1)]
    assert plan.staged(0.3, 2) == [Warmed("b")]
    assert plan.warm(0.4, "b", slot=True) == [Activate("b", 2)]
    assert plan.activated(0.5, 2) == [Warmed("b")]


def test_warm_waits_behind_requests_and_takes_nobodys_room() -> None:
    plan = make(gpu=1, host=2, max_staging=1)
    plan.submitted(0.0, ask("a1", "a"))
    assert plan.warm(0.0, "w", slot=True) == []
    assert plan.known_versions() == {"a", "w"}
    assert plan.submitted(0.1, ask("b1", "b")) == []
    assert plan.staged(0.2, 1) == [Activate("a", 1), Stage("b", 2)]
    assert plan.staged(0.3, 2) == []  # both entries are needed
    plan.activated(0.4, 1)
    assert plan.known_versions() == {"a", "b", "w"}
    assert plan.finished(0.5, "a1") == [Deactivate("a", 1), Activate("b", 2), Evict("a", 1), Stage("w", 3)]
    assert plan.staged(0.6, 3) == []
    plan.activated(0.7, 2)
    assert plan.finished(0.8, "b1") == [Deactivate("b", 2), Activate("w", 3)]
    assert plan.activated(0.9, 3) == [Warmed("w")]


def test_what_nobody_waits_for_any_more_is_not_warmed() -> None:
    plan = make(gpu=1, host=1)
    load(plan, 0.0, "a", 1)
    run(plan, 0.0, "a1", "a")
    assert plan.warm(0.1, "w", slot=False) == []
    assert plan.unwarm(0.2, "w") == []
    assert plan.finished(0.3, "a1") == []
    assert plan.known_versions() == {"a"}


def test_a_version_that_cannot_be_warmed_is_not_tried_without_end() -> None:
    plan = make()
    assert plan.warm(0.0, "w", slot=False) == [Stage("w", 1)]
    assert plan.stage_failed(0.1, 1, "unreadable") == [Warmed("w", Refusal.ADAPTER_UNAVAILABLE)]
    assert plan.pin(0.2, "p", True, "t") == [Stage("p", 2)]
    assert plan.stage_failed(0.3, 2, "unreadable") == []
    assert plan.tick(9.0) == []
    assert plan.submitted(9.1, ask("p1", "p")) == [Stage("p", 3)]


def test_a_pinned_version_comes_when_there_is_room_and_comes_back() -> None:
    plan = make(gpu=1, host=2, slot_patience=2.0)
    load(plan, 0.0, "a", 1)
    run(plan, 0.0, "a1", "a")
    assert plan.pin(0.1, "p", True, "p") == [Stage("p", 2)]
    assert plan.staged(0.2, 2) == []
    assert plan.finished(1.0, "a1") == [Deactivate("a", 1), Activate("p", 2)]
    plan.activated(1.1, 2)
    assert plan.submitted(2.0, ask("b1", "b")) == [Evict("a", 1), Stage("b", 3)]
    assert plan.staged(2.1, 3) == [Deactivate("p", 2), Activate("b", 3)]  # one tenant's pins keep not all
    plan.activated(2.2, 3)
    assert plan.finished(5.0, "b1") == [Deactivate("b", 3), Activate("p", 2)]


def test_a_retired_version_goes_as_soon_as_it_is_idle() -> None:
    plan = make(gpu=2)
    load(plan, 0.0, "a", 1)
    run(plan, 1.0, "a1", "a")
    assert plan.retire(2.0, "a") == []
    run(plan, 2.1, "a2", "a")
    assert plan.finished(3.0, "a1") == []
    assert plan.finished(3.1, "a2") == [Deactivate("a", 1), Evict("a", 1)]
    load(plan, 4.0, "b", 2)
    assert plan.retire(5.0, "b") == [Deactivate("b", 2), Evict("b", 2)]
    assert plan.retire(6.0, "unknown") == []


def test_versions_that_become_idle_together_go_in_the_order_in_which_they_were_retired() -> None:
    names = [f"v{number}" for number in range(12)]
    plan = make(gpu=1, host=12, max_staging=12)
    for name in names:
        plan.submitted(0.0, ask(f"r-{name}", name))
    for load_id in range(1, 13):
        plan.staged(0.1, load_id)
    plan.activation_failed(0.2, 1, "no")
    for name in reversed(names):
        plan.retire(0.3, name)
    evicted = [effect.version for effect in plan.drain(0.4) if isinstance(effect, Evict)]
    assert evicted == [name for name in reversed(names) if name in evicted]
    assert len(evicted) > 8


def test_a_retired_version_is_still_loaded_for_what_waits_and_then_not_kept() -> None:
    plan = make()
    plan.submitted(0.0, ask("a1"))
    plan.pin(0.0, "a", True, "t")
    assert plan.retire(0.1, "a") == []
    assert plan.staged(0.2, 1) == [Activate("a", 1)]
    assert plan.activated(0.3, 1) == [Run("a1")]
    assert plan.finished(0.4, "a1") == [Deactivate("a", 1), Evict("a", 1)]
    load(plan, 1.0, "a", 2)  # the same bytes uploaded again are a new life


def test_a_version_that_is_retired_before_it_is_staged_is_not_kept_either() -> None:
    plan = make(gpu=2, max_staging=1)
    plan.submitted(0.0, ask("a1", "a"))
    plan.submitted(0.0, ask("b1", "b"))
    plan.retire(0.1, "b")
    assert Stage("b", 2) in plan.staged(0.2, 1)
    plan.staged(0.3, 2)
    assert plan.activated(0.4, 2) == [Run("b1")]
    assert plan.finished(0.5, "b1") == [Deactivate("b", 2), Evict("b", 2)]


def test_pin_and_warm_take_a_retirement_back() -> None:
    plan = make(gpu=2)
    for n, version in enumerate("ab", start=1):
        load(plan, 0.0, version, n)
        run(plan, 1.0, f"{version}1", version)
        plan.retire(1.0, version)
    plan.pin(1.1, "a", True, "t")
    plan.warm(1.1, "b", slot=False)
    assert plan.finished(2.0, "a1") == []
    assert plan.finished(2.0, "b1") == []


def test_a_lost_load_is_loaded_again_for_what_waits() -> None:
    plan = make(gpu=1, running=1)
    load(plan, 0.0, "a", 1)
    run(plan, 0.0, "r1", "a")
    plan.submitted(0.0, ask("r2", "a"))
    assert plan.lost(1.0, 1) == [Stage("a", 2)]
    assert plan.staged(1.1, 2) == [Activate("a", 2)]
    plan.activated(1.2, 2)
    assert plan.finished(2.0, "r1") == [Run("r2")]  # it ran on the load that is gone
    assert plan.snapshot().slots[0].running == 1
    plan.check()


def test_a_lost_idle_load_leaves_room() -> None:
    plan = make(gpu=1, host=1)
    load(plan, 0.0, "a", 1)
    assert plan.lost(1.0, 1) == []
    assert plan.submitted(1.0, ask("b1", "b")) == [Stage("b", 2)]


def test_what_is_under_way_is_not_lost() -> None:
    plan = make()
    plan.submitted(0.0, ask("r1"))
    assert plan.lost(0.1, 1) == []
    assert plan.staged(0.2, 1) == [Activate("a", 1)]
    assert plan.lost(0.3, 1) == []
    assert plan.activated(0.4, 1) == [Run("r1")]
    assert plan.lost(0.5, 99) == []


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


# --- the engine is lost ------------------------------------------------------------------------------


def test_without_an_engine_nothing_is_decided_and_everything_keeps_its_place() -> None:
    plan = make(gpu=2)
    load(plan, 0.0, "a", 1)
    run(plan, 0.0, "goes on", "a", resumable=True)
    run(plan, 0.0, "ends", "a")
    run(plan, 0.0, "base", None, resumable=True)
    plan.submitted(0.0, ask("cold", "b"))
    assert plan.engine_stopped(1.0, ["goes on", "base"]) == [Suspect(frozenset("a"))]
    plan.check()
    assert plan.tier_of("a") is Tier.DISK
    assert plan.finished(1.0, "ends") == []
    assert plan.submitted(1.0, ask("new", None)) == []
    plan.check()
    effects = plan.engine_started(2.0)
    assert set(effects) == {Run("base"), Run("new"), Stage("b", 3), Stage("a", 4)}, "ids are burned"
    plan.staged(2.1, 4)
    assert plan.activated(2.2, 4) == [Run("goes on")]
    plan.check()


def test_waiting_has_its_time_limit_without_an_engine_too() -> None:
    plan = make(queue_timeout=5.0)
    run(plan, 0.0, "goes on", None, resumable=True)
    plan.engine_stopped(1.0, ["goes on"])
    plan.submitted(1.0, ask("waits"))
    assert plan.next_deadline() == 3.0  # the claim's patience
    plan.tick(3.0)
    assert plan.next_deadline() == 6.0
    assert plan.tick(6.0) == [Refuse("waits", Refusal.QUEUE_TIMEOUT, pytest.approx(5.0))]
    assert plan.engine_started(7.0) == [Run("goes on")]


def lose(plan: Plan, now: float, kept: Sequence[str] = ()) -> list[Effect]:
    """The engine is lost, ``kept`` can go on, everything else ends, and another one is there at once."""
    effects = plan.engine_stopped(now, kept)
    for id_ in set(plan._running) - set(kept):
        effects += plan.finished(now, id_, completed=False)
    return effects + plan.engine_started(now)


def test_suspects_run_apart_and_the_guilty_one_alone_is_quarantined() -> None:
    plan = make(gpu=3)
    for number, name in enumerate("abc", 1):
        load(plan, 0.0, name, number)
    run(plan, 0.0, "1", "a", resumable=True)
    run(plan, 0.0, "2", "b", resumable=True)
    assert Suspect(frozenset("ab")) in lose(plan, 1.0, ["1", "2"])
    for number, name in enumerate("ab", 4):
        plan.staged(2.0, number)
        effects = plan.activated(2.0, number)
        assert effects == ([Run("1")] if name == "a" else []), "b waits for a"
        plan.check()
    load(plan, 2.5, "c", 6)
    assert plan.submitted(3.0, ask("3", "c")) == [Run("3")], "nobody suspects c"
    assert plan.submitted(3.0, ask("4", "a")) == [Run("4")], "requests of one suspect run together"
    effects = lose(plan, 4.0, ["1"])
    assert {e for e in effects if isinstance(e, Quarantine)} == {Quarantine("a", TWICE)}
    assert Refuse("1", Refusal.QUARANTINED, None, TWICE) in effects
    assert Suspect(frozenset("c")) in effects, "b was not there"
    plan.check()
    assert not any(isinstance(e, Refuse | Quarantine) for e in lose(plan, 5.0)), "nothing ran"


def test_a_suspect_that_leaves_the_engine_lets_the_next_one_run() -> None:
    plan = make(gpu=2, suspects="ab")
    load(plan, 0.0, "a", 1)
    load(plan, 0.0, "b", 2)
    run(plan, 0.0, "1", "a")
    assert plan.submitted(0.0, ask("2", "b")) == []
    assert plan.next_deadline() is not None, "its time limit holds"
    assert plan.cancelled(1.0, "1") == [Run("2")]
    assert plan.submitted(1.0, ask("3", "a")) == []
    plan.check()
    assert plan.finished(2.0, "2") == [Run("3")]


def test_a_suspect_is_cleared_by_finished_requests_and_by_tokens() -> None:
    plan = make(gpu=2, suspects="ab")
    load(plan, 0.0, "a", 1)
    load(plan, 0.0, "b", 2)
    for number in range(CLEARED_AFTER_REQUESTS):
        run(plan, 0.0, f"cancelled {number}", "a")
        assert plan.cancelled(0.0, f"cancelled {number}") == [], "that proves nothing"
    for number in range(CLEARED_AFTER_REQUESTS - 2):  # loading it finished one
        run(plan, 0.0, f"a{number}", "a")
        assert plan.finished(0.0, f"a{number}") == []
    run(plan, 0.0, "last", "a")
    run(plan, 0.0, "long", "a")
    assert plan.submitted(0.0, ask("b", "b")) == []
    assert plan.finished(0.0, "last") == [Suspect(frozenset("b")), Run("b")], "also while more of a runs"
    assert plan.progressed(1.0, "b", 10, CLEARED_AFTER_TOKENS - 1) == []
    assert plan.progressed(1.0, "b", 10, CLEARED_AFTER_TOKENS) == [Suspect(frozenset())]
    plan.check()


def test_what_ran_in_an_engine_that_is_gone_says_nothing_about_the_next_one() -> None:
    """A client that reads slowly may still hold its lease when the next engine is lost."""
    plan = make(gpu=2)
    load(plan, 0.0, "a", 1)
    run(plan, 0.0, "slow", "a")
    plan.engine_stopped(1.0, [])
    plan.engine_started(2.0)
    assert not any(isinstance(e, Quarantine) for e in plan.engine_stopped(3.0, []))
    plan.finished(4.0, "slow")
    plan.check()


def test_what_waits_for_a_version_is_refused_when_it_is_quarantined() -> None:
    plan = make()
    load(plan, 0.0, "a", 1)
    run(plan, 0.0, "base", None)
    run(plan, 0.0, "runs", "a", resumable=True)
    plan.submitted(0.0, ask("other", "b"))
    plan.submitted(0.0, ask("late", "c"))
    assert plan.quarantined(1.0, "b", "it made NaN") == [
        Refuse("other", Refusal.QUARANTINED, None, "it made NaN")
    ]
    plan.engine_stopped(1.0, ["runs"])
    assert plan.quarantined(1.0, "a", "why") == [Refuse("runs", Refusal.QUARANTINED, None, "why")]
    plan.check()
