"""A rollout: which share a new version has, and what happens next. Pure: events in, the next rollout out.

    running ── Probed, Looked ──▶ running at a larger share … ──▶ completed
       │  ▲                                                         rolled_back   from every state before
       ▼  │  paused by a person, or held by the guards
      held

Effects follow from the rollout itself: its ``share`` is put into the adapter's split, ``completed`` makes the
new version live, and ``wants_probes`` says that the golden probes are due. Each may be repeated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from server.rollouts.guards import REPLAYED, Evidence, Finding, Guards, names

State = Literal["running", "held", "completed", "rolled_back"]
Action = Literal["start", "forward", "hold", "resume", "pause", "complete", "roll_back"]
ENDED: tuple[State, ...] = ("completed", "rolled_back")
WHOLE = 100
STANDARD_STEPS = (5, 25, WHOLE)
STANDARD_HOLD_S = 600.0
STANDARD_GUARDS = Guards()
GUARDS = "guards"  # who decides where nobody does

# Of the many looks that change nothing none is kept; of what is decided this many.
MAX_DECISIONS = 200


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided, by whom (``guards``, or the name of a person's key), why, and with what numbers."""

    at: datetime
    action: Action
    by: str
    step: int
    share: int
    reason: str
    numbers: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "at": self.at.isoformat(),
            "action": self.action,
            "by": self.by,
            "step": self.step,
            "share": self.share,
            "reason": self.reason,
            "numbers": self.numbers,
        }

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> Decision:
        return cls(**kept | {"at": datetime.fromisoformat(kept["at"])})


@dataclass(frozen=True, slots=True)
class Probes:
    """What the engine says of a version on its own. ``matches`` is None where it came without golden probes.

    ``effect`` and ``live_effect``: whether each of the versions answers otherwise than the base.
    """

    matches: bool | None = None
    effect: bool = True
    live_effect: bool = True
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rollout:
    """``version`` is the new one, ``live`` the one before it. ``step`` is an index into ``steps``.

    ``share`` is 0 until the probes of the first step have passed. ``since`` is when the share was given,
    ``due`` whether the next step, or the first, waits for its probes. ``held_by`` is ``guards`` or a person.
    """

    version: int
    live: int
    since: datetime
    steps: tuple[int, ...] = STANDARD_STEPS
    hold: timedelta = timedelta(seconds=STANDARD_HOLD_S)
    guards: Guards = STANDARD_GUARDS
    state: State = "running"
    step: int = 0
    share: int = 0
    due: bool = True
    held_by: str | None = None
    samples: int = 0
    waits_for: str | None = None
    decisions: tuple[Decision, ...] = ()

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def split(self) -> dict[int, int] | None:
        """What the adapter's split is to be; None where one version alone answers."""
        if self.ended or not 0 < self.share < WHOLE:
            return None
        return {self.live: WHOLE - self.share, self.version: self.share}

    @property
    def answers(self) -> int:
        """Which version is to be live."""
        return self.version if self.state == "completed" else self.live

    @property
    def wants_probes(self) -> bool:
        return self.due and not self.ended and self.held_by in (None, GUARDS)

    @property
    def reason(self) -> str | None:
        """Of the last decision."""
        return self.decisions[-1].reason if self.decisions else None


def probed(rollout: Rollout, probes: Probes, at: datetime) -> Rollout:
    """The step that waited for its probes is taken, or they do not match."""
    if not rollout.wants_probes:
        return rollout
    if rollout.guards.probes:
        if probes.matches is False:
            why = "the golden probes of the new version do not match"
            return back(rollout, why, GUARDS, at, probes.numbers)
        if rollout.share == 0 and probes.live_effect and not probes.effect:
            why = "the new version answers as the base model does, unlike the live one"
            return back(rollout, why, GUARDS, at, probes.numbers)
    return _further(rollout, GUARDS, at, probes.numbers, _why_further(rollout, probes))


def looked(rollout: Rollout, evidence: Evidence, at: datetime) -> Rollout:
    """Judges what was seen so far. The guards also watch over a rollout that a person has paused."""
    if rollout.ended or rollout.share == 0:
        return rollout
    findings = evidence.findings()
    harmful = [finding for finding in findings if finding.verdict == "harm"]
    if harmful:
        why = f"the new version {_and([finding.worse for finding in harmful])}"
        return back(rollout, why, GUARDS, at, evidence.numbers())
    if rollout.due or rollout.held_by not in (None, GUARDS):
        return rollout
    waits = _waits_for(rollout, evidence, findings, at)
    leaning = [finding for finding in findings if finding.leans]
    rested = at - rollout.since >= rollout.hold
    if rested and leaning:
        if rollout.state == "held":
            return rollout
        looks = _and([finding.worse for finding in leaning])
        why = f"it looks as if the new version {looks}; that is not certain yet"
        held = replace(rollout, state="held", held_by=GUARDS, waits_for=waits)
        return _decided(held, "hold", GUARDS, at, why, evidence.numbers())
    if rollout.state == "held":
        on = replace(rollout, state="running", held_by=None, waits_for=waits)
        return _decided(on, "resume", GUARDS, at, "it no longer looks worse", evidence.numbers())
    if waits is not None:
        return replace(rollout, waits_for=waits)
    if _is_last(rollout):
        sure = names(_that_apply(findings)) or "none is set"
        why = f"it is certainly no worse than the guards allow: {sure}"
        return _completed(rollout, GUARDS, at, why, evidence.numbers())
    return replace(rollout, due=True, waits_for="golden probes")


