"""Loads by example: pins, warming, retirement, and what is lost, a load or the whole engine."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from adapters.model import Tier
from server.scheduling.nouns import (
    Activate,
    Deactivate,
    Effect,
    Evict,
    Quarantine,
    Refusal,
    Refuse,
    Run,
    Stage,
    Suspect,
    Warmed,
)
from server.scheduling.plan import Plan
from server.scheduling.suspects import CLEARED_AFTER_REQUESTS, CLEARED_AFTER_TOKENS, TWICE
from tests.support.plans import ask, load, make, run

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
