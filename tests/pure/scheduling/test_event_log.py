"""What the plan was told can be told to another plan, with the same effects and the same state."""

from __future__ import annotations

import json

import pytest

from server.scheduling.event_log import EventLog, replay
from server.scheduling.nouns import Ask, Capacity, Effect
from server.scheduling.plan import Plan
from tests.pure.scheduling.test_plan_walks import WALKS, Walker


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


@pytest.mark.parametrize(("seed", "capacity"), WALKS[:3])
def test_a_recorded_walk_replays_to_the_same_effects_and_state(seed: int, capacity: Capacity) -> None:
    walker = Walker(seed, capacity)
    plan, log = walker.world.plan, EventLog(10**6)
    walker.world.plan = recorded = Recorded(plan, log)  # type: ignore[assignment]
    walker.walk(2_000)

    again = Plan(capacity)
    events = json.loads(json.dumps(log.last(log.total)))
    assert replay(again, events) == recorded.effects
    assert repr(again) == repr(plan)
    assert again.snapshot() == plan.snapshot()
    again.check()


def test_the_log_keeps_the_last_events() -> None:
    log = EventLog(kept=3)
    for number in range(5):
        log.add("finished", float(number), (f"r{number}",))
    assert log.total == 5
    assert [event["now"] for event in log.last(10)] == [2.0, 3.0, 4.0]
    assert log.last(1) == [{"event": "finished", "now": 4.0, "arguments": ["r4"]}]
    assert log.last(0) == []


def test_an_ask_is_shown_with_its_fields() -> None:
    log = EventLog()
    log.add("submitted", 0.0, (Ask("r", "t", None, 1, 2),))
    assert log.last(1)[0]["arguments"][0]["tenant"] == "t"
