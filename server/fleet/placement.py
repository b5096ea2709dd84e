"""Which replica a request goes to. Pure: it is told what happened and when, and answers; it calls nothing.

    beat, lost, forget   what is known of a replica
    sent, ended          what this gateway has under way there
    candidates           where a request goes, best first
    moves, pins          what to load where without a request

A version goes where it is in a slot, then where it is in host memory, then where it was sent lately (it is
being loaded there), else where rendezvous hashing puts it, so that gateways that never talk agree. Among
several replicas of one kind the hash decides too, not the load: traffic collects on few homes.

Loads are bounded (Mirrokni, Thorup and Zadimoghaddam, "Consistent hashing with bounded loads", 2018): a
replica that would have more than ``slack`` times its share of everything under way comes after all that would
not. That is how a hot adapter gets a second home, the next in its hash's order. When it cools down the first
home has room again and gets all of it, and the second one's engine lets it go as the least recently used:
cold homes are given up.

What a replica reports is up to a beat old. Its load is what it reported, and what this gateway has sent or
seen end since; a version sent there counts as being there until reports can be expected to know better.

A replica that is not ready, that was lost, or that has not been heard of for ``stale`` seconds gets nothing,
and neither does one of another base model. A new one is the home of its share at once, but what is in memory
elsewhere stays there; ``moves`` says, a few at a time, what it should load so that its share comes over
without a storm.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from heapq import nlargest

from server.fleet.rendezvous import hashed, score

READY = "ready"
ASKED_REMEMBERED = 16_384  # versions whose demand is remembered
LOOK_AT = 1_024  # of those, the most that are looked at for one answer of ``moves``
HALF_LIFE_S = 30.0  # after which a request counts half as demand


@dataclass(frozen=True, slots=True)
class Rules:
    """``slack`` bounds a replica's load, as a multiple of its share of everything under way.

    Below ``calm``, a part of what it can run at once, a replica has room whatever its share is: with few
    requests under way, being one above the mean is no reason for a load. ``stale`` and ``loading`` are
    seconds: how long a replica may be silent, and how long after a request was sent there a version counts as
    being loaded. ``moves`` bounds the loads without a request, for each replica and call.
    """

    slack: float = 1.25
    calm: float = 0.125
    stale: float = 6.0
    loading: float = 6.0
    moves: int = 4


@dataclass(frozen=True, slots=True)
class Report:
    """What a replica says of itself with each beat. ``number`` grows with each; one seen before says nothing
    new.

    ``base`` is the fingerprint of its base model, and ``kind`` all that must be equal for an answer to go on
    elsewhere (base, engine's version, dtype). ``running`` counts sequences and ``queued`` requests, of all
    gateways; ``busy_slots`` the slots with something running. ``in_slots`` and ``in_host`` name versions
    as ``candidates`` is asked for them; one in a slot may be named in both.
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


@dataclass(frozen=True, slots=True)
class Move:
    """Load ``version`` into a slot of ``replica``, where nobody waits for it yet."""

    version: str
    replica: str


class _Where(IntEnum):
    """The nearer, the lower."""

    SLOT = 0
    HOST = 1
    LOADING = 2
    ELSEWHERE = 3


@dataclass(slots=True, eq=False)
class _Replica:
    """One replica as this gateway knows it. ``own`` counts sequences, ``versions`` requests of this
    gateway."""

    report: Report
    heard: float
    hash: int
    lost: bool = False
    own: int = 0
    own_at_beat: int = 0
    versions: Counter[str] = field(default_factory=Counter)
    sent_at: OrderedDict[str, float] = field(default_factory=OrderedDict)
    where: dict[str, _Where] = field(default_factory=dict)

    @property
    def load(self) -> int:
        """Sequences under way, as far as is known."""
        reported = self.report.running + self.report.queued
        return max(self.own, reported + self.own - self.own_at_beat)

    @property
    def has_slot(self) -> bool:
        """Whether there is a slot that nothing runs in."""
        return max(self.report.busy_slots, len(self.versions)) < self.report.gpu_slots

    def tier(self, version: str, now: float, loading: float) -> _Where:
        """Where ``version`` is as far as this replica is concerned."""
        where = self.where.get(version)
        if where is not None:
            return where
        sent = self.sent_at.get(version)
        under_way = version in self.versions or (sent is not None and now - sent <= loading)
        return _Where.LOADING if under_way else _Where.ELSEWHERE

    def score(self, version: int) -> float:
        """How much ``version`` (hashed) belongs here; in proportion to what can run here."""
        return score(version, self.hash, self.report.max_running)


class Placement:
    """All replicas, and what was asked for lately. ``base`` is the fingerprint of the model to be served.

    Without ``base``, that of most ready replicas. ``now`` is in seconds of a clock that never goes back.
    """

    def __init__(self, rules: Rules | None = None, *, base: str | None = None) -> None:
        self.rules = rules or Rules()
        self.base = base
        self._replicas: dict[str, _Replica] = {}
        self._asked: OrderedDict[str, tuple[float, float]] = OrderedDict()  # version -> demand, as of when

    def __repr__(self) -> str:
        shown = (
            f"{name}: {replica.report.state}{' (lost)' if replica.lost else ''}, load {replica.load},"
            f" {len(replica.report.in_slots)} in slots"
            for name, replica in sorted(self._replicas.items())
        )
        return f"Placement({'; '.join(shown)})"

    # --- what happened ---------------------------------------------------------------------------------

    def beat(self, now: float, report: Report) -> None:
        """What a replica reported. One that was lost is back with its next new beat."""
        known = self._replicas.get(report.replica)
        if known is None:
            known = self._replicas[report.replica] = _Replica(report, now, hashed(report.replica))
        elif report.number == known.report.number:
            return
        known.report, known.heard, known.lost = report, now, False
        known.own_at_beat = known.own
        known.where = dict.fromkeys(report.in_host, _Where.HOST) | dict.fromkeys(report.in_slots, _Where.SLOT)
        while known.sent_at and now - next(iter(known.sent_at.values())) > self.rules.loading:
            known.sent_at.popitem(last=False)

    def lost(self, replica: str) -> None:
        """It could not be reached: it gets nothing until it is heard of again."""
        if replica in self._replicas:
            self._replicas[replica].lost = True

    def forget(self, replica: str) -> None:
        """It is gone for good."""
        self._replicas.pop(replica, None)

    def sent(self, now: float, version: str | None, replica: str, sequences: int = 1) -> None:
        """A request goes to ``replica``. Tell ``ended`` of it once, with the same arguments."""
        known = self._replicas.get(replica)
        if known is not None:
            known.own += sequences
        if version is None:
            return
        demand, since = self._asked.pop(version, (0.0, now))
        self._asked[version] = (demand * _decay(now - since) + sequences, now)
        if len(self._asked) > ASKED_REMEMBERED:
            self._asked.popitem(last=False)
        if known is not None:
            known.versions[version] += 1
            known.sent_at[version] = now
            known.sent_at.move_to_end(version)

    def ended(self, version: str | None, replica: str, sequences: int = 1) -> None:
        """A request that was sent to ``replica`` has ended there, in any way."""
        known = self._replicas.get(replica)
        if known is None:
            return
        known.own = max(0, known.own - sequences)
        if version is not None:
            known.versions[version] -= 1
            if known.versions[version] <= 0:
                del known.versions[version]

    # --- what follows ----------------------------------------------------------------------------------

    def ready(self, now: float, like: str | None = None) -> list[str]:
        """The replicas that may be sent something, by name; with ``like``, those of that one's kind."""
        return [replica.report.replica for replica in self._able(now, like)]

    def candidates(self, version: str | None, now: float, *, like: str | None = None) -> list[str]:
        """Where a request for ``version`` (None: the base model) may go, the best first; empty if nowhere.

        With ``like``, only replicas on which an answer that has begun at that one can go on.
        """
        able = self._able(now, like)
        if version is None:
            return [each.report.replica for each in sorted(able, key=_by_load)]
        bound = self._bound(able)
        key = hashed(version)

        def rank(replica: _Replica) -> tuple[bool, float, float]:
            tier = replica.tier(version, now, self.rules.loading)
            if self._has_room(replica, bound, tier):
                return False, tier, -replica.score(key)
            return True, replica.load / replica.report.max_running, tier

        return [each.report.replica for each in sorted(able, key=rank)]

    def homes(self, version: str, now: float) -> list[str]:
        """The replicas that hold ``version``, or are loading it, by name."""
        loading = self.rules.loading
        return [
            replica.report.replica
            for replica in self._able(now)
            if replica.tier(version, now, loading) is not _Where.ELSEWHERE
        ]

    def moves(self, now: float) -> list[Move]:
        """What to load where, so that replicas with less than their share get more of it.

        A version that is held elsewhere and belongs to such a replica rather than to its homes. Once it is
        there, the hash's order sends its requests there and the old home gives it up. The most wanted first.
        """
        able = self._able(now)
        share = sum(each.load for each in able) / max(1, sum(each.report.max_running for each in able))
        idle = [each for each in able if each.load * self.rules.slack < share * each.report.max_running]
        left = {each.report.replica: self.rules.moves for each in idle if each.has_slot}
        found: list[Move] = []
        for version in self._wanted(now) if left else ():
            target = self._better_home(version, now, able, idle)
            if target is not None and left.get(target.report.replica, 0):
                left[target.report.replica] -= 1
                found.append(Move(version, target.report.replica))
        return found

    def pins(self, versions: Iterable[str], now: float) -> Mapping[str, list[str]]:
        """Which replica keeps which of the pinned ``versions`` in its slots: each on one, spread by its
        slots.

        The same on every gateway that knows the same replicas, and nearly the same when one comes or goes.
        """
        able = self._able(now)
        wanted = sorted(set(versions))
        slots = sum(each.report.gpu_slots for each in able)
        kept: dict[str, list[str]] = {each.report.replica: [] for each in able}
        for version in wanted if able else ():
            key = hashed(version)
            for replica in sorted(able, key=lambda each: -each.score(key)):
                most = math.ceil(self.rules.slack * len(wanted) * replica.report.gpu_slots / slots)
                if len(kept[replica.report.replica]) < most:
                    kept[replica.report.replica].append(version)
                    break
        return kept

    # --- decisions -------------------------------------------------------------------------------------

    def _able(self, now: float, like: str | None = None) -> list[_Replica]:
        known = self._replicas.get(like) if like is not None else None
        if like is not None and known is None:
            return []
        able = [
            replica
            for _, replica in sorted(self._replicas.items())
            if replica.report.state == READY
            and not replica.lost
            and now - replica.heard <= self.rules.stale
            and (known is None or replica.report.kind == known.report.kind)
        ]
        base = self.base
        if base is None and able:
            count = Counter(replica.report.base for replica in able)
            base = min(count, key=lambda each: (-count[each], each))
        return [replica for replica in able if replica.report.base == base]

    def _bound(self, able: Collection[_Replica]) -> float:
        """The most that a replica may have under way, as a part of what it can run at once."""
        load = sum(replica.load for replica in able) + 1
        room = max(1, sum(replica.report.max_running for replica in able))
        return max(self.rules.slack * load / room, self.rules.calm)

    def _has_room(self, replica: _Replica, bound: float, tier: _Where) -> bool:
        if tier is not _Where.SLOT and not replica.has_slot:
            return False
        return replica.load + 1 <= max(1.0, bound * replica.report.max_running)

    def _wanted(self, now: float) -> Iterator[str]:
        """What was asked for lately, the most wanted first."""
        demand = {version: part * _decay(now - since) for version, (part, since) in self._asked.items()}
        yield from nlargest(LOOK_AT, demand, key=demand.__getitem__)

    def _better_home(
        self, version: str, now: float, able: Collection[_Replica], idle: Collection[_Replica]
    ) -> _Replica | None:
        """Of the ``idle``, the one to which ``version`` belongs more than to any that holds it."""
        homes = [each for each in able if each.tier(version, now, self.rules.loading) is not _Where.ELSEWHERE]
        if not homes:
            return None
        key = hashed(version)
        best = max((each for each in idle), key=lambda each: each.score(key), default=None)
        if best is None or best in homes or any(each.score(key) > best.score(key) for each in homes):
            return None
        return best


def _by_load(replica: _Replica) -> tuple[float, str]:
    return replica.load / max(1, replica.report.max_running), replica.report.replica


def _decay(seconds: float) -> float:
    return math.exp2(-seconds / HALF_LIFE_S)
