"""Which replica a request goes to. Pure: it is told what happened and when, and answers; it calls nothing.

    beat, lost, forget       what is known of a replica
    sent, ended, loaded      what this gateway has under way there, and had loaded there
    candidates               where a request goes, best first
    moves, pins              what to load where without a request

A version goes where it is in a slot, then where it is in host memory, then where it was sent lately (it is
being loaded there), else where rendezvous hashing puts it, among the replicas whose memory has room, so that
gateways that never talk agree and nothing is loaded to push out what is wanted. Among several homes that have
no more than their share the hash decides, not the load: traffic collects on few homes.

Loads are bounded (Mirrokni, Thorup and Zadimoghaddam, "Consistent hashing with bounded loads", 2018): beyond
its share a replica comes after other homes of the version that have less, beyond ``slack`` times its share
after all others. Where every home is beyond that, ``moves`` names as many new homes as take the excess off,
beginning with the version that weighs most. Nobody waits for them: a home that can run one more at once, in
however large a batch, keeps its requests until the version is in memory elsewhere. One that cannot gives them
away at once.

A second home costs a load that no version needed, and so does a change of home. They are spent from a stock,
see ``server.fleet.spare``; where it is empty a request stays with its home until that has ``most`` times its
share. When a version cools down, its first home has room again and gets all of it, and the other engine lets
it go as the least recently used: cold homes are given up.

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
from dataclasses import dataclass
from heapq import nlargest

from server.fleet.rendezvous import hashed
from server.fleet.reports import READY, Report, Resident, Where, by_load, full_part, part_of
from server.fleet.spare import Spare

ASKED_REMEMBERED = 16_384  # versions whose demand is remembered
LOOK_AT = 1_024  # of those, the most that are looked at for one answer of ``moves``
LOOK_AT_HOME = 8  # versions of one replica, the ones with most under way
SHARES_EVERY_S = 1.0  # how often ``moves`` looks at who belongs where
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
    ``spare`` is the part of the versions in memory that may be loaded beside what each needs, in a minute.
    A new version goes to one whose memory is at most ``spread`` times as full as all memory together.
    """

    slack: float = 1.25
    most: float = 2.0
    hot: float = 8.0
    calm: float = 0.125
    stale: float = 6.0
    loading: float = 6.0
    moves: int = 4
    spare: float = 0.05
    spread: float = 1.1


@dataclass(frozen=True, slots=True)
class Move:
    """Load ``version`` into a slot of ``replica``, where nobody waits for it yet."""

    version: str
    replica: str


