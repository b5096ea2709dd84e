"""Whether a version's presence at the engine's losses can be chance. Pure: no clock, no engine.

A version that ends the engine on a certain word does harmless work in between, as much as clears a suspect.
What tells it from one that only happened to run is how seldom it runs otherwise. An engine that is lost for
another reason is lost at any moment, so a version that runs for a share s of the time is there by chance with
probability s. After n losses in the window, at each of which a version was there, and m versions at the
first, so many are expected there by chance:

    m * s(2) * ... * s(n)        s(i): its share as it was known at loss i

The first loss only says of whom it is asked. Where that is small, and many times smaller than for any other
version, that one has ended the engine. A loss without it, also one at which nothing ran, clears it, unless a
version that was there has been found to end the engine: then that was the reason. A version that runs all the
time is there whatever the reason is, and is never taken for it.

Words of a prompt end an engine when the prompt is read. So the same is asked of versions with a request that
began just before each loss, which even one that runs all the time seldom has. Each may err half as often.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# In seconds. A request is new for as long as its prompt may take.
WINDOW = 600.0
NEW = 2.0
# How many innocent versions may be expected to be taken for the reason where the engine is lost for another.
BY_CHANCE = 0.05
# How much less likely its presence is by chance than that of each other version that was there each time.
LESS_LIKELY = 10
# A share is that of these seconds more, so that a server's first moments say little.
UNKNOWN = 2.0


@dataclass(frozen=True, slots=True)
class Shares:
    """Of the time with an engine, that in which a version ran, and in which it had a new request; the latter
    None where it had none at the loss."""

    ran: float
    new: float | None


@dataclass(frozen=True, slots=True)
class Loss:
    """One loss of the engine: when, in seconds, and the shares of the versions that ran, by version."""

    at: float
    ran: dict[str, Shares]

    def as_json(self) -> dict[str, Any]:
        """As it is kept beyond the end of the process."""
        return {
            "at": self.at,
            "ran": {version: [shares.ran, shares.new] for version, shares in self.ran.items()},
        }

    @classmethod
    def of_json(cls, kept: Mapping[str, Any]) -> Loss:
        """What ``as_json`` made."""
        return cls(kept["at"], {version: Shares(*shares) for version, shares in kept["ran"].items()})


@dataclass(slots=True)
class Time:
    """Seconds spent in a state; a second counts for less the older it is, by e in a window."""

    seconds: float = 0.0
    at: float = 0.0

    def advance(self, to: float, *, inside: bool) -> None:
        left = math.exp(-max(0.0, to - self.at) / WINDOW)
        self.seconds = self.seconds * left + (WINDOW * (1 - left) if inside else 0.0)
        self.at = max(self.at, to)


@dataclass(slots=True)
class Presence:
    ran: Time
    new: Time
    running: int = 0
    began: float | None = None  # when its last request in this engine did

    def advance(self, to: float) -> None:
        self.ran.advance(to, inside=self.running > 0)
        if self.began is not None:
            self.new.advance(min(to, max(self.new.at, self.began + NEW)), inside=True)
        self.new.advance(to, inside=False)


@dataclass(slots=True)
class Evidence:
    """Told when requests begin and end, in seconds of one clock; ``losses`` are those in the window."""

    losses: tuple[Loss, ...] = ()
    _presences: dict[str, Presence] = field(default_factory=dict)
    _alive: Time | None = None  # since the first request
    _stopped: float | None = None  # since when there is no engine
    _away: float = 0.0  # seconds without one, which no share knows of
    _prune_at: int = 1000

    def recall(self, losses: Iterable[Loss]) -> None:
        """What another process before this has seen."""
        self.losses = tuple(sorted((*losses, *self.losses), key=lambda loss: loss.at))

    def began(self, version: str, now: float) -> None:
        """A request of ``version`` runs now."""
        now -= self._away
        self._alive = self._alive or Time(at=now)
        presence = self._presences.get(version)
        if presence is None:
            self._prune(now)
            presence = self._presences[version] = Presence(Time(at=now), Time(at=now))
        presence.advance(now)
        presence.running += 1
        presence.began = now

    def ended(self, version: str, now: float) -> None:
        """A request of it that had begun runs no more."""
        presence = self._presences[version]
        presence.advance(now - self._away)
        presence.running -= 1

    def lost(self, running: Collection[str], now: float) -> list[str]:
        """The engine was lost while these ran, and nothing runs any more: who has ended it, if known."""
        at = now - self._away
        self._alive = self._alive or Time(at=at)
        self._alive.advance(at, inside=True)
        shares = {}
        for version, presence in self._presences.items():
            presence.advance(at)
            if version in running:
                is_new = presence.began is not None and presence.began + NEW > at
                shares[version] = Shares(
                    _share(presence.ran, self._alive), _share(presence.new, self._alive) if is_new else None
                )
            presence.running, presence.began = 0, None
        self._stopped = now
        self.losses = (*(one for one in self.losses if one.at > now - WINDOW), Loss(now, shares))
        return guilty(self.losses)

    def explained(self, guilty: Collection[str]) -> None:
        """These have ended the engine: losses at which one of them ran say nothing of the others any more."""
        self.losses = tuple(loss for loss in self.losses if loss.ran.keys().isdisjoint(guilty))

    def started(self, now: float) -> None:
        """There is an engine again."""
        if self._stopped is not None:
            self._away += now - self._stopped
            self._stopped = None

    def _prune(self, now: float) -> None:
        """Forgets who ran long ago, once there are many."""
        if len(self._presences) < self._prune_at:
            return
        for version, presence in list(self._presences.items()):
            presence.advance(now)
            if not presence.running and presence.ran.seconds < 0.01:
                del self._presences[version]
        self._prune_at = max(1000, 2 * len(self._presences))


def _share(part: Time, whole: Time) -> float:
    return min(1.0, (part.seconds + UNKNOWN) / (whole.seconds + UNKNOWN))


def guilty(losses: Sequence[Loss]) -> list[str]:
    """The version whose presence at all of these, first to last, can hardly be chance; nobody where there are
    several such, or none."""
    if len(losses) < 2:
        return []
    common = set.intersection(*(set(loss.ran) for loss in losses))
    by_running = {v: [loss.ran[v].ran for loss in losses] for v in common}
    by_new = {v: [s for loss in losses if (s := loss.ran[v].new) is not None] for v in common}
    by_new = {v: shares for v, shares in by_new.items() if len(shares) == len(losses)}
    first = losses[0].ran.values()
    found = set(_outstanding(by_running, len(first)))
    found.update(_outstanding(by_new, sum(shares.new is not None for shares in first)))
    return sorted(found) if len(found) == 1 else []


def _outstanding(shares_of: Mapping[str, Sequence[float]], candidates: int) -> Iterator[str]:
    """The version whose presence is the least likely by far, if it is unlikely enough."""
    chances = sorted((candidates * math.prod(shares[1:]), version) for version, shares in shares_of.items())
    if chances and chances[0][0] <= BY_CHANCE / 2:
        least, version = chances[0]
        if all(chance >= least * LESS_LIKELY for chance, _ in chances[1:2]):
            yield version
