"""A rollout as it goes from step to step: what is decided when, and what holds after every event."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from server.rollouts.guards import Evidence, Guards, Seen
from server.rollouts.plan import (
    MAX_DECISIONS,
    Decision,
    Probes,
    Rollout,
    back,
    forward,
    looked,
    overtaken,
    pause,
    probed,
    resume,
)

AT = datetime(2026, 5, 1, tzinfo=UTC)
FINE = Seen(first_token=0.1, token=0.01, length=50, cut=False)
SOON = timedelta(seconds=30)


def begun(**fields: object) -> Rollout:
    given = {"hold": timedelta(minutes=1)} | fields
    return probed(Rollout(2, 1, AT, **given), Probes(matches=True), AT)  # type: ignore[arg-type]


def seen(new: int, of: Seen = FINE, live: int | None = None) -> Evidence:
    evidence = Evidence(Guards())
    for number in range(max(new, live or new)):
        evidence.see(FINE, is_new=False)
        if number < new:
            evidence.see(of, is_new=True)
    return evidence


def actions(rollout: Rollout) -> list[str]:
    return [decision.action for decision in rollout.decisions]


def test_it_gets_its_first_share_only_once_its_probes_match() -> None:
    new = Rollout(2, 1, AT)
    assert (new.share, new.split, new.wants_probes) == (0, None, True)
    started = probed(new, Probes(matches=True, numbers={"largest_difference": 0.1}), AT)
    assert (started.share, started.split, started.wants_probes) == (5, {1: 95, 2: 5}, False)
    (decision,) = started.decisions
    assert (decision.action, decision.by, decision.numbers) == (
        "start",
        "guards",
        {"largest_difference": 0.1},
    )


@pytest.mark.parametrize("probes", [Probes(matches=False), Probes(effect=False)])
def test_probes_that_do_not_match_and_answers_like_the_base_end_it(probes: Probes) -> None:
    ended = probed(Rollout(2, 1, AT), probes, AT)
    assert (ended.state, ended.split, ended.answers) == ("rolled_back", None, 1)
    assert ended.reason in (
        "the golden probes of the new version do not match",
        "the new version answers as the base model does, unlike the live one",
    )
    careless = Rollout(2, 1, AT, guards=Guards(probes=False))
    assert probed(careless, probes, AT).share == 5


@pytest.mark.parametrize(
    ("guards", "probes", "reason"),
    [
        (Guards(), Probes(matches=True), "the new version answers as its probes say"),
        (Guards(), Probes(), "the new version came without golden probes"),
        (Guards(probes=False), Probes(), "it begins without a look at golden probes, as was asked for"),
    ],
)
def test_it_says_what_was_known_of_its_probes(guards: Guards, probes: Probes, reason: str) -> None:
    begun = probed(Rollout(2, 1, AT, guards=guards), probes, AT)
    assert (begun.share, begun.reason) == (5, reason)
    later = probed(replace(begun, due=True), probes, AT)
    assert (later.share, later.reason) == (25, "no guard objects")
    whole = probed(Rollout(2, 1, AT, steps=(100,), guards=guards), probes, AT)
    assert (whole.state, whole.reason) == ("completed", "the only step")


def test_it_waits_for_its_hold_for_samples_and_at_the_end_for_certainty() -> None:
    rollout = begun(steps=(5, 100))
    rollout = looked(rollout, seen(100), AT + SOON)
    assert (rollout.state, rollout.waits_for) == ("running", "30 s of its hold")
    rollout = looked(replace(rollout, samples=20), seen(20), AT + 2 * SOON)
    assert rollout.waits_for == "30 requests of version 2"
    rollout = looked(replace(rollout, samples=60), seen(60), AT + 3 * SOON)
    assert rollout.waits_for is not None
    assert rollout.waits_for.startswith("more requests, to be certain of ")
    done = looked(replace(rollout, samples=600), seen(600), AT + 4 * SOON)
    assert (done.state, done.share, done.answers, done.split) == ("completed", 100, 2, None)
    assert done.decisions[-1].numbers["new"]["requests"] == 600


def test_requests_without_an_answer_are_no_samples_and_are_said() -> None:
    """As of a version that is in no slot while the server is full, or whose clients all hang up."""
    evidence = seen(3)
    for _ in range(40):
        evidence.see(Seen(unanswered=True), is_new=True)
    rollout = looked(replace(begun(), samples=3), evidence, AT + 3 * SOON)
    assert rollout.state == "running"
    assert rollout.waits_for is not None
    assert rollout.waits_for.startswith("47 requests of version 2; 40 others got no turn")
    numbers = evidence.numbers()["new"]
    assert (numbers["requests"], numbers["unanswered"], numbers["errors"]) == (3, 40, 0)
    kept = evidence.as_json()
    del kept["new"]["unanswered"], kept["live"]["unanswered"]  # of an earlier release
    assert Evidence.from_json(Guards(), kept).numbers()["new"]["unanswered"] == 0


def test_what_a_hold_has_left_changes_once_a_minute_until_its_last() -> None:
    rollout = begun(steps=(5, 100), hold=timedelta(minutes=10))
    ages = (0, 1, 59, 60, 61, 539, 540, 541, 599)
    said = [looked(rollout, seen(100), AT + timedelta(seconds=age)).waits_for for age in ages]
    minutes = ["10 min", "10 min", "10 min", "9 min", "9 min", "2 min", "60 s", "59 s", "1 s"]
    assert said == [f"{left} of its hold" for left in minutes]


def test_between_it_takes_steps_without_being_certain() -> None:
    rollout = replace(begun(), samples=60)
    rollout = looked(rollout, seen(60), AT + 3 * SOON)
    assert rollout.wants_probes
    rollout = probed(rollout, Probes(), AT + 3 * SOON)
    assert (rollout.step, rollout.share, rollout.samples, rollout.since) == (1, 25, 0, AT + 3 * SOON)


def test_harm_ends_it_at_once_even_while_it_is_paused() -> None:
    paused = pause(begun(), "admin", AT)
    assert (paused.state, paused.held_by, paused.split) == ("held", "admin", {1: 95, 2: 5})
    ended = looked(paused, seen(30, Seen(failed=True)), AT + SOON)
    assert (ended.state, ended.decisions[-1].by) == ("rolled_back", "guards")
    assert ended.reason == "the new version fails more often"
    assert ended.decisions[-1].numbers["new"]["errors"] == 1.0


def test_what_looks_worse_is_held_until_it_is_certain_or_looks_better() -> None:
    rollout = replace(begun(), samples=100)
    slow = replace(FINE, first_token=0.2)
    evidence = seen(7, slow)
    held = looked(rollout, evidence, AT + 3 * SOON)
    assert (held.state, held.held_by) == ("held", "guards")
    assert "begins later" in str(held.reason)
    assert looked(held, evidence, AT + 4 * SOON) == held
    for _ in range(40):
        evidence.see(FINE, is_new=False)
        evidence.see(replace(FINE, first_token=0.05), is_new=True)
    better = looked(held, evidence, AT + 5 * SOON)
    assert (better.state, better.held_by, actions(better)[-1]) == ("running", None, "resume")


def test_a_person_goes_on_stops_and_goes_back() -> None:
    rollout = forward(begun(), "admin", AT, {})
    assert (rollout.step, rollout.share) == (1, 25)
    rollout = pause(rollout, "admin", AT)
    assert looked(replace(rollout, samples=9000), seen(9000), AT + 9 * SOON) == replace(rollout, samples=9000)
    rollout = resume(rollout, "admin", AT)
    assert forward(rollout, "admin", AT, {}).state == "completed"
    gone = back(rollout, "asked for", "admin", AT, {})
    assert (gone.state, gone.share, gone.answers) == ("rolled_back", 0, 1)


def test_whoever_changes_what_answers_by_hand_ends_it() -> None:
    assert overtaken(begun(), 2, "made live by hand", AT).state == "completed"
    assert overtaken(begun(), 7, "another was made live", AT).state == "rolled_back"


def test_of_very_many_decisions_the_first_and_the_newest_are_kept() -> None:
    rollout = begun()
    for _ in range(MAX_DECISIONS):
        rollout = resume(pause(rollout, "admin", AT), "admin", AT)
    assert len(rollout.decisions) == MAX_DECISIONS
    assert (actions(rollout)[0], actions(rollout)[-1]) == ("start", "resume")


def test_a_decision_is_the_same_after_it_was_stored() -> None:
    (decision,) = begun().decisions
    assert Decision.from_json(decision.as_json()) == decision


@pytest.mark.parametrize("seed", range(40))
def test_random_walks(seed: int) -> None:
    """Shares only grow until the end, an end is an end, and what is wanted of the split fits the state."""
    draw = random.Random(seed)
    rollout = Rollout(2, 1, AT, steps=(5, 25, 60, 100), hold=timedelta(seconds=draw.choice([0, 40])))
    evidence, at = Evidence(rollout.guards), AT
    for _ in range(150):
        before, at = rollout, at + timedelta(seconds=draw.randrange(30))
        event = draw.choice(["probes"] + ["look"] * 6 + ["forward", "pause", "resume", "hand", "back"])
        if rollout.ended and event in ("forward", "pause", "resume", "hand", "back"):
            continue
        if event == "probes":
            rollout = probed(rollout, Probes(matches=draw.choice([None, True, True, False])), at)
        elif event == "look":
            for _ in range(draw.randrange(40)):
                new = Seen(failed=draw.random() < 0.05) if draw.random() < 0.1 else FINE
                evidence.see(new, is_new=draw.random() < 0.3)
            rollout = looked(replace(rollout, samples=rollout.samples + draw.randrange(40)), evidence, at)
        elif event == "forward":
            rollout = forward(rollout, "admin", at, {}) if draw.random() < 0.3 else rollout
        elif event == "pause":
            rollout = pause(rollout, "admin", at)
        elif event == "resume":
            rollout = resume(rollout, "admin", at)
        elif draw.random() < 0.1:
            by_hand = overtaken(rollout, 7, "by hand", at)
            rollout = by_hand if event == "hand" else back(rollout, "", "admin", at, {})
        holds(before, rollout)


def holds(before: Rollout, after: Rollout) -> None:
    if before.ended:
        assert replace(after, samples=before.samples) == before
    assert after.state == "rolled_back" or after.share >= before.share
    assert after.step - before.step in (0, 1) or after.ended
    assert (after.held_by is not None) == (after.state == "held")
    assert after.share in (0, *after.steps)
    if after.state == "completed":
        assert (after.share, after.split, after.answers) == (100, None, 2)
    elif after.state == "rolled_back":
        assert (after.share, after.split, after.answers) == (0, None, 1)
    elif after.share:
        assert after.split == {1: 100 - after.share, 2: after.share}
        assert after.share == after.steps[after.step]
    if (after.state, after.share) != (before.state, before.share):
        assert len(after.decisions) > len(before.decisions) or len(after.decisions) == MAX_DECISIONS
