"""The last events that the plan was told, so that a fault in production can be replayed in a test."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from server.scheduling.nouns import Ask, Effect
from server.scheduling.plan import Plan

KEPT = 8192  # events
LOGGED = 500  # of them in the log, when something is wrong


class EventLog:
    """A ring of (event's name, time, arguments)."""

    def __init__(self, kept: int = KEPT) -> None:
        self._events: deque[tuple[str, float, tuple[Any, ...]]] = deque(maxlen=kept)
        self.total = 0

    def add(self, name: str, now: float, arguments: tuple[Any, ...]) -> None:
        """Note an event. Costs well below a microsecond: arguments are kept as they are."""
        self._events.append((name, now, arguments))
        self.total += 1

    def last(self, number: int) -> list[dict[str, Any]]:
        """The last ``number`` events as JSON, oldest first."""
        chosen = list(self._events)[-number:] if number > 0 else []
        return [{"event": name, "now": now, "arguments": list(map(_plain, a))} for name, now, a in chosen]


def replay(plan: Plan, events: Iterable[dict[str, Any]]) -> list[list[Effect]]:
    """Tell ``plan`` each of ``events``, as ``EventLog.last`` gives them; returns the effects of each.

    Where the log holds every event from the start on, a fresh plan ends up in the same state.
    """
    effects = []
    for event in events:
        arguments = [Ask(**one) if isinstance(one, dict) else one for one in event["arguments"]]
        effects.append(getattr(plan, event["event"])(event["now"], *arguments))
    return effects


def _plain(argument: Any) -> Any:
    if isinstance(argument, Ask):
        return asdict(argument)
    return sorted(argument) if isinstance(argument, set | frozenset | tuple | list) else argument
