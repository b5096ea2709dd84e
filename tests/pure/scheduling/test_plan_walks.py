"""The plan against a simulated engine: random walks, that nobody starves, and shares."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from server.scheduling.nouns import Ask, Capacity, Refusal
from tests.support.simulated_engine import NEVER, SECONDS_PER_TOKEN, Chances, Sent, World

# --- random walks --------------------------------------------------------------------------------

WALKS = [
    (
        1,
        Capacity(
            gpu_slots=1,
            host_slots=1,
            max_running=1,
            max_queued=6,
            slot_patience=0.5,
            preempt_after=2.0,
            queue_timeout=NEVER,
        ),
    ),
    (
        2,
        Capacity(
            gpu_slots=1, host_slots=2, max_running=3, max_queued=6, slot_patience=1.0, queue_timeout=20.0
        ),
    ),
    (3, Capacity(gpu_slots=2, host_slots=2, max_running=4, max_staging=1, max_queued=6, queue_timeout=NEVER)),
    (
        4,
        Capacity(
            gpu_slots=2,
            host_slots=3,
            max_running=5,
            max_queued=8,
            slot_patience=0.3,
            preempt_after=0.5,
            queue_timeout=NEVER,
        ),
    ),
    (
        5,
        Capacity(
            gpu_slots=3,
            host_slots=6,
            max_running=8,
            max_staging=3,
            max_queued=8,
            preempt_after=0.0,
            queue_timeout=15.0,
        ),
    ),
    (
        8,
        Capacity(gpu_slots=6, host_slots=9, max_running=8, max_queued=8, queue_timeout=15.0, slot_ranks=128),
    ),
    (
        6,
        Capacity(
            gpu_slots=1, host_slots=1, max_running=4, max_queued=6, slot_patience=1.0, queue_timeout=10.0
        ),
    ),
]
TENANTS = ["ada", "bob", "cyd", "dee"]
VERSIONS = [f"{tenant}/{n}" for tenant in TENANTS for n in range(3)]


class Walker:
    """Does anything that may happen, in any order."""

    def __init__(self, seed: int, limits: Capacity) -> None:
        self.rng = random.Random(seed)
        chances = Chances(0.05, 0.05, 0.05, stage_seconds=(0.01, 1.5), activation_seconds=(0.001, 0.3))
        self.world = World(limits, self.rng, chances)
        self.outcomes: Counter[str] = Counter()
        self.submitted = 0
        self._ids = itertools.count()
        self._pause = 0.2
        self._next_mood = 0

    def walk(self, events: int) -> None:
        while self.world.events < events:
            if self.world.events >= self._next_mood:
                self._next_mood += 2000
                self._pause = self.rng.choice([0.03, 0.1, 0.3, 1.0])
            self._act()
            self.world.run_until(self.world.now + self.rng.expovariate(1 / self._pause))
            self._collect()

    def come_to_rest(self) -> float:
        """With nothing new and no failures; how many seconds it took, for each open request."""
        self.world.chances = Chances()
        start, left = self.world.now, len(self.world.open())
        self.world.run_to_rest()
        self._collect()
        return (self.world.now - start) / max(1, left)

    def _collect(self) -> None:
        self.outcomes.update(sent.outcome for sent in self.world.forget_ended())

    def _act(self) -> None:
        world, rng = self.world, self.rng
        version = rng.choice(VERSIONS)
        tenant = version.split("/")[0]
        action = rng.random()
        if action < 0.80:
            self._submit(version, tenant)
        elif action < 0.90:
            if waiting_or_running := world.open():
                world.cancel(rng.choice(waiting_or_running))
        elif action < 0.901:
            # With preempt_after at 0, those put aside would then take the slot from each other for ever.
            if not world.plan._stopped and world.limits.preempt_after:
                world.lose_engine()
        elif action < 0.92:
            there = sorted(world.host.keys() - world.staging - world.activating)
            if there:
                world.lose(rng.choice(there))
        elif action < 0.95:
            world.carry_out(world.plan.pin(world.now, version, rng.random() < 0.4, tenant))
        elif action < 0.97:
            world.carry_out(world.plan.retire(world.now, version))
        elif action < 0.985:
            world.warming.add(version)
            world.carry_out(world.plan.warm(world.now, version, rng.random() < 0.5))
        elif action < 0.99:
            world.warming.discard(version)
            world.carry_out(world.plan.unwarm(world.now, version))
        else:
            world.tick()

    def _submit(self, version: str, tenant: str) -> None:
        rng = self.rng
        self.submitted += 1
        ask = Ask(
            id=str(next(self._ids)),
            tenant=tenant,
            version=None if rng.random() < 0.1 else version,
            prompt_tokens=rng.randrange(40),
            max_tokens=80,
            sequences=rng.choice([1, 1, 1, 1, 2, self.world.limits.max_running + 1]),
            weight={"ada": 4.0, "bob": 0.5}.get(tenant, 1.0),
            max_queued=3 if tenant == "cyd" else None,
            max_running=2 if tenant == "dee" else None,
            resumable=rng.random() < 0.8,
        )
        self.world.submit(ask, tokens=rng.choice([1, 5, 20, 80]))


@pytest.mark.parametrize(("seed", "limits"), WALKS, ids=[f"seed{seed}" for seed, _ in WALKS])
def test_random_walk(seed: int, limits: Capacity) -> None:
    walker = Walker(seed, limits)
    walker.walk(10_000)
    seconds_each = walker.come_to_rest()

    longest = 80 * SECONDS_PER_TOKEN
    assert seconds_each < 2 * limits.slot_patience + longest
    assert not walker.world.open(), f"left over: {walker.world.plan!r}"
    assert sum(walker.outcomes.values()) == walker.submitted
    assert walker.world.plan.next_deadline() is None
    assert walker.outcomes["finished"] > 500
    assert walker.world.preempted > 50 or limits.preempt_after >= 10
    assert walker.world.plan.snapshot().preemptions == walker.world.preempted
    expected = {"finished", "cancelled", Refusal.QUEUE_FULL, Refusal.ADAPTER_UNAVAILABLE}
    if limits.queue_timeout < NEVER:
        expected.add(Refusal.QUEUE_TIMEOUT)
    assert walker.world.life > 1 or not limits.preempt_after
    assert set(walker.outcomes) - {"lost", Refusal.QUARANTINED} == expected


# --- nobody starves ------------------------------------------------------------------------------


class Customer:
    """Sends the next request when the last one is answered."""

    def __init__(
        self, world: World, name: str, tenant: str, version: str | None, tokens: tuple[int, int]
    ) -> None:
        self.world, self.name, self.tenant, self.version, self.tokens = world, name, tenant, version, tokens
        self.sent: list[Sent] = []

    def send(self, **kwargs: float) -> None:
        ask = Ask(
            id=f"{self.name}-{len(self.sent)}",
            tenant=self.tenant,
            version=self.version,
            prompt_tokens=20,
            max_tokens=self.tokens[1],
            **kwargs,
        )
        tokens = self.world.rng.randint(*self.tokens)
        self.sent.append(self.world.submit(ask, tokens, done=lambda: self.send(**kwargs)))

    def served(self) -> float:
        """Tokens, as its tenant's counter should see them."""
        return sum(s.ask.prompt_tokens + 3 + 2 * s.produced for s in self.sent if s.ran_at is not None)


