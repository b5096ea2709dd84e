"""A fleet's routing at full size: the real placement and the real plan of every replica, in virtual time.

    traffic ──▶ gateways, each with a Router ──▶ replicas: Plan + a simulated engine
                     ▲                                        │
                     └────────────── beats ───────────────────┘

An engine gives every running sequence one token in each step, and a step takes longer the more run. The
gateways know of a replica what its last beat said and what they sent themselves.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from adapters.model import Tier
from server.fleet.placement import Placement
from server.fleet.rendezvous import hashed, score
from server.fleet.reports import Report
from server.scheduling.nouns import Activate, Ask, Capacity, Effect, Preempt, Refuse, Run, Stage
from server.scheduling.plan import Plan
from tests.bench.workload import gamma_arrivals, log_normal_lengths, zipf

LONGEST = 256  # output tokens
BEAT_S = 2.0
MOVE_S = 0.2
WIRE_S = 0.05  # from a replica's report to the gateways
HOT = 32  # adapters that change their popularity at once
BASE, KIND = "base", "kind"


@dataclass(frozen=True, slots=True)
class Engine:
    """One replica. ``stage`` and ``activate`` are seconds for a load from the store into host memory and from
    there into a slot; a step takes ``step`` and ``step_each`` for every sequence.
    """

    gpu_slots: int = 64
    host_slots: int = 1_024
    max_running: int = 256
    max_staging: int = 8
    stage: float = 0.1
    activate: float = 0.005
    step: float = 0.02
    step_each: float = 0.0001


@dataclass(frozen=True, slots=True)
class Crowd:
    """What is asked for: ``rate`` requests a second for each replica, by Zipf with exponent 1 over
    ``adapters``.

    The times between two have coefficient of variation ``cv``. Every ``moves`` seconds, if given, the 32 most
    popular adapters become unpopular ones, and others take their places. What came before ``warm`` seconds is
    not counted. With ``shared_counters`` replicas learn what others have served a tenant.
    """

    replicas: int = 8
    adapters: int = 10_000
    tenants: int = 500
    rate: float = 50.0
    cv: float = 2.0
    seconds: float = 60.0
    warm: float = 30.0
    moves: float | None = None
    gateways: int = 2
    shared_counters: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One arrival."""

    id: str
    at: float
    tenant: str
    version: str
    input_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Outcome:
    """What was seen after the warm-up. ``first_token`` is in seconds, ``hits`` counts requests whose version
    was in memory at its replica when they came, ``slot_hits`` those whose version was in a slot.
    """

    requests: int = 0
    refused: int = 0
    hits: int = 0
    slot_hits: int = 0
    loads: int = 0
    placed: int = 0
    moved: int = 0
    first_token: list[float] = field(default_factory=list)
    produced: Counter[str] = field(default_factory=Counter)  # tokens by replica
    served: Counter[str] = field(default_factory=Counter)  # tokens by tenant


class Router(Protocol):
    """What a gateway asks, and tells."""

    placement: Placement

    def choose(self, version: str, now: float) -> str:
        """The replica for a request."""


@dataclass(slots=True)
class Placed:
    """Loraplex's own."""

    placement: Placement

    def choose(self, version: str, now: float) -> str:
        return self.placement.candidates(version, now)[0]


@dataclass(slots=True)
class LeastLoaded:
    """The smallest number of requests under way; knows nothing of adapters."""

    placement: Placement

    def choose(self, version: str, now: float) -> str:
        return self.placement.candidates(None, now)[0]


@dataclass(slots=True)
class Random:
    """Any."""

    placement: Placement
    rng: random.Random = field(default_factory=lambda: random.Random(1))

    def choose(self, version: str, now: float) -> str:
        return self.rng.choice(self.placement.ready(now))


@dataclass(slots=True)
class Rendezvous:
    """The hash alone, without a bound."""

    placement: Placement

    def choose(self, version: str, now: float) -> str:
        key = hashed(version)
        return max(self.placement.ready(now), key=lambda name: score(key, hashed(name), 1.0))


ROUTERS: dict[str, Callable[[Placement], Router]] = {
    "placement": Placed,
    "least loaded": LeastLoaded,
    "random": Random,
    "rendezvous": Rendezvous,
}


@dataclass(slots=True)
class _Sent:
    request: Request
    gateway: int
    counted: bool
    running: bool = False


