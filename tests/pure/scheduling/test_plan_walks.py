"""The plan against a simulated engine, which has laws of its own and breaks a test that violates one."""

from __future__ import annotations

import heapq
import itertools
import math
import random
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from server.scheduling.evidence import WINDOW
from server.scheduling.nouns import (
    Activate,
    Ask,
    Capacity,
    Deactivate,
    Effect,
    Evict,
    Preempt,
    Quarantine,
    Refusal,
    Refuse,
    Run,
    Stage,
    Suspect,
    Warmed,
)
from server.scheduling.plan import Plan

NEVER = 1e9
SECONDS_PER_TOKEN = 0.05


@dataclass
class Sent:
    """A request as the simulation knows it; ``outcome`` is set once."""

    ask: Ask
    at: float
    tokens: int
    state: str = "waiting"
    outcome: str = ""
    ran_at: float | None = None
    done: Callable[[], None] | None = None
    load: int | None = None
    produced: int = 0
    stays: int = 0  # times it was in the engine; the last one since then, with so many tokens produced before
    since: float = 0.0
    at_first: int = 0

    def end(self, outcome: str) -> None:
        assert not self.outcome, f"{self.ask.id}: {self.outcome}, then {outcome}"
        self.state, self.outcome = "ended", outcome


@dataclass
class Chances:
    """How often the engine fails, and how long its work takes in seconds."""

    stage_fails: float = 0.0
    activation_fails: float = 0.0
    preemption_fails: float = 0.0
    stage_seconds: tuple[float, float] = (0.05, 0.1)
    activation_seconds: tuple[float, float] = (0.005, 0.01)


