"""What the plan was told can be told to another plan, with the same effects and the same state."""

from __future__ import annotations

import json
from itertools import count
from typing import Any

import pytest

from server.scheduling import checkpoints
from server.scheduling.checkpoints import as_json, restored
from server.scheduling.event_log import LINE, EventLog, as_lines, from_log, replay
from server.scheduling.nouns import Ask, Capacity, Effect
from server.scheduling.plan import Plan
from tests.pure.scheduling.test_plan_walks import WALKS, Walker

KEPT = 300


class Recorded:
    """A plan whose events are logged, as the dispatcher does it."""

    def __init__(self, plan: Plan, log: EventLog) -> None:
        self._plan, self._log = plan, log
        self.effects: list[list[Effect]] = []

    def __getattr__(self, name: str) -> object:
        found = getattr(self._plan, name)
        if name in ("check", "snapshot", "next_deadline", "known_versions"):
            return found

        def event(now: float, *arguments: object) -> list[Effect]:
            self._log.add(name, now, arguments)
            effects: list[Effect] = found(now, *arguments)
            self.effects.append(effects)
            return effects

        return event


def recorded(walker: Walker, capacity: Capacity, kept: int) -> tuple[Plan, EventLog, Recorded]:
    """From now on every event of the walk is logged."""
    plan, log = walker.world.plan, EventLog(Plan(capacity), kept)
    walker.world.plan = seen = Recorded(plan, log)  # type: ignore[assignment]
    return plan, log, seen


def sent(log: EventLog) -> dict[str, Any]:
    """As it arrives at a client of the API."""
    found: dict[str, Any] = {}
    with log.recording() as recording:
        for _ in recording.steps(found):
            pass
    arrived: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))
    return arrived


@pytest.mark.parametrize(("seed", "capacity"), WALKS[:3])
def test_a_recorded_walk_replays_to_the_same_effects_and_state(seed: int, capacity: Capacity) -> None:
    walker = Walker(seed, capacity)
    plan, log, seen = recorded(walker, capacity, 10**6)
    walker.walk(2_000)

    again = Plan(capacity)
    events = json.loads(json.dumps(log.last(log.total)))
    assert replay(again, events) == seen.effects
    assert repr(again) == repr(plan)
    assert again.snapshot() == plan.snapshot()
    again.check()


@pytest.mark.parametrize(("seed", "capacity"), WALKS)
def test_a_log_that_has_forgotten_its_beginning_is_replayed_from_its_checkpoint(
    seed: int, capacity: Capacity
) -> None:
    walker = Walker(seed, capacity)
    plan, log, seen = recorded(walker, capacity, KEPT)
    for look in range(1, 5):
        walker.walk(400 * look)
        found = sent(log)
        assert log.total > KEPT == len(found["events"])
        again = restored(found["checkpoint"])
        again.check()
        assert replay(again, found["events"]) == seen.effects[-KEPT:]
        assert repr(again) == repr(plan)
        assert again.snapshot() == plan.snapshot()
        assert as_json(again) == as_json(plan), "also what no snapshot shows"


def test_a_recording_comes_back_from_the_lines_of_a_log() -> None:
    walker = Walker(*WALKS[0])
    _, log, _ = recorded(walker, WALKS[0][1], KEPT)
    walker.walk(1_000)
    found = sent(log)
    lines = as_lines(found)
    assert len(lines) > 1
    assert max(map(len, lines)) < LINE + 30
    text = "\n".join(f'{{"level": "ERROR", "message": "{line}"}}\n2026 INFO something else' for line in lines)
    assert from_log(text) == found
    for missing in (lines[1:], lines[:-1], []):
        with pytest.raises(ValueError, match="not all lines"):
            from_log("\n".join(missing))


