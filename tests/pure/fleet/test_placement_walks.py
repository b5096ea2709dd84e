"""Laws that hold whatever happens to replicas, requests and reports, by random walks."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from server.fleet.placement import Placement, Report, Rules

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
        moves = placement.moves(self.now)
        assert len(set(moves)) == len(moves)
        for move in moves:
            assert move.replica in able
            assert move.replica not in placement.homes(move.version, self.now)
            assert placement.homes(move.version, self.now), "what nobody holds waits for a request"
        assert all(n <= Rules().moves for n in Counter(move.replica for move in moves).values())
        pins = placement.pins(VERSIONS[:7], self.now)
        kept = [each for versions in pins.values() for each in versions]
        assert sorted(kept) == (sorted(VERSIONS[:7]) if able else [])
        for name, truth in self.truth.items():
            known = placement._replicas[name]
            sent = [each for each, at in self.open if at == name]
            assert known.own == len(sent) <= known.load
            assert known.versions == Counter(each for each in sent if each is not None)
            assert truth.number == known.report.number

    def check_order(self, version: str, found: list[str]) -> None:
        """Who holds it and has room comes before everybody who would have to load it."""
        placement = self.placement
        soft, _ = placement._bounds(placement._able(self.now))
        homes = placement.homes(version, self.now)
        roomy = [name for name in homes if self._in_slot(name, version) and self._takes(name, soft)]
        assert set(found[: len(roomy)]) >= set(roomy) or not roomy
        assert not roomy or found[0] in roomy

    def _in_slot(self, name: str, version: str) -> bool:
        return version in self.placement._replicas[name].report.in_slots

    def _takes(self, name: str, bound: float) -> bool:
        return self.placement._replicas[name].takes(bound)


@pytest.mark.parametrize("seed", range(12))
def test_laws_hold_on_every_walk(seed: int) -> None:
    walk = Walk(seed)
    for _ in range(400):
        walk.step()


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
