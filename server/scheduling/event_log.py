"""The last events that the plan was told, so that a fault in production can be replayed in a test.

The log has a plan of its own, which is behind by the events that the log keeps: an event that falls out of
the log is told to it. So the log always knows the state before its first event, and what it keeps can be
replayed from there, however long the server has run. That costs each event once more (2 to 5 us for every
``lease.REPORT_EVERY`` tokens of an answer, below 1 us a token), and never more at one moment: to copy the
state now and then would stop the event loop for as long as it is large, 30 ms with 1,000 tenants.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from server.scheduling import checkpoints
from server.scheduling.nouns import Ask, Effect
from server.scheduling.plan import Plan

KEPT = 8192  # events
LOGGED = 500  # of them in the log, readable, when something is wrong
LINE = 8000  # characters of a recording in one line of the log: some collectors cut lines of 16 KiB

Event = tuple[str, float, tuple[Any, ...]]


class Recording(NamedTuple):
    """All that the log keeps: the plan before the first event, and the events."""

    plan: Plan
    events: tuple[Event, ...]

    def steps(self, found: dict[str, Any]) -> Iterator[None]:
        """Put ``checkpoint`` (for ``checkpoints.restored``) and ``events`` (for ``replay``) into ``found``, a
        small piece at a step. All of them take 3 ms with 50 tenants, 0.1 s with 1,000.
        """
        found["checkpoint"], found["events"] = [], []
        yield from checkpoints.steps(self.plan, found["checkpoint"])
        for event in self.events:
            found["events"].append(_shown(event))
            yield


class EventLog:
    """A ring of (event's name, time, arguments).

    ``behind`` is a plan in the state in which the watched one is now; the log owns it.
    """

    def __init__(self, behind: Plan, kept: int = KEPT) -> None:
        self._behind = behind
        self._kept = kept
        self._events: deque[Event] = deque()
        self._held = 0
        self.total = 0

    def add(self, name: str, now: float, arguments: tuple[Any, ...]) -> None:
        """Note an event. Arguments are kept as they are."""
        self._events.append((name, now, arguments))
        self.total += 1
        while len(self._events) > self._kept and not self._held:
            oldest, at, given = self._events.popleft()
            # It ended in the same way when the plan was told, which its caller has been told.
            with contextlib.suppress(Exception):
                getattr(self._behind, oldest)(at, *given)

    def last(self, number: int) -> list[dict[str, Any]]:
        """The last ``number`` events as JSON, oldest first."""
        chosen = list(self._events)[-number:] if number > 0 else []
        return list(map(_shown, chosen))

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recording]:
        """All of it, which stays as it is until the end of the block. The log grows meanwhile."""
        self._held += 1
        try:
            yield Recording(self._behind, tuple(self._events))
        finally:
            self._held -= 1


def replay(plan: Plan, events: Iterable[Mapping[str, Any]]) -> list[list[Effect]]:
    """Tell ``plan`` each of ``events``, as ``EventLog.last`` gives them; returns the effects of each.

    A plan in the state before the first of them ends up in the state after the last.
    """
    effects = []
    for event in events:
        arguments = [Ask(**one) if isinstance(one, dict) else one for one in event["arguments"]]
        effects.append(getattr(plan, event["event"])(event["now"], *arguments))
    return effects


def as_lines(recording: Mapping[str, Any]) -> list[str]:
    """What ``Recording.steps`` found, for the log: numbered lines of hardly more than ``LINE`` characters."""
    text = base64.b64encode(zlib.compress(json.dumps(recording).encode())).decode()
    parts = [text[start : start + LINE] for start in range(0, len(text), LINE)]
    return [f"recording {number}/{len(parts)}: {part}" for number, part in enumerate(parts, 1)]


def from_log(text: str) -> dict[str, Any]:
    """The last recording whose ``as_lines`` stand in ``text`` among others. ValueError where a line is
    missing or cut.
    """
    start = text.rfind("recording 1/")  # each process may have written one
    found = re.findall(r"recording (\d+)/(\d+): ([A-Za-z0-9+/=]+)", text[max(0, start) :])
    parts = {int(number): part for number, _, part in found}
    if not found or sorted(parts) != list(range(1, int(found[0][1]) + 1)):
        raise ValueError(f"not all lines of a recording are here: {sorted(parts)} of {found and found[0][1]}")
    packed = "".join(part for _, part in sorted(parts.items()))
    try:
        recording: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(packed)))
    except zlib.error as exc:
        raise ValueError(f"a line of the recording is not as it was written: {exc}") from exc
    return recording


def _shown(event: Event) -> dict[str, Any]:
    name, now, arguments = event
    return {"event": name, "now": now, "arguments": list(map(_plain, arguments))}


def _plain(argument: Any) -> Any:
    if isinstance(argument, Ask):
        return asdict(argument)
    if isinstance(argument, set | frozenset):
        return sorted(argument)
    return list(argument) if isinstance(argument, tuple) else argument  # in their order: it decides