def waited(sent: Sent) -> float:
    assert sent.ran_at is not None, f"{sent.ask.id} never ran"
    return sent.ran_at - sent.at


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("host_slots_more", [0, 4])
@pytest.mark.parametrize("shared", [True, False], ids=["one tenant", "many tenants"])
def test_a_cold_adapter_among_hot_ones_runs_soon(slots: int, host_slots_more: int, shared: bool) -> None:
    limits = Capacity(gpu_slots=slots, host_slots=slots + host_slots_more, max_running=16)
    world = World(limits, random.Random(11), check_everything=False)
    for client in range(16):
        n = client % slots
        Customer(world, f"c{client}", "t" if shared else f"t{n}", f"hot{n}", (10, 60)).send()
    for at in (20.0, 60.0, 100.0):
        world.run_until(at)
        cold = world.submit(Ask(f"cold{at}", "t" if shared else "cold", f"cold{at}", 20, 10), 10)
        world.run_until(at + 20)

        longest = 60 * SECONDS_PER_TOKEN
        assert waited(cold) <= 2 * limits.slot_patience + longest


def test_many_hot_adapters_take_turns_in_few_slots() -> None:
    limits = Capacity(gpu_slots=2, host_slots=4, max_running=16)
    world = World(limits, random.Random(12), check_everything=False)
    customers = [Customer(world, f"c{n}", f"t{n % 6}", f"v{n % 6}", (10, 60)) for n in range(24)]
    for customer in customers:
        customer.send()
    world.run_until(300.0)

    answered = [sum(s.outcome == "finished" for s in customer.sent) for customer in customers]
    assert min(answered) > 0.7 * max(answered)
    longest = 60 * SECONDS_PER_TOKEN
    turns = 6 / 2
    worst = max(waited(s) for customer in customers for s in customer.sent if s.ran_at is not None)
    assert worst <= turns * (limits.slot_patience + longest)


