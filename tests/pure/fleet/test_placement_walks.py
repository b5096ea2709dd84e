"""Laws that hold whatever happens to replicas, requests and reports, by random walks."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from server.fleet.placement import Placement, Rules
from server.fleet.reports import Report, Where

VERSIONS = [f"tenant/a{number}@x" for number in range(40)]
STATES = ["ready"] * 6 + ["draining", "restarting"]


@dataclass
class Truth:
    """A replica as it is; the placement knows what its last report said."""

    number: int = 0
    state: str = "ready"
    base: str = "base"
    kind: str = "kind"
    heard: float = 0.0
    lost: bool = False
    slots: list[str] = field(default_factory=list)
    under_way: Counter[str] = field(default_factory=Counter)


class Walk:
    """One placement, and all that may happen to it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.placement = Placement(base="base")
        self.truth: dict[str, Truth] = {}
        self.open: list[tuple[str | None, str]] = []
        self.now = 0.0
        self.names = 0

    def step(self) -> None:
        self.rng.choice([self.join, self.beat, self.beat, self.beat, self.repeat, self.change, self.lose])()
        self.rng.choice([self.leave, self.wait, self.wait, self.wait])()
        for _ in range(self.rng.randrange(6)):
            self.rng.choice([self.send, self.send, self.end])()
        self.check()

    def join(self) -> None:
        if len(self.truth) < 8:
            self.names += 1
            base = self.rng.choice(["base"] * 5 + ["another"])
            name = f"r{self.names}"
            self.truth[name] = Truth(base=base, kind=self.rng.choice("kl"))
            self.say(name)

    def beat(self) -> None:
        if self.truth:
            self.say(self.rng.choice(list(self.truth)))

    def repeat(self) -> None:
        """The last report of a replica is read once more."""
        if self.truth:
            name = self.rng.choice(list(self.truth))
            self.placement.beat(self.now, self.report(name))

    def change(self) -> None:
        for truth in self.truth.values():
            if self.rng.random() < 0.3:
                truth.state = self.rng.choice(STATES)
                truth.slots = self.rng.sample(VERSIONS, 6)

    def lose(self) -> None:
        if self.truth and self.rng.random() < 0.3:
            name = self.rng.choice(list(self.truth))
            self.truth[name].lost = True
            self.placement.lost(name)

    def leave(self) -> None:
        if self.truth and self.rng.random() < 0.1:
            name = self.rng.choice(list(self.truth))
            del self.truth[name]
            self.placement.forget(name)
            self.open = [(version, at) for version, at in self.open if at != name]

    def wait(self) -> None:
        self.now += self.rng.choice([0.1, 0.5, 2.5])

    def send(self) -> None:
        version = self.rng.choice([None, *VERSIONS])
        found = self.placement.candidates(version, self.now)
        if found:
            self.placement.sent(self.now, version, found[0])
            self.open.append((version, found[0]))

    def end(self) -> None:
        if self.open:
            version, name = self.open.pop(self.rng.randrange(len(self.open)))
            self.placement.ended(version, name)

    def say(self, name: str) -> None:
        truth = self.truth[name]
        truth.number += 1
        truth.heard, truth.lost = self.now, False
        self.placement.beat(self.now, self.report(name))

    def report(self, name: str) -> Report:
        truth = self.truth[name]
        return Report(
            name,
            truth.number,
            truth.base,
            truth.kind,
            truth.state,
            gpu_slots=6,
            max_running=32,
            running=sum(at == name for _, at in self.open),
            in_slots=tuple(truth.slots),
        )

    def check(self) -> None:
        placement = self.placement
        able = {
            name
            for name in self.truth
            if placement._replicas[name].report.state == "ready"
            and self.truth[name].base == "base"
            and not self.truth[name].lost
            and self.now <= self.truth[name].heard + Rules().stale
        }
        version = self.rng.choice(VERSIONS)
        found = placement.candidates(version, self.now)
        assert sorted(found) == sorted(able), "each that may, once, and no other"
        assert found == placement.candidates(version, self.now), "asking changes nothing"
        for name in able:
            kind = self.truth[name].kind
            like = placement.candidates(version, self.now, like=name)
            assert set(like) == {each for each in able if self.truth[each].kind == kind}
        self.check_order(version, found)
        homes = {version: placement.homes(version, self.now) for version in VERSIONS}
        moves = placement.moves(self.now)
        assert len(set(moves)) == len(moves)
        for move in moves:
            assert move.replica in able
            assert move.replica not in homes[move.version]
            assert homes[move.version], "what nobody holds waits for a request"
            assert move.replica in placement.homes(move.version, self.now), "it counts as being loaded"
            if self.rng.random() < 0.5:
                placement.loaded(self.now, move.version, move.replica)
        assert all(n <= Rules().moves for n in Counter(move.replica for move in moves).values())
        pins = placement.pins(VERSIONS[:7], self.now)
        kept = [each for versions in pins.values() for each in versions]
        assert sorted(kept) == (sorted(VERSIONS[:7]) if able else [])
        where = [version for each in placement._replicas.values() for version in each.where]
        assert placement._places == Counter(where)
        for name, truth in self.truth.items():
            known = placement._replicas[name]
            sent = [each for each, at in self.open if at == name]
            assert known.own == len(sent) <= known.load
            assert known.versions == Counter(each for each in sent if each is not None)
            assert truth.number == known.report.number

    def check_order(self, version: str, found: list[str]) -> None:
        """Who holds it and has room comes before everybody who would have to load it."""
        placement = self.placement
        _, soft, _ = placement._bounds(placement._able(self.now))
        homes = placement.homes(version, self.now)
        roomy = [name for name in homes if self._in_slot(name, version) and self._takes(name, soft)]
        assert set(found[: len(roomy)]) >= set(roomy) or not roomy
        assert not roomy or found[0] in roomy

    def _in_slot(self, name: str, version: str) -> bool:
        return self.placement._replicas[name].where.get(version) is Where.SLOT

    def _takes(self, name: str, bound: float) -> bool:
        return self.placement._replicas[name].takes(bound)