def test_of_several_recordings_in_a_log_the_last_comes_back() -> None:
    """A server was started again, and its plan was wrong again. The second is shorter."""
    first, second = {"events": [str(n * n) for n in range(20_000)]}, {"events": ["the last"]}
    assert len(as_lines(first)) > len(as_lines(second)) == 1
    assert from_log("\n".join(as_lines(first) + as_lines(second))) == second
    assert from_log("\n".join(as_lines(second) + as_lines(first))) == first


def test_a_recording_with_a_line_that_was_changed_is_refused() -> None:
    number, packed = as_lines({"events": list(range(100))})[0].split(": ")
    for wrong in (packed[:-8], packed[:40] + "AAAA" + packed[44:], packed[:-7]):
        with pytest.raises(ValueError):
            from_log(f"{number}: {wrong}")


def test_a_count_is_written_with_the_number_that_comes_next(recwarn: pytest.WarningsRecorder) -> None:
    numbers = count(3)
    next(numbers)
    found: list[dict[str, Any]] = []
    list(checkpoints._Writer().steps(numbers, found))
    assert found == [{"count": 4}]
    assert next(numbers) == 4, "it stays as it was"
    assert not recwarn.list


def test_what_is_being_read_stays_as_it_is_while_events_come() -> None:
    capacity = Capacity(gpu_slots=1, host_slots=1, max_running=1)
    log = EventLog(Plan(capacity), kept=2)
    for number in range(4):
        log.add("submitted", float(number), (Ask(f"r{number}", "t", None, 1, 1),))
    before = sent(log)
    found: dict[str, Any] = {}
    with log.recording() as recording:
        for number, _ in enumerate(recording.steps(found)):
            if not number:
                log.add("tick", 5.0, ())
        assert found == before
        assert len(log.last(10)) == 3
    log.add("tick", 6.0, ())
    found = sent(log)
    assert [event["now"] for event in found["events"]] == [5.0, 6.0]
    assert restored(found["checkpoint"]).snapshot().queued == {"t": 3}


def test_an_event_that_the_plan_refuses_leaves_the_log_as_it_leaves_the_plan() -> None:
    log = EventLog(Plan(Capacity(gpu_slots=1, host_slots=1, max_running=1)), kept=0)
    log.add("activated", 1.0, (7,))
    log.add("submitted", 2.0, (Ask("r", "t", None, 1, 1),))
    assert restored(sent(log)["checkpoint"]).snapshot().running == {"t": 1}


@pytest.mark.parametrize(
    "objects",
    [
        [],
        [{"list": []}],
        [{"object": "Popen", "fields": {}}],
        [{"method": "__init__", "of": "text"}],
        [{"method": "no_such_method", "of": {"ref": 1}}, {"object": "Plan", "fields": {}}],
        [{"object": "Plan", "fields": {"_queue": {"ref": 7}}}],
        [{"object": "Ask", "fields": {"no_such_field": 1}}],
    ],
)
def test_what_is_no_state_of_a_plan_is_refused(objects: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="not the state of a plan"):
        restored(objects)


def test_the_log_keeps_the_last_events() -> None:
    log = EventLog(Plan(Capacity(gpu_slots=1, host_slots=1, max_running=1)), kept=3)
    for number in range(5):
        log.add("finished", float(number), (f"r{number}",))
    assert log.total == 5
    assert [event["now"] for event in log.last(10)] == [2.0, 3.0, 4.0]
    assert log.last(1) == [{"event": "finished", "now": 4.0, "arguments": ["r4"]}]
    assert log.last(0) == []


def test_an_event_is_shown_with_the_fields_of_its_ask_and_lists_in_their_order() -> None:
    log = EventLog(Plan(Capacity(gpu_slots=1, host_slots=1, max_running=1)))
    log.add("submitted", 0.0, (Ask("r", "t", None, 1, 2),))
    log.add("engine_stopped", 1.0, (["r2", "r1"],))
    assert log.last(2)[0]["arguments"][0]["tenant"] == "t"
    assert log.last(1)[0]["arguments"] == [["r2", "r1"]]
