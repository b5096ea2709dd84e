"""That nobody who waits for places is passed for ever, however many gateways ask and whoever leaves."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from server.accounts.terms import KeyLimits
from server.limits.line import Line, Waits
from server.limits.rate import RateMeter

AGAIN = 0.1


@dataclass(eq=False)
class Request:
    id: str
    came: float
    wanted: int
    passed: set[str] = field(default_factory=set)  # the younger ones that got places since it was refused
    older: bool = False  # whether one that came before it was met since then


class World:
    """Gateways that share a meter, each with a line of which the first one asks."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.now = rng, 0.0
        self.most = rng.choice((2, 4, 8))
        self.meter = RateMeter()
        self.lines = [deque[Request]() for _ in range(rng.choice((2, 3)))]
        self.running: list[tuple[float, Request]] = []
        self.refused: set[Request] = set()
        self.waits = dict[str, float]()
        self.number = 0

    def comes(self, gateway: int, wanted: int) -> None:
        self.number += 1
        self.lines[gateway].append(Request(f"{self.number:05}", self.now, min(wanted, self.most)))

    def looks(self, gateway: int) -> bool:
        """Whether the first one there has got its places."""
        if not self.lines[gateway]:
            return False
        one = self.lines[gateway][0]
        waits = Waits(one.id, self.now - one.came, 3 * AGAIN)
        limits = KeyLimits(tokens_per_minute=self.most)
        if self.meter.check(limits, one.wanted, self.now, waits) is not None:
            assert not one.passed or one.older, f"{one} was passed by {one.passed}, and waits still"
            one.passed, one.older = set(), False
            for other in self.refused:
                other.older |= one.came < other.came and one not in self.refused
            self.refused.add(one)
            return False
        self.meter.begin(one.wanted, self.now, waits)
        assert self.meter.reserved <= self.most
        self.lines[gateway].popleft()
        self.refused.discard(one)
        for other in self.refused:
            if one.came > other.came:
                other.passed.add(one.id)
            other.older |= one.came < other.came
        self.running.append((self.now + self.rng.uniform(0.05, 1.0), one))
        self.waits[one.id] = self.now - one.came
        return True

    def goes_on(self, seconds: float) -> None:
        self.now += seconds
        for ends, one in [each for each in self.running if each[0] <= self.now]:
            self.running.remove((ends, one))
            self.meter.use(0, one.wanted, self.now)
            self.meter.end()

    def all_look(self) -> None:
        """In some order, within a beat; who got places lets the next one look at once."""
        for gateway in self.rng.sample(range(len(self.lines)), len(self.lines)):
            self.goes_on(self.rng.uniform(0, AGAIN / len(self.lines)))
            while self.looks(gateway):
                pass


@pytest.mark.parametrize("seed", range(30))
def test_nobody_is_passed_and_then_refused(seed: int) -> None:
    rng = random.Random(seed)
    world = World(rng)
    for _ in range(400):
        for gateway in range(len(world.lines)):
            if len(world.lines[gateway]) < 4 and rng.random() < 0.7:
                world.comes(gateway, rng.choice((1, 1, 1, 1, 2, 3, 99)))
        match rng.random():
            case chance if chance < 0.02:  # a gateway dies, and what waits there is not heard of again
                gone = world.lines[rng.randrange(len(world.lines))]
                world.refused -= set(gone)
                for other in world.refused:
                    other.older = True
                gone.clear()
            case chance if chance < 0.1 and (line := rng.choice(world.lines)):  # its client leaves
                world.meter.line.leave(line[0].id)
                world.refused.discard(line.popleft())
        world.all_look()
    while any(world.lines) or world.running:
        world.goes_on(AGAIN)
        world.all_look()
    assert world.meter.reserved == world.meter.running == 0


@pytest.mark.parametrize("seed", range(10))
def test_a_large_one_gets_its_places_beside_another_gateways_small_ones(seed: int) -> None:
    """As many small ones as come, so that never all of the places are free by themselves."""
    world = World(random.Random(seed))
    for _ in range(world.most):
        world.comes(1, 1)
    world.all_look()
    world.comes(0, 99)
    (large,) = world.lines[0]
    world.goes_on(0.001)
    for _ in range(100):
        for _ in range(world.most):
            world.comes(1, 1)
        world.all_look()
    # What got its places before the first look of it ends within a second, and the look after that finds it.
    assert world.waits[large.id] < 1.0 + 3 * AGAIN


def test_who_is_not_heard_of_again_is_forgotten() -> None:
    line = Line()
    line.wait(Waits("a", waited=2.0, again=0.5), 3, 10.0)
    line.wait(Waits("b", waited=1.0, again=0.5), 1, 10.0)
    young = Waits("c", waited=0.0, again=0.5)
    assert line.ahead(young, 10.4) == 4
    assert line.ahead(Waits("b", waited=1.4, again=0.5), 10.4) == 3
    assert line.ahead(Waits("d", waited=3.0, again=0.5), 10.4) == 0, "longest of all"
    line.wait(Waits("b", waited=1.4, again=0.5), 1, 10.4)
    assert line.ahead(young, 10.6) == 1, "a has not asked again"
    assert str(line) == "<Line [(9.0, 1)]>"
    line.leave("b")
    assert line.ahead(young, 10.6) == 0
    line.wait(Waits("e", waited=0.0, again=0.5), 1, 9e9)
    assert line.ahead(young, 20.0) == 0, "the clock went back"