class Placement:
    """All replicas, and what was asked for lately. ``base`` is the fingerprint of the model to be served.

    Without ``base``, that of most ready replicas. ``now`` is in seconds of a clock that never goes back.
    """

    def __init__(self, rules: Rules | None = None, *, base: str | None = None) -> None:
        self.rules = rules or Rules()
        self._base = base
        self._able_now: list[Resident] = []
        self._able_until = -math.inf
        self._replicas: dict[str, Resident] = {}
        self._asked: OrderedDict[str, tuple[float, float]] = OrderedDict()  # version -> demand, as of when
        self._places: Counter[str] = Counter()  # version -> replicas that have it in memory
        self._spare = Spare(self.rules.spare)
        self._shares_due = -math.inf

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
            known = self._replicas[report.replica] = Resident(report, now, hashed(report.replica))
        elif report.number == known.report.number:
            return
        self._changed()
        had = known.where
        known.beat(now, report, self.rules.loading)
        self._count_places(had, known.where)

    def lost(self, replica: str) -> None:
        """The replica could not be reached: it is sent nothing until it is heard of again."""
        if replica in self._replicas:
            self._replicas[replica].lost = True
            self._changed()

    def forget(self, replica: str) -> None:
        """It is gone for good."""
        gone = self._replicas.pop(replica, None)
        if gone is not None:
            self._count_places(gone.where, {})
        self._changed()

    def sent(self, now: float, version: str | None, replica: str, sequences: int = 1) -> None:
        """A request goes to ``replica``. Tell ``ended`` of it once, with the same arguments."""
        self._spare.earn(sequences)
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
            loading = self.rules.loading
            if known.tier(version, now, loading) is Where.ELSEWHERE and self.homes(version, now):
                self._spare.spend(known.loads_for_one)
            known.versions[version] += 1
            known.sent(now, version)

    def loaded(self, now: float, version: str, replica: str) -> None:
        """A call that had it loaded says that it is in memory there: reports will say so too."""
        known = self._replicas.get(replica)
        if known is not None:
            known.sent(now, version)
            if version not in known.where:
                known.where[version] = Where.SLOT
                known.coming.discard(version)
                self._places[version] += 1

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
            return [each.report.replica for each in sorted(able, key=by_load)]
        even, soft, hard = self._bounds(able)
        key, loading = hashed(version), self.rules.loading
        tiers = {each: each.tier(version, now, loading) for each in able}
        homed = any(tier is not Where.ELSEWHERE for tier in tiers.values())
        fair = self.rules.spread * full_part(able)
        may_spend = [self._may_spend(now, able, loads) for loads in (1, 2)]

        def rank(replica: Resident) -> tuple[int, float, float]:
            tier = tiers[replica]
            slot = tier is Where.SLOT or replica.has_slot
            if slot and tier < Where.LOADING:
                if replica.takes(even):
                    return 0, tier, -replica.score(key)
                if replica.takes(soft):
                    return 1, replica.part, -replica.score(key)
                if replica.takes(1.0):  # at once, and nobody waits for a load
                    return 2, replica.part, -replica.score(key)
            if slot and replica.takes(soft):
                if tier is Where.LOADING:
                    return 3, 0.0, -replica.score(key)
                if not homed or may_spend[replica.loads_for_one - 1]:
                    full = not replica.has_room or replica.is_fuller(fair)
                    return (5 if full else 4), not replica.has_room, -replica.score(key)
            if tier is not Where.ELSEWHERE and replica.takes(hard):
                return 6, replica.part, -replica.score(key)
            return 7, replica.part, tier

        return [each.report.replica for each in sorted(able, key=rank)]

    def homes(self, version: str, now: float) -> list[str]:
        """The replicas that hold ``version``, or are loading it, by name."""
        return [replica.report.replica for replica in self._homes(version, now, self._able(now))]

    def moves(self, now: float) -> list[Move]:
        """What to load where without a request; they count as being loaded. To be asked a few times a second.

        A replica beyond its bound gives versions of its own another home, those with most under way first.
        Once a second one with less than its share gets versions that belong to it rather than to their homes;
        once they are there, the hash's order sends their requests there, and the old homes give them up.
        """
        able = self._able(now)
        share = part_of(able)
        left = {each: self.rules.moves for each in able if each.has_slot and each.part <= share}
        found: list[Move] = []
        for version, target, spent in self._named(now, able, left):
            if spent:
                self._spare.spend(target.loads_for_one)
            target.sent(now, version)
            found.append(Move(version, target.report.replica))
            left[target] -= 1
            if not left[target]:
                del left[target]
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

    def _able(self, now: float, like: str | None = None) -> list[Resident]:
        """The replicas that may be sent requests, by name."""
        if now > self._able_until:
            self._able_now = self._find_able(now)
            heard = min((each.heard for each in self._able_now), default=math.inf)
            self._able_until = heard + self.rules.stale
        if like is None:
            return self._able_now
        known = self._replicas.get(like)
        kind = None if known is None else known.report.kind
        return [each for each in self._able_now if each.report.kind == kind]

    def _find_able(self, now: float) -> list[Resident]:
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

    def _count_places(self, had: Mapping[str, Where], has: Mapping[str, Where]) -> None:
        for version in had.keys() - has.keys():
            self._places[version] -= 1
            if not self._places[version]:
                del self._places[version]
        self._places.update(has.keys() - had.keys())

    def _homes(self, version: str, now: float, able: Iterable[Resident]) -> list[Resident]:
        loading = self.rules.loading
        return [each for each in able if each.tier(version, now, loading) is not Where.ELSEWHERE]

    def _may_spend(self, now: float, able: Collection[Resident], loads: int = 1) -> bool:
        """Whether so many loads may be spent that no version needs."""
        return self._spare.has(now, loads, replicas=len(able), versions=len(self._places))

    def _bounds(self, able: Collection[Resident]) -> tuple[float, float, float]:
        """The most that a replica may have under way, as a part of what it can run at once: before the load
        decides between the homes of a version, before others come first that hold it, and before others come
        first that would have to load it.
        """
        share, rules = part_of(able, 1), self.rules
        return (
            max(share, rules.calm),
            max(rules.slack * share, rules.calm),
            max(rules.most * share, rules.calm),
        )

    def _wanted(self, now: float) -> list[tuple[str, float]]:
        """What was asked for lately with its demand, the most wanted first."""
        demand = {version: part * _decay(now - since) for version, (part, since) in self._asked.items()}
        return nlargest(LOOK_AT, demand.items(), key=lambda item: item[1])

    def _named(
        self, now: float, able: Collection[Resident], targets: Mapping[Resident, int]
    ) -> Iterator[tuple[str, Resident, bool]]:
        """Versions, where to load them, and whether that is spent; ``targets`` may still be named."""
        _, soft, _ = self._bounds(able)
        for crowded in sorted(able, key=lambda each: -each.part):
            if not crowded.takes(soft):
                yield from self._relief(crowded, now, able, targets, soft)
        if targets and now >= self._shares_due:
            self._shares_due = now + SHARES_EVERY_S
            yield from self._shares(now, able, targets)

    def _relief(
        self,
        crowded: Resident,
        now: float,
        able: Collection[Resident],
        targets: Mapping[Resident, int],
        soft: float,
    ) -> Iterator[tuple[str, Resident, bool]]:
        """New homes for versions of ``crowded``, until what is beyond its bound has somewhere to go."""
        bound = soft * crowded.report.max_running
        excess = crowded.load + 1 - bound
        if excess <= 0.5 * math.sqrt(bound):  # it may be chance, and pass
            return
        for version, _ in crowded.versions.most_common(LOOK_AT_HOME):
            if excess <= 0:
                return
            homes = self._homes(version, now, able)
            if crowded not in homes:
                continue
            under_way = sum(each.count(version) for each in homes)
            wanted = self._homes_for(version, now, homes, under_way, soft)
            for _ in range(wanted - len(homes)):
                others = [each for each in targets if each not in homes]
                if not others:
                    break
                key = hashed(version)
                best = max(others, key=lambda each: (each.has_room, each.score(key)))
                if not self._may_spend(now, able, best.loads_for_one):
                    break
                yield version, best, True
                homes.append(best)
            excess -= max(0.0, crowded.count(version) - under_way / len(homes))

    def _homes_for(
        self, version: str, now: float, homes: Collection[Resident], under_way: float, soft: float
    ) -> int:
        """How many homes so much of a version needs; at most twice as many as it has."""
        demand, since = self._asked.get(version, (0.0, now))
        if demand * _decay(now - since) < self.rules.hot:
            return len(homes)
        loading = self.rules.loading
        for each in homes:
            tier = each.tier(version, now, loading)
            if tier is Where.LOADING or (each.takes(soft) and (tier is Where.SLOT or each.has_slot)):
                return len(homes)  # one that is coming, or has room, takes some first
        room = soft * sum(each.report.max_running for each in homes) / len(homes)
        return max(len(homes) + 1, min(2 * len(homes), math.ceil(under_way / room)))

    def _shares(
        self, now: float, able: Collection[Resident], targets: Mapping[Resident, int]
    ) -> Iterator[tuple[str, Resident, bool]]:
        """What belongs to those that have less than their share, of requests and of versions.

        One with less than half of it, as a new one has, gets them whatever is left to spend.
        """
        mean, load = sum(each.held for each in able) / max(1, len(able)), part_of(able)
        slack = self.rules.slack

        def poor(each: Resident) -> bool:
            return each.has_room and each.part * slack < load and each.held * slack < mean

        for version, _ in self._wanted(now) if any(map(poor, targets)) else ():
            others = [each for each in targets if poor(each)]
            if not others:
                return
            homes = self._homes(version, now, able)
            key = hashed(version)
            best = max(others, key=lambda each: each.score(key))
            if not homes or any(each.score(key) >= best.score(key) for each in homes):
                continue
            free = 2 * best.held < mean
            if free or self._may_spend(now, able):
                yield version, best, not free


def _decay(seconds: float) -> float:
    return math.exp2(-seconds / HALF_LIFE_S)