@pytest.mark.parametrize("seed", range(12))
def test_laws_hold_on_every_walk(seed: int) -> None:
    walk = Walk(seed)
    for _ in range(400):
        walk.step()


class Memory:
    """Replicas with the memory that they report, the longest unused going first, and requests by Zipf."""

    def __init__(self, seed: int, replicas: int, versions: int, room: int) -> None:
        self.rng = random.Random(seed)
        self.placement = Placement(base="base")
        self.versions = [f"tenant/a{seed}-{number}@x" for number in range(versions)]
        self.weights = [1 / rank for rank in range(1, versions + 1)]
        self.room = room
        self.held: dict[str, list[str]] = {f"r{number}": [] for number in range(replicas)}
        self.open: list[tuple[float, str, str]] = []
        self.numbers = itertools.count(1)
        self.now, self.loads, self.requests = 0.0, 0, 0

    def step(self) -> None:
        self.now += 0.1
        for name in self.held:
            if self.rng.random() < 0.1:  # every second
                self.say(name)
        for until, version, name in [each for each in self.open if each[0] <= self.now]:
            self.placement.ended(version, name)
            self.open.remove((until, version, name))
        for move in self.placement.moves(self.now):
            self.touch(move.replica, move.version)
            self.placement.loaded(self.now, move.version, move.replica)
        for _ in range(self.rng.randrange(3)):
            (version,) = self.rng.choices(self.versions, self.weights)
            name = self.placement.candidates(version, self.now)[0]
            self.placement.sent(self.now, version, name)
            self.touch(name, version)
            self.open.append((self.now + self.rng.expovariate(1.0), version, name))
            self.requests += 1

    def touch(self, name: str, version: str) -> None:
        held = self.held[name]
        if version in held:
            held.remove(version)
        else:
            self.loads += 1
        held.append(version)
        del held[: -self.room]

    def say(self, name: str) -> None:
        running = sum(at == name for _, _, at in self.open)
        self.placement.beat(
            self.now,
            Report(
                name,
                next(self.numbers),
                "base",
                "kind",
                "ready",
                gpu_slots=8,
                max_running=16,
                running=running,
                in_host=tuple(self.held[name]),
                room=self.room,
            ),
        )


@pytest.mark.parametrize("seed", range(8))
def test_loads_are_those_of_each_version_and_what_may_be_spent(seed: int) -> None:
    """Two to eight replicas whose memory holds 1.3 times the versions: 1.1 loads for each, in 20 seconds."""
    replicas = 2 + seed % 4 * 2
    walk = Memory(seed, replicas, versions=20 * replicas, room=26)
    for name in walk.held:
        walk.say(name)
    for version in walk.versions:  # each is asked for once
        name = walk.placement.candidates(version, 0.0)[0]
        walk.placement.sent(0.0, version, name)
        walk.placement.ended(version, name)
        walk.touch(name, version)
    assert walk.loads == len(walk.versions)
    for _ in range(200):
        walk.step()
    assert walk.requests > 150
    most = max(replicas, Rules().spare * len(walk.versions))
    full = 2  # what no home could take
    assert walk.loads <= len(walk.versions) + most * (1 + 20 / 60) + walk.requests / 100 + full
    if replicas == 2:
        assert walk.loads <= 1.1 * len(walk.versions)


def test_every_gateway_that_knows_the_same_says_the_same() -> None:
    """What two gateways have sent themselves moves them apart only as far as bounds are reached."""
    walk = Walk(1)
    for _ in range(100):
        walk.join()
        walk.change()
        walk.beat()
    other = Placement(base="base")
    for name in reversed(list(walk.truth)):
        walk.say(name)
        other.beat(walk.now, walk.report(name))
    walk.open.clear()
    fresh = Placement(base="base")
    for name in walk.truth:
        fresh.beat(walk.now, walk.report(name))
    for version in VERSIONS:
        assert other.candidates(version, walk.now) == fresh.candidates(version, walk.now)
        assert other.pins(VERSIONS, walk.now) == fresh.pins(VERSIONS, walk.now)
