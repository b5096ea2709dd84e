"""Host entries and slots by example: who gets one, who leaves, and who is put aside."""

from __future__ import annotations

from typing import Any

import pytest

from server.scheduling.nouns import (
    Activate,
    Deactivate,
    Evict,
    Preempt,
    Refusal,
    Refuse,
    Run,
    Slot,
    Stage,
)
from server.scheduling.plan import Plan
from tests.support.plans import ask, load, make, run

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