class Replica:
    """A plan, and an engine that does what the plan says after the time it takes."""

    def __init__(self, name: str, world: Fleet) -> None:
        engine = world.engine
        self.name = name
        self.world = world
        self.plan = Plan(
            Capacity(
                gpu_slots=engine.gpu_slots,
                host_slots=engine.host_slots,
                max_running=engine.max_running,
                max_staging=engine.max_staging,
            )
        )
        self.sent: dict[str, _Sent] = {}
        self.running = 0
        self.beats = 0
        self._warming: defaultdict[str, list[Placement]] = defaultdict(list)
        self._tick_at: float | None = None

    def submit(self, request: Request, gateway: int, counted: bool) -> None:
        outcome, tier = self.world.outcome, self.plan.tier_of(request.version)
        if counted:
            outcome.requests += 1
            outcome.hits += tier is not Tier.DISK
            outcome.slot_hits += tier is Tier.GPU
        self.sent[request.id] = _Sent(request, gateway, counted)
        ask = Ask(
            request.id,
            request.tenant,
            request.version,
            request.input_tokens,
            LONGEST,
            elsewhere=self.world.served_elsewhere(request.tenant, self.name),
        )
        self.carry_out(self.plan.submitted(self.world.now, ask))

    def warm(self, version: str, placement: Placement) -> None:
        """Loads ``version``, and tells who asked when it has a slot."""
        self._warming[version].append(placement)
        self.carry_out(self.plan.warm(self.world.now, version, True))
        self._told()

    def _told(self) -> None:
        for version in [each for each in self._warming if self.plan.tier_of(each) is Tier.GPU]:
            for placement in self._warming.pop(version):
                placement.loaded(self.world.now, version, self.name)

    def report(self) -> Report:
        self.beats += 1
        seen = self.plan.snapshot()
        engine = self.world.engine
        return Report(
            self.name,
            self.beats,
            base=BASE,
            kind=KIND,
            state="ready",
            gpu_slots=engine.gpu_slots,
            max_running=engine.max_running,
            running=self.running,
            queued=sum(seen.queued.values()),
            busy_slots=sum(bool(slot.running) for slot in seen.slots),
            in_slots=frozenset(slot.version for slot in seen.slots if slot.version is not None),
            in_host=frozenset(entry.version for entry in seen.host if entry.tier is Tier.HOST),
            room=engine.host_slots,
        )

    def carry_out(self, effects: Sequence[Effect]) -> None:
        engine = self.world.engine
        for effect in effects:
            match effect:
                case Stage(version, load_id):
                    self.world.loaded(self.name, version)
                    self._later(engine.stage, lambda id_=load_id: self.plan.staged(self.world.now, id_))
                case Activate(_, load_id):
                    self._later(engine.activate, lambda id_=load_id: self._activated(id_))
                case Run(id_):
                    self._run(self.sent[id_])
                case Preempt(id_):
                    self._later(0.001, lambda i=id_: self.plan.preempt_refused(self.world.now, i))
                case Refuse(id_):
                    self._end(self.sent[id_], refused=True)
        self._arrange_tick()

    def _activated(self, load_id: int) -> Sequence[Effect]:
        effects = self.plan.activated(self.world.now, load_id)
        self._told()
        return effects

    def _run(self, sent: _Sent) -> None:
        self.running += 1
        sent.running = True
        step = self.world.engine.step + self.world.engine.step_each * self.running
        request, outcome = sent.request, self.world.outcome
        if sent.counted:
            outcome.first_token.append(self.world.now + step - request.at)

        def half() -> Sequence[Effect]:
            tokens = request.output_tokens // 2
            return self.plan.progressed(self.world.now, request.id, request.input_tokens, tokens)

        def end() -> Sequence[Effect]:
            now, tokens = self.world.now, request.output_tokens
            effects = list(self.plan.progressed(now, request.id, request.input_tokens, tokens))
            self.running -= 1
            self._end(sent)
            return effects + list(self.plan.finished(now, request.id))

        self._later(step * request.output_tokens / 2, half)
        self._later(step * request.output_tokens, end)

    def _end(self, sent: _Sent, *, refused: bool = False) -> None:
        request, outcome = sent.request, self.world.outcome
        del self.sent[request.id]
        self.world.routers[sent.gateway].placement.ended(request.version, self.name)
        if self.world.now >= self.world.crowd.warm:
            outcome.refused += refused
            if not refused:
                outcome.produced[self.name] += request.output_tokens
                outcome.served[request.tenant] += request.output_tokens

    def _later(self, seconds: float, event: Callable[[], Sequence[Effect]]) -> None:
        self.world.later(seconds, lambda: self.carry_out(event()))

    def _arrange_tick(self) -> None:
        deadline = self.plan.next_deadline()
        if deadline is None or (self._tick_at is not None and self._tick_at <= deadline):
            return
        self._tick_at = deadline

        def tick() -> None:
            if self._tick_at == deadline:
                self._tick_at = None
                self.carry_out(self.plan.tick(self.world.now))

        self.world.later(max(0.0, deadline - self.world.now), tick)