def forward(rollout: Rollout, by: str, at: datetime, numbers: dict[str, Any]) -> Rollout:
    """A person takes the next step at once, whatever the evidence."""
    if rollout.share and _is_last(rollout):
        return _completed(rollout, by, at, "taken further by hand", numbers)
    going = replace(rollout, state="running", held_by=None)
    return _further(going, by, at, numbers, "taken further by hand")


def pause(rollout: Rollout, by: str, at: datetime, reason: str = "paused by hand") -> Rollout:
    """Keeps the share as it is until ``resume``; the guards go on watching."""
    paused = replace(rollout, state="held", held_by=by)
    return _decided(paused, "pause", by, at, reason, {})


def resume(rollout: Rollout, by: str, at: datetime) -> Rollout:
    """Goes on from where it was held."""
    going = replace(rollout, state="running", held_by=None)
    return _decided(going, "resume", by, at, "resumed by hand", {})


def back(rollout: Rollout, reason: str, by: str, at: datetime, numbers: dict[str, Any]) -> Rollout:
    """The live version answers alone again."""
    ended = replace(rollout, state="rolled_back", share=0, due=False, held_by=None, waits_for=None)
    return _decided(ended, "roll_back", by, at, reason, numbers)


def overtaken(rollout: Rollout, live: int | None, reason: str, at: datetime) -> Rollout:
    """Somebody has changed by hand what answers: that stays, and the rollout ends."""
    if live == rollout.version:
        return _completed(rollout, "hand", at, reason, {})
    return back(rollout, reason, "hand", at, {})


def _further(rollout: Rollout, by: str, at: datetime, numbers: dict[str, Any], why: str) -> Rollout:
    step = rollout.step + 1 if rollout.share else 0
    share = rollout.steps[step]
    if share == WHOLE:
        said = "the only step" if by == GUARDS else why
        return _completed(replace(rollout, step=step), by, at, said, numbers)
    action: Action = "forward" if rollout.share else "start"
    moved = replace(rollout, step=step, share=share, due=False, since=at, samples=0, waits_for=None)
    return _decided(moved, action, by, at, why, numbers)


def _why_further(rollout: Rollout, probes: Probes) -> str:
    if rollout.share:
        return "no guard objects"
    if not rollout.guards.probes:
        return "it begins without a look at golden probes, as was asked for"
    if probes.matches is None:
        return "the new version came without golden probes"
    return "the new version answers as its probes say"


def _completed(rollout: Rollout, by: str, at: datetime, reason: str, numbers: dict[str, Any]) -> Rollout:
    last = len(rollout.steps) - 1
    ended = replace(
        rollout, state="completed", step=last, share=WHOLE, due=False, held_by=None, waits_for=None
    )
    return _decided(ended, "complete", by, at, reason, numbers)


def _decided(
    rollout: Rollout, action: Action, by: str, at: datetime, reason: str, numbers: dict[str, Any]
) -> Rollout:
    decision = Decision(at, action, by, rollout.step, rollout.share, reason, numbers)
    kept = (*rollout.decisions, decision)
    # The first says how it began; of the rest the newest count.
    return replace(rollout, decisions=kept if len(kept) <= MAX_DECISIONS else (kept[0], *kept[2:]))


def _is_last(rollout: Rollout) -> bool:
    """Whether what comes next is all of the requests."""
    return rollout.steps[rollout.step + 1] == WHOLE


def _waits_for(rollout: Rollout, evidence: Evidence, findings: Sequence[Finding], at: datetime) -> str | None:
    """What is missing for the next step; None if nothing is."""
    left = rollout.hold - (at - rollout.since)
    if left > timedelta(0):
        return f"{_rest(left.total_seconds())} of its hold"
    missing = rollout.guards.min_samples - rollout.samples
    if missing > 0:
        return f"{missing} requests of version {rollout.version}{_but(evidence)}"
    unsure = [finding for finding in _that_apply(findings) if finding.verdict != "safe"]
    if _is_last(rollout) and unsure:
        replayed = [finding for finding in unsure if finding.guard in REPLAYED]
        more = "replayed prompts" if len(replayed) == len(unsure) else "requests"
        return f"more {more}, to be certain of {names(unsure)}"
    return None


def _but(evidence: Evidence) -> str:
    """Why requests of the new version are missing although they come: most of them get no answer."""
    unanswered = int(evidence.new["unanswered"])
    if unanswered <= evidence.new["requests"]:
        return ""
    return f"; {unanswered} others got no turn, or their clients left before the answer"


def _rest(seconds: float) -> str:
    """Whole minutes as long as there are any: what a look has found anew is written."""
    return f"{math.ceil(seconds / 60)} min" if seconds > 60 else f"{seconds:.0f} s"


def _that_apply(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.applies]


def _and(parts: Sequence[str]) -> str:
    parts = list(dict.fromkeys(parts))
    return " and ".join((", ".join(parts[:-1]), parts[-1])) if len(parts) > 1 else "".join(parts)
