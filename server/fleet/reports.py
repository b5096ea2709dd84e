"""A replica as a gateway knows it: what it reported last, and what this gateway has sent there. Pure."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any

from server.fleet.rendezvous import score

READY = "ready"


@dataclass(frozen=True, slots=True)
class Report:
    """What a replica says of itself with each beat. ``number`` grows with each; one seen before says nothing
    new.

    ``base`` is the fingerprint of its base model, and ``kind`` all that must be equal for an answer to go on
    elsewhere (base, engine's version, dtype). ``running`` counts sequences and ``queued`` requests, of all
    gateways; ``busy_slots`` the slots with something running. ``in_slots`` and ``in_host`` name versions
    as ``candidates`` is asked for them; one in a slot may be named in both. ``room`` is how many versions
    its memory holds, those in slots among them; 0 if it does not say. ``backlog`` is in seconds, see
    ``server.telemetry.pace``.
    """

    replica: str
    number: int
    base: str
    kind: str
    state: str
    gpu_slots: int
    max_running: int
    running: int = 0
    queued: int = 0
    busy_slots: int = 0
    in_slots: Collection[str] = ()
    in_host: Collection[str] = ()
    room: int = 0
    backlog: float = 0.0

    @classmethod
    def of(cls, replica: str, said: Mapping[str, Any], room: int = 0, backlog: float = 0.0) -> Report:
        """What crossed the wire; what a newer release says besides is left out. TypeError for less."""
        known = {name: said[name] for name in _SAID if name in said}
        return cls(replica=replica, room=room, backlog=backlog, **known)

    def as_json(self) -> dict[str, Any]:
        """As it crosses: without its name, which who asks knows, and its room, which is among its facts;
        an older gateway takes no field that it does not know, so the backlog goes beside it."""
        return {name: getattr(self, name) for name in _SAID}


_SAID = tuple(each.name for each in fields(Report) if each.name not in ("replica", "room", "backlog"))


class Where(IntEnum):
    """The nearer, the lower."""

    SLOT = 0
    HOST = 1
    LOADING = 2
    ELSEWHERE = 3


@dataclass(slots=True, eq=False)
class Resident:
    """One replica. ``own`` counts sequences, ``versions`` requests of this gateway; ``where`` is what it
    has in memory, ``coming`` what was sent there and is not in memory yet, as far as is known.
    """

    report: Report
    heard: float
    hash: int
    lost: bool = False
    own: int = 0
    own_at_beat: int = 0
    versions: Counter[str] = field(default_factory=Counter)
    sent_at: OrderedDict[str, float] = field(default_factory=OrderedDict)
    where: dict[str, Where] = field(default_factory=dict)
    coming: set[str] = field(default_factory=set)

    def beat(self, now: float, report: Report, loading: float) -> None:
        """It has reported; what was sent there ``loading`` seconds ago should be known by now."""
        self.report, self.heard, self.lost = report, now, False
        self.own_at_beat = self.own
        self.where = dict.fromkeys(report.in_host, Where.HOST) | dict.fromkeys(report.in_slots, Where.SLOT)
        while self.sent_at and now - next(iter(self.sent_at.values())) > loading:
            self.sent_at.popitem(last=False)
        self.coming = self.sent_at.keys() - self.where.keys()

    def sent(self, now: float, version: str) -> None:
        """A request for ``version`` went there, or a call to load it."""
        self.sent_at[version] = now
        self.sent_at.move_to_end(version)
        if version not in self.where:
            self.coming.add(version)

    @property
    def load(self) -> int:
        """Sequences under way, as far as is known."""
        reported = self.report.running + self.report.queued
        return max(self.own, reported + self.own - self.own_at_beat)

    @property
    def has_slot(self) -> bool:
        """Whether there is a slot that nothing runs in."""
        return max(self.report.busy_slots, len(self.versions)) < self.report.gpu_slots

    @property
    def held(self) -> int:
        """How many versions are in its memory, or will be soon."""
        return len(self.where) + len(self.coming)

    @property
    def has_room(self) -> bool:
        """Whether one more version fits into its memory without another one going."""
        return not self.report.room or self.held < self.report.room

    def is_fuller(self, than: float) -> bool:
        """Whether one more version makes more of its memory full than that part of it."""
        return bool(self.report.room) and self.held + 1 > math.ceil(than * self.report.room)

    @property
    def loads_for_one(self) -> int:
        """What one more version costs: where there is no room, what it pushes out is loaded again."""
        return 1 if self.has_room else 2

    @property
    def part(self) -> float:
        """The replica's load, as a part of what it can run at once."""
        return self.load / max(1, self.report.max_running)

    def takes(self, bound: float) -> bool:
        """Whether one more stays within ``bound``, a part of what it can run at once."""
        return self.load + 1 <= max(1.0, bound * self.report.max_running)

    def tier(self, version: str, now: float, loading: float) -> Where:
        """Where ``version`` is as far as this replica is concerned."""
        where = self.where.get(version)
        if where is not None:
            return where
        sent = self.sent_at.get(version)
        under_way = version in self.versions or (sent is not None and now - sent <= loading)
        return Where.LOADING if under_way else Where.ELSEWHERE

    def count(self, version: str) -> float:
        """About how many sequences of ``version`` are under way there, those of other gateways among them."""
        return self.versions[version] * self.load / max(1, self.own)

    def score(self, version: int) -> float:
        """How much ``version`` (hashed) belongs here; in proportion to what can run here."""
        return score(version, self.hash, self.report.max_running)


def part_of(replicas: Collection[Resident], more: int = 0) -> float:
    """All that is under way, and so many sequences more, as a part of what can run at once."""
    room = sum(each.report.max_running for each in replicas)
    return (sum(each.load for each in replicas) + more) / max(1, room)


def full_part(replicas: Collection[Resident]) -> float:
    """How much of their memory is taken, or will be soon."""
    room = sum(each.report.room for each in replicas)
    return sum(each.held for each in replicas if each.report.room) / max(1, room)


def by_load(replica: Resident) -> tuple[float, str]:
    """The least loaded first, and in one order for everybody."""
    return replica.part, replica.report.replica