@dataclass
class World:
    """An engine that carries out effects and enforces its caps; time is a heap of what comes."""

    limits: Capacity
    rng: random.Random
    chances: Chances = field(default_factory=Chances)
    check_everything: bool = True
    now: float = 0.0

    def __post_init__(self) -> None:
        self.plan = Plan(self.limits)
        self.sent: dict[str, Sent] = {}
        self.host: dict[int, str] = {}
        self.staging: set[int] = set()
        self.warming: set[str] = set()
        self.slots: set[int] = set()
        self.activating: set[int] = set()
        self.seen_loads: set[int] = set()
        self.counters: dict[str, float] = {}
        self.queued: Counter[str] = Counter()
        self.sequences = 0
        self.preempted = 0
        self.events = 0
        self._heap: list[tuple[float, int, Callable[[], Sequence[Effect]]]] = []
        self._serial = itertools.count()
        self.life = 1
        self.suspects: frozenset[str] = frozenset()
        self.quarantined: list[str] = []
        self.losses: list[tuple[float, set[str | None]]] = []

    # --- time ------------------------------------------------------------------------------------

    def later(self, seconds: float, event: Callable[[], Sequence[Effect]]) -> None:
        heapq.heappush(self._heap, (self.now + seconds, next(self._serial), event))

    def run_until(self, end: float) -> None:
        """Let everything happen that happens up to ``end``, ticks when the plan wants them."""
        while (at := min(self._next_event(), self._deadline())) <= end:
            assert at >= self.now, "time goes back"
            self.now = at
            if self._deadline() == at:
                self.tick()
                assert self._deadline() > at, "a tick left its own deadline standing"
            else:
                _, _, event = heapq.heappop(self._heap)
                self.carry_out(event())
        self.now = end

    def run_to_rest(self) -> None:
        while (at := min(self._next_event(), self._deadline())) < NEVER:
            self.run_until(at)

    def tick(self) -> None:
        self.carry_out(self.plan.tick(self.now))

    def _next_event(self) -> float:
        return self._heap[0][0] if self._heap else math.inf

    def _deadline(self) -> float:
        deadline = self.plan.next_deadline()
        return math.inf if deadline is None else deadline

    # --- what happens ----------------------------------------------------------------------------

    def submit(self, ask: Ask, tokens: int, done: Callable[[], None] | None = None) -> Sent:
        sent = self.sent[ask.id] = Sent(ask, self.now, tokens, done=done)
        self.queued[ask.tenant] += 1
        self.carry_out(self.plan.submitted(self.now, ask))
        return sent

    def cancel(self, sent: Sent) -> None:
        effects = self.plan.cancelled(self.now, sent.ask.id)
        self._leave(sent, "cancelled")
        self.carry_out(effects)

    def lose(self, load_id: int) -> None:
        """The worker forgets a load; what runs on it goes on, as in vLLM."""
        del self.host[load_id]
        self.slots.discard(load_id)
        self.carry_out(self.plan.lost(self.now, load_id))

    def lose_engine(self) -> None:
        """It is back after some seconds. What cannot go on ends then, or when its reader gets to it."""
        self.life += 1
        before, ran, kept = self.suspects, set(), []
        for sent in [sent for sent in self.open() if sent.state == "running"]:
            sent.stays += 1
            if sent.load is not None:
                ran.add(sent.ask.version)
            if sent.ask.resumable:
                kept.append(sent.ask.id)
                sent.state = "aside"
                self.queued[sent.ask.tenant] += 1
                self.sequences -= sent.ask.sequences
            else:
                sent.load, sent.state = None, "lost"
                self.later(self.rng.uniform(0, 4), lambda sent=sent: self._end_lost(sent))
        for held in (self.host, self.slots, self.staging, self.activating):
            held.clear()
        self.quarantined.clear()
        self.carry_out(self.plan.engine_stopped(self.now, kept))
        self.losses = [(at, there) for at, there in self.losses if at > self.now - WINDOW] + [(self.now, ran)]
        assert ran & before <= set(self.quarantined)
        assert len(set(self.quarantined) - before) <= 1
        for version in set(self.quarantined) - before:
            assert len(self.losses) > 1
            assert all(version in there for _, there in self.losses), "it was away at one"
        self.losses = [(at, there) for at, there in self.losses if there.isdisjoint(self.quarantined)]
        assert self.suspects == ran - set(self.quarantined)
        self.later(self.rng.uniform(0.2, 2), lambda: self.plan.engine_started(self.now))

    def _end_lost(self, sent: Sent) -> Sequence[Effect]:
        if sent.outcome:
            return []
        effects = self.plan.finished(self.now, sent.ask.id, completed=False)
        self._leave(sent, "lost")
        return effects

    def carry_out(self, effects: Sequence[Effect]) -> None:
        self.events += 1
        for effect in effects:
            match effect:
                case Stage(version, load_id):
                    self._stage(version, load_id)
                case Activate(version, load_id):
                    self._activate(version, load_id)
                case Deactivate(version, load_id):
                    assert load_id in self.slots - self.activating
                    assert not self._runs_on(load_id)
                    self.slots.remove(load_id)
                case Evict(version, load_id):
                    assert load_id not in self.slots | self.staging
                    assert not self._runs_on(load_id)
                    assert self.host.pop(load_id) == version
                case Run(id_):
                    self._run(self.sent[id_])
                case Preempt(id_):
                    self._preempt(self.sent[id_])
                case Refuse(id_, reason, after):
                    sent = self.sent[id_]
                    known = reason in (Refusal.ADAPTER_UNAVAILABLE, Refusal.QUARANTINED)
                    assert sent.state == "waiting" or known
                    assert after is None or 1 <= after <= 60
                    self._leave(sent, reason.value)
                case Warmed(version, refusal):
                    self.warming.remove(version)
                    staged = {v for id_, v in self.host.items() if id_ not in self.staging}
                    assert refusal is not None or version in staged
                case Suspect(versions):
                    self.suspects = versions
                case Quarantine(version):
                    self.quarantined.append(version)
        if self.check_everything:
            self._check()

    # --- the engine ------------------------------------------------------------------------------

    def ranks_of(self, version: str) -> int:
        """What its adapter takes of slots that are shared: half of them are as wide as a slot."""
        return 8 if not self.limits.slot_ranks else (8, 16, 64, 64)[zlib.crc32(version.encode()) % 4]

    def _stage(self, version: str, load_id: int) -> None:
        assert load_id not in self.seen_loads
        assert version not in self.host.values()
        self.seen_loads.add(load_id)
        self.host[load_id] = version
        self.staging.add(load_id)
        assert len(self.host) <= self.limits.host_slots
        assert len(self.staging) <= self.limits.max_staging
        fails = self.rng.random() < self.chances.stage_fails

        life = self.life

        def answer() -> Sequence[Effect]:
            if life != self.life:
                return []
            self.staging.remove(load_id)
            if not fails:
                return self.plan.staged(self.now, load_id, 1000, self.ranks_of(version))
            del self.host[load_id]
            return self.plan.stage_failed(self.now, load_id, "unreadable")

        self.later(self.rng.uniform(*self.chances.stage_seconds), answer)

    def _activate(self, version: str, load_id: int) -> None:
        assert self.host[load_id] == version
        assert load_id not in self.staging | self.slots
        self.slots.add(load_id)
        self.activating.add(load_id)
        assert len(self.slots) <= self.limits.gpu_slots
        ranks = sum(self.ranks_of(self.host[held]) for held in self.slots)
        assert ranks <= self.limits.slot_ranks or not self.limits.slot_ranks
        fails = self.rng.random() < self.chances.activation_fails

        life = self.life

        def answer() -> Sequence[Effect]:
            if life != self.life:
                return []
            self.activating.remove(load_id)
            if not fails:
                return self.plan.activated(self.now, load_id)
            self.slots.remove(load_id)
            return self.plan.activation_failed(self.now, load_id, "out of memory")

        self.later(self.rng.uniform(*self.chances.activation_seconds), answer)

    def _preempt(self, sent: Sent) -> None:
        assert sent.state == "running"
        assert sent.ask.resumable
        stay = sent.stays
        fails = self.rng.random() < self.chances.preemption_fails

        def answer() -> Sequence[Effect]:
            if sent.state != "running" or sent.stays != stay:
                return []
            if fails:
                return self.plan.preempt_refused(self.now, sent.ask.id)
            sent.state = "aside"
            said = int((self.now - sent.since) / SECONDS_PER_TOKEN) * sent.ask.sequences
            sent.produced = max(sent.produced, min(sent.at_first + said, sent.tokens * sent.ask.sequences))
            self.queued[sent.ask.tenant] += 1
            self.sequences -= sent.ask.sequences
            self.preempted += 1
            prompt = sent.ask.prompt_tokens + 3
            effects = list(self.plan.progressed(self.now, sent.ask.id, prompt, sent.produced))
            return effects + list(self.plan.preempted(self.now, sent.ask.id))

        self.later(self.rng.uniform(0.001, 0.05), answer)

    def _run(self, sent: Sent) -> None:
        assert sent.state in ("waiting", "aside")
        if sent.ran_at is None:
            sent.ran_at = self.now
        sent.state = "running"
        sent.stays += 1
        sent.since, sent.at_first = self.now, sent.produced
        if sent.ask.version is not None:
            usable = [i for i in self.slots - self.activating if self.host[i] == sent.ask.version]
            assert usable, f"{sent.ask.id} runs, but {sent.ask.version} is not active"
            sent.load = usable[0]
            running = {s.ask.version for s in self.open() if s.state == "running" and s.load is not None}
            assert len(running & self.suspects) <= 1, "suspects run together"
        self.queued[sent.ask.tenant] -= 1
        self.sequences += sent.ask.sequences
        alone = self.sequences == sent.ask.sequences
        assert alone or self.sequences <= self.limits.max_running
        self._produce(sent)

    def _produce(self, sent: Sent) -> None:
        """Report in two halves of what is left, then end."""
        total = sent.tokens * sent.ask.sequences
        seconds = (total - sent.produced) / sent.ask.sequences * SECONDS_PER_TOKEN
        half = (total + sent.produced) // 2
        stay = sent.stays

        def report() -> Sequence[Effect]:
            if sent.state != "running" or sent.stays != stay:
                return []
            sent.produced = half
            return self.plan.progressed(self.now, sent.ask.id, sent.ask.prompt_tokens + 3, half)

        def end() -> Sequence[Effect]:
            if sent.state != "running" or sent.stays != stay:
                return []
            sent.produced = total
            effects = list(self.plan.progressed(self.now, sent.ask.id, sent.ask.prompt_tokens + 3, total))
            effects += self.plan.finished(self.now, sent.ask.id)
            self._leave(sent, "finished")
            return effects

        self.later(seconds / 2, report)
        self.later(seconds, end)

    def _leave(self, sent: Sent, outcome: str) -> None:
        if sent.state in ("waiting", "aside"):
            self.queued[sent.ask.tenant] -= 1
        else:
            self.sequences -= sent.ask.sequences
        sent.end(outcome)
        if sent.done is not None:
            self.later(0.0, lambda done=sent.done: done() or [])

    def _runs_on(self, load_id: int) -> bool:
        return any(s.load == load_id and s.state == "running" for s in self.open())

    def open(self) -> list[Sent]:
        return [sent for sent in self.sent.values() if not sent.outcome]

    def forget_ended(self) -> list[Sent]:
        ended = [sent for sent in self.sent.values() if sent.outcome]
        self.sent = {sent.ask.id: sent for sent in self.open()}
        return ended

    def _check(self) -> None:
        self.plan.check()
        seen = self.plan.snapshot()
        assert {entry.load_id for entry in seen.host} == self.host.keys()
        assert {slot.load_id for slot in seen.slots if slot.version} == self.slots
        assert dict(seen.queued) == {t: n for t, n in self.queued.items() if n}
        assert sum(seen.running.values()) == self.sequences
        for tenant, counter in seen.counters.items():  # also of one that was forgotten and came back
            assert counter >= self.counters.get(tenant, 0.0), f"the counter of {tenant} went down"
        self.counters.update(seen.counters)


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
