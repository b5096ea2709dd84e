"""Which replica a request goes to. Pure: it is told what happened and when, and answers; it calls nothing.

    beat, lost, forget   what is known of a replica
    sent, ended          what this gateway has under way there
    candidates           where a request goes, best first
    moves, pins          what to load where without a request

A version goes where it is in a slot, then where it is in host memory, then where it was sent lately (it is
being loaded there), else where rendezvous hashing puts it, so that gateways that never talk agree. Among
several replicas of one kind the hash decides too, not the load: traffic collects on few homes.

Loads are bounded (Mirrokni, Thorup and Zadimoghaddam, "Consistent hashing with bounded loads", 2018): a
replica with more than ``slack`` times its share of everything under way comes after all others that hold the
version. Where none of those has room, a hot version gets another home, the next in its hash's order:
``moves`` has it loaded before anybody waits for it, and with ``most`` times the share at each of its homes a
request goes elsewhere at once. Moving a version that is not hot would cost a load and take one request away.
When a version cools down, its first home has room again and gets all of it, and the other engine lets it go
as the least recently used: cold homes are given up.

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
from collections.abc import Collection, Iterable, Mapping
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
    """``slack`` and ``most`` bound a replica's load, as multiples of its share of everything under way; past
    the first, others that hold a version are preferred, past the second, all others with room are.

    Below ``calm``, a part of what it can run at once, a replica has room whatever its share is: with few
    requests under way, being one above the mean is no reason for a load. ``hot`` is the demand, in requests
    that count half after ``HALF_LIFE_S``, from which a version is worth another home. ``stale`` and
    ``loading`` are seconds: how long a replica may be silent, and how long after a request was sent there a
    version counts as being loaded. ``moves`` bounds the loads without a request, for each replica and call.
    """

    slack: float = 1.25
    most: float = 2.0
    hot: float = 8.0
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

    @property
    def part(self) -> float:
        """Its load, as a part of what it can run at once."""
        return self.load / max(1, self.report.max_running)

    def takes(self, bound: float) -> bool:
        """Whether one more stays within ``bound``, a part of what it can run at once."""
        return self.load + 1 <= max(1.0, bound * self.report.max_running)

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
        self._base = base
        self._able_now: list[_Replica] = []
        self._able_until = -math.inf
        self._replicas: dict[str, _Replica] = {}
        self._asked: OrderedDict[str, tuple[float, float]] = OrderedDict()  # version -> demand, as of when

    @property
    def base(self) -> str | None:
        """Replicas of another base model get nothing; None leaves the choice to the most."""
        return self._base

    @base.setter
    def base(self, base: str | None) -> None:
        self._base = base
        self._changed()

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
        self._changed()
        known.report, known.heard, known.lost = report, now, False
        known.own_at_beat = known.own
        known.where = dict.fromkeys(report.in_host, _Where.HOST) | dict.fromkeys(report.in_slots, _Where.SLOT)
        while known.sent_at and now - next(iter(known.sent_at.values())) > self.rules.loading:
            known.sent_at.popitem(last=False)

    def lost(self, replica: str) -> None:
        """It could not be reached: it gets nothing until it is heard of again."""
        if replica in self._replicas:
            self._replicas[replica].lost = True
            self._changed()

    def forget(self, replica: str) -> None:
        """It is gone for good."""
        self._replicas.pop(replica, None)
        self._changed()

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
        soft, hard = self._bounds(able)
        key = hashed(version)

        def rank(replica: _Replica) -> tuple[int, float, float]:
            tier = replica.tier(version, now, self.rules.loading)
            held = tier is not _Where.ELSEWHERE
            slot = tier is _Where.SLOT or replica.has_slot
            if slot and replica.takes(soft):
                return (0 if held else 2), tier, -replica.score(key)
            if held and replica.takes(hard):
                return (1 if slot else 3), replica.part, -replica.score(key)
            return 4, replica.part, tier

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
        """What to load where without a request, the most wanted first. To be asked about once a second.

        A version all of whose homes are at their bound gets another one. A replica with less than its share
        gets versions that belong to it rather than to their homes; once they are there, the hash's order
        sends their requests there, and the old homes give them up.
        """
        able = self._able(now)
        soft, _ = self._bounds(able)
        share = _part(able)
        left = {each: self.rules.moves for each in able if each.has_slot and each.part <= share}
        found: list[Move] = []
        for version, demand in self._wanted(now):
            target = self._new_home(version, demand, now, able, list(left), soft)
            if target is not None:
                found.append(Move(version, target.report.replica))
                left[target] -= 1
                if not left[target]:
                    del left[target]
            if not left:
                break
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
        """Those that may be sent something, by name."""
        if now > self._able_until:
            self._able_now = self._find_able(now)
            heard = min((each.heard for each in self._able_now), default=math.inf)
            self._able_until = heard + self.rules.stale
        if like is None:
            return self._able_now
        known = self._replicas.get(like)
        kind = None if known is None else known.report.kind
        return [each for each in self._able_now if each.report.kind == kind]

    def _find_able(self, now: float) -> list[_Replica]:
        able = [
            replica
            for _, replica in sorted(self._replicas.items())
            if replica.report.state == READY and not replica.lost and now <= replica.heard + self.rules.stale
        ]
        base = self._base
        if base is None and able:
            count = Counter(replica.report.base for replica in able)
            base = min(count, key=lambda each: (-count[each], each))
        return [replica for replica in able if replica.report.base == base]

    def _changed(self) -> None:
        """Who may be sent something has to be found anew."""
        self._able_until = -math.inf

    def _bounds(self, able: Collection[_Replica]) -> tuple[float, float]:
        """The most that a replica may have under way, as a part of what it can run at once: before others
        that hold a version come first, and before others come first that would have to load it.
        """
        share, rules = _part(able, 1), self.rules
        return max(rules.slack * share, rules.calm), max(rules.most * share, rules.calm)

    def _wanted(self, now: float) -> list[tuple[str, float]]:
        """What was asked for lately with its demand, the most wanted first."""
        demand = {version: part * _decay(now - since) for version, (part, since) in self._asked.items()}
        return nlargest(LOOK_AT, demand.items(), key=lambda item: item[1])

    def _new_home(
        self,
        version: str,
        demand: float,
        now: float,
        able: Collection[_Replica],
        targets: Collection[_Replica],
        soft: float,
    ) -> _Replica | None:
        """Of ``targets``, the one to which ``version`` belongs most, if it should be loaded there."""
        loading = self.rules.loading
        homes = [each for each in able if each.tier(version, now, loading) is not _Where.ELSEWHERE]
        others = [each for each in targets if each not in homes]
        if not homes or not others:
            return None
        key = hashed(version)
        best = max(others, key=lambda each: each.score(key))
        crowded = demand >= self.rules.hot and not any(each.takes(soft) for each in homes)
        idle = best.part * self.rules.slack < _part(able)
        belongs = idle and all(best.score(key) > each.score(key) for each in homes)
        return best if crowded or belongs else None


def _by_load(replica: _Replica) -> tuple[float, str]:
    return replica.part, replica.report.replica


def _part(replicas: Collection[_Replica], more: int = 0) -> float:
    """All that is under way, and so many sequences more, as a part of what can run at once."""
    room = sum(each.report.max_running for each in replicas)
    return (sum(each.load for each in replicas) + more) / max(1, room)


def _decay(seconds: float) -> float:
    return math.exp2(-seconds / HALF_LIFE_S)