class Fleet:
    """Time is a heap of what comes."""

    def __init__(self, crowd: Crowd, engine: Engine, router: str) -> None:
        self.crowd, self.engine = crowd, engine
        self.outcome = Outcome()
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()
        self._instant = False
        self._served: dict[str, dict[str, float]] = {}
        self._placed: defaultdict[str, set[str]] = defaultdict(set)
        self.routers = [ROUTERS[router](Placement()) for _ in range(crowd.gateways)]
        self.replicas: dict[str, Replica] = {}
        for number in range(crowd.replicas):
            self.join(f"replica-{number}", number / crowd.replicas * BEAT_S)

    def join(self, name: str, first_beat: float = 0.0) -> None:
        """A replica announces itself, and beats from then on."""
        replica = self.replicas[name] = Replica(name, self)
        for router in self.routers:
            router.placement.beat(self.now, replica.report())
        self.later(first_beat, lambda: self._beat(replica))

    def remember(self, versions: Sequence[str]) -> None:
        """As if each of ``versions`` had been asked for once, the last one most recently."""
        self._instant = True
        for number, version in enumerate(versions):
            router = self.routers[number % len(self.routers)]
            replica = self.replicas[router.choose(version, self.now)]
            replica.carry_out(replica.plan.warm(self.now, version, True))
        self._instant = False
        for router in self.routers:
            if isinstance(router, Placed):
                self.later(MOVE_S, lambda placement=router.placement: self._move(placement))
        for replica in self.replicas.values():
            report = replica.report()
            for router in self.routers:
                router.placement.beat(self.now, report)

    def run(self, requests: Iterator[Request]) -> Outcome:
        """Everything that happens until the last of ``requests`` has come."""
        for number, request in enumerate(requests):
            self.run_until(request.at)
            self._send(request, number % len(self.routers))
        self.outcome.placed = sum(map(len, self._placed.values()))
        return self.outcome

    def run_until(self, end: float) -> None:
        """Let everything happen that happens up to ``end``."""
        while self._heap and self._heap[0][0] <= end:
            self.now, _, event = heapq.heappop(self._heap)
            event()
        self.now = end

    def later(self, seconds: float, event: Callable[[], None]) -> None:
        """``event`` happens in so many seconds."""
        if self._instant:
            event()
            return
        heapq.heappush(self._heap, (self.now + seconds, next(self._serial), event))

    def loaded(self, replica: str, version: str) -> None:
        """A replica reads a version from the store."""
        self._placed[replica].add(version)
        if self.now >= self.crowd.warm:
            self.outcome.loads += 1

    def served_elsewhere(self, tenant: str, replica: str) -> float:
        """By all others, as they said with their last beats."""
        if not self.crowd.shared_counters:
            return 0.0
        return sum(said.get(tenant, 0.0) for name, said in self._served.items() if name != replica)

    def _send(self, request: Request, gateway: int) -> None:
        router = self.routers[gateway]
        name = router.choose(request.version, self.now)
        router.placement.sent(self.now, request.version, name)
        self.replicas[name].submit(request, gateway, request.at >= self.crowd.warm)

    def _beat(self, replica: Replica) -> None:
        report = replica.report()
        if self.crowd.shared_counters:
            self._served[replica.name] = replica.plan.served()
        for router in self.routers:
            self.later(WIRE_S, lambda placement=router.placement: placement.beat(self.now, report))
        self.later(BEAT_S, lambda: self._beat(replica))

    def _move(self, placement: Placement) -> None:
        for move in placement.moves(self.now):
            self.outcome.moved += 1
            self.replicas[move.replica].warm(move.version, placement)
        self.later(MOVE_S, lambda: self._move(placement))


class Traffic:
    """The requests of a crowd, and which adapters it wants most."""

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd
        self._rng = random.Random(crowd.seed)
        self._adapters = list(range(crowd.adapters))  # the most popular first
        self._rng.shuffle(self._adapters)

    def versions(self) -> list[str]:
        """The most popular first, as things are now."""
        return [_version(self._crowd, adapter) for adapter in self._adapters]

    def requests(self) -> Iterator[Request]:
        """In order of arrival."""
        crowd, rng, moved = self._crowd, self._rng, 0
        rows = zip(
            gamma_arrivals(crowd.rate * crowd.replicas, crowd.cv, rng),
            zipf(crowd.adapters, 1.0, rng),
            log_normal_lengths(64, 0.8, 1024, rng),
            log_normal_lengths(32, 0.6, LONGEST, rng),
            strict=False,
        )
        for number, (at, rank, input_tokens, output_tokens) in enumerate(rows):
            if at > crowd.seconds:
                return
            while crowd.moves and at > crowd.moves * (moved + 1):
                moved += 1
                self._move()
            version = _version(crowd, self._adapters[rank])
            yield Request(str(number), at, version.split("/")[0], version, input_tokens, output_tokens)

    def _move(self) -> None:
        adapters = self._adapters
        for hot in range(min(HOT, len(adapters))):
            other = self._rng.randrange(len(adapters))
            adapters[hot], adapters[other] = adapters[other], adapters[hot]


def _version(crowd: Crowd, adapter: int) -> str:
    return f"tenant-{adapter % crowd.tenants}/a{adapter}@x"


def simulate(crowd: Crowd, engine: Engine, router: str) -> Outcome:
    """One fleet under one crowd, routed by one of ``ROUTERS``."""
    traffic, fleet = Traffic(crowd), Fleet(crowd, engine, router)
    fleet.remember(traffic.versions()[::-1])
    return fleet.run(traffic.requests())


def alone(crowd: Crowd) -> Crowd:
    """One engine with its share of the load: of the requests, and of the adapters."""
    return replace(crowd, replicas=1, gateways=1, adapters=max(1, crowd.adapters // crowd.replicas))