def test_a_large_request_is_not_starved_by_small_ones() -> None:
    limits = Capacity(gpu_slots=1, host_slots=1, max_running=8)
    world = World(limits, random.Random(13), check_everything=False)
    for client in range(24):
        Customer(world, f"c{client}", f"t{client}", None, (10, 60)).send()
    world.run_until(20.0)
    large = world.submit(Ask("large", "large", None, 20, 10, sequences=8), 10)
    world.run_until(40.0)

    longest = 60 * SECONDS_PER_TOKEN
    assert waited(large) <= limits.slot_patience + 2 * longest


# --- shares --------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [False, True], ids=["base model", "adapters"])
def test_backlogged_tenants_are_served_by_weight(adapters: bool) -> None:
    limits = Capacity(gpu_slots=3, host_slots=3, max_running=6)
    world = World(limits, random.Random(21), check_everything=False)
    weights = {"a": 4.0, "b": 2.0, "c": 1.0}
    customers: dict[str, list[Customer]] = {}
    for tenant, weight in weights.items():
        tokens = {"a": (5, 15), "b": (20, 60), "c": (10, 30)}[tenant]
        customers[tenant] = [
            Customer(world, f"{tenant}{n}", tenant, tenant if adapters else None, tokens) for n in range(12)
        ]
        for customer in customers[tenant]:
            customer.send(weight=weight)
    world.run_until(600.0)

    per_weight = {t: sum(c.served() for c in cs) / weights[t] for t, cs in customers.items()}
    mean = sum(per_weight.values()) / 3
    assert all(abs(share / mean - 1) < 0.1 for share in per_weight.values()), per_weight


def test_a_tenant_that_floods_the_engine_delays_others_by_one_answer() -> None:
    limits = Capacity(gpu_slots=2, host_slots=2, max_running=4)
    world = World(limits, random.Random(22), check_everything=False)
    for client in range(200):
        Customer(world, f"noisy{client}", "noisy", "loud", (10, 60)).send()
    quiet = []
    for n in range(30):
        world.run_until(10.0 + 10 * n)
        quiet.append(world.submit(Ask(f"quiet{n}", "quiet", "soft", 20, 60), 30))
    world.run_until(400.0)

    longest = 60 * SECONDS_PER_TOKEN
    assert max(waited(sent) for sent in quiet) <= longest
    assert sum(waited(sent) for sent in quiet) / 30 <= longest / 4


def test_a_tenant_that_floods_the_slots_delays_others_by_a_few_turns() -> None:
    limits = Capacity(gpu_slots=4, host_slots=8, max_running=32)
    world = World(limits, random.Random(23), check_everything=False)
    for client in range(100):
        Customer(world, f"noisy{client}", "noisy", f"loud{client}", (10, 60)).send()
    quiet = []
    for n in range(30):
        world.run_until(20.0 + 10 * n)
        quiet.append(world.submit(Ask(f"quiet{n}", "quiet", f"soft{n % 3}", 20, 60), 30))
    world.run_until(400.0)

    longest = 60 * SECONDS_PER_TOKEN
    assert max(waited(sent) for sent in quiet) <= 2 * limits.slot_patience + longest
