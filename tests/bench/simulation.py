"""Loraplex's own decisions at full size: the real plan and dispatcher, a simulated engine, virtual time.

    traffic ──▶ Dispatcher ──▶ TimedPlan(Plan)
                    │ page, report        │ every event, with the time it took
                    ▼
              SimulatedEngine: one step for all sequences, tokens for each

What is virtual is the time in which requests arrive, run and wait. What a decision takes is real: CPU time of
this thread, which is all that a pure decision can take, and does not depend on what else the machine does.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import random
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adapters.model import Version
from adapters.worker.ranges import RankRanges, width_of
from server.engine.calls import Call, StageResult
from server.errors import TooManyRequests, Unavailable
from server.scheduling.nouns import Ask, Effect
from server.scheduling.plan import Plan
from tests.bench.workload import gamma_arrivals, log_normal_lengths, zipf
from tests.support.clock import run
from tests.support.fakes import Times
from tests.support.world import Pager, World, version

RANK = 64  # of a slot that is shared
RANKS = (8, 8, 8, 16, 16, 32, 64, 1)  # of the adapters there, in turn
LONGEST = 256  # output tokens; what clients ask for, though most answers end earlier


@dataclass(frozen=True, slots=True)
class Machine:
    """The simulated engine: each of its steps gives every running sequence ``tokens`` more.

    ``limits`` are those of the plan's ``Capacity`` that are not the machine's. ``shared``: so many slots of
    ``RANK`` ranks are shared by ``gpu_slots`` adapters of ``RANKS``; 0: each has one of its own.
    """

    gpu_slots: int = 64
    host_slots: int = 512
    max_running: int = 256
    limits: Mapping[str, Any] = field(default_factory=lambda: {"max_staging": 8})
    tokens: int = 1
    shared: int = 0
    times: Times = field(default_factory=lambda: Times(stage=0.1, activate=0.005, step=0.025, page=0.01))


@dataclass(frozen=True, slots=True)
class Traffic:
    """``rate`` is in requests a second, ``cv`` the coefficient of variation of the time between two.

    A request is for one of ``popularity`` adapters, each of one tenant. With fewer ``adapters`` than that,
    several share one, and everything else stays the same: who asks, when, and for how many tokens.
    """

    tenants: int = 1_000
    adapters: int = 10_000
    requests: int = 100_000
    popularity: int = 10_000
    rate: float = 110.0
    cv: float = 4.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    number: int
    at: float
    tenant: str
    adapter: int
    input_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Simulated:
    """``outcomes`` counts requests; waits are in virtual seconds, of those that ran; ``wall`` is real.

    ``seconds`` are those of CPU time of each event of the plan, by its name; ``effects`` counts by class.
    ``placing``: those in which a worker finds an adapter's place in shared slots; ``moves`` made room for it.
    """

    outcomes: Counter[str]
    waits: Sequence[float]
    seconds: dict[str, Sequence[float]]
    effects: Counter[str]
    drains: int
    virtual: float
    wall: float
    placing: Sequence[float] = ()
    moves: int = 0


class TimedPlan:
    """A plan that notes what each of its events takes. An event is what gets ``now`` first."""

    def __init__(self, plan: Plan) -> None:
        self.seconds: dict[str, array[float]] = {}
        self.effects: Counter[str] = Counter()
        self._plan = plan
        for name, method in inspect.getmembers(plan, inspect.ismethod):
            if not name.startswith("_") and next(iter(inspect.signature(method).parameters), "") == "now":
                setattr(self, name, self._timed(name, method))

    def _timed(self, name: str, event: Callable[..., list[Effect]]) -> Callable[..., list[Effect]]:
        seconds = self.seconds[name] = array("d")

        @functools.wraps(event)
        def timed(*arguments: Any) -> list[Effect]:
            began = time.thread_time()
            effects = event(*arguments)
            seconds.append(time.thread_time() - began)
            for effect in effects:
                self.effects[type(effect).__name__] += 1
            return effects

        return timed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plan, name)


@dataclass(slots=True, eq=False)
class _Generation:
    """What ``FakeEngine`` holds as running."""

    call: Call
    load_id: int | None
    input_tokens: int
    limit: int
    ended: asyncio.Future[None]
    produced: int = 0

    def step(self, tokens: int) -> None:
        self.produced = min(self.limit, self.produced + tokens)
        self.settle()
        if self.produced == self.limit:
            self.ended.set_result(None)

    def settle(self) -> None:
        self.call.meter.progressed(self.call.id, self.input_tokens, self.produced, 0)


class SimulatedEngine(Pager):
    """Advances all that it runs in one step, as an engine with continuous batching does."""

    tokens = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stepping: asyncio.Task[None] | None = None
        self.ranges: RankRanges | None = None
        self.placing = array("d")
        self.moves = 0

    def share(self, slots: int) -> None:
        """Its adapters share so many slots, as they do in a worker with RANK_SLOTS."""
        self.ranges = RankRanges(slots, RANK)

    def _ranks(self, load_id: int) -> int:
        return RANKS[zlib.crc32(self._loads[load_id].name.encode()) % len(RANKS)]

    def _collect(self) -> list[StageResult]:
        staged = super()._collect()
        if self.ranges is None:
            return staged
        return [replace(one, ranks=width_of(self._ranks(one.load_id))) for one in staged]

    def _activate(self, load_id: int) -> str | None:
        if self.ranges is None or load_id in self._slots:
            return super()._activate(load_id)
        if not self.ranges.fits(self._ranks(load_id)):
            self._violated(f"load {load_id} is given a place where none is")
        began = time.thread_time()
        effects = self.ranges.add(load_id, self._ranks(load_id))
        self.placing.append(time.thread_time() - began)
        self.moves += len(effects) - 1
        return super()._activate(load_id)

    def _leave_slot(self, load_id: int) -> None:
        super()._leave_slot(load_id)
        if self.ranges is not None:
            self.ranges.remove(load_id)

    async def generate(self, call: Call, input_tokens: int, output_tokens: int) -> None:
        """Returns when the last of ``output_tokens`` is out; the call's meter is told of each step."""
        ended = asyncio.get_running_loop().create_future()
        load_id = self._load_of(call.model)
        self.running.append(_Generation(call, load_id, input_tokens, output_tokens, ended))
        self.most_running = max(self.most_running, len(self.running))
        if len(self.running) > self.max_running:
            self._violated(f"{len(self.running)} sequences run at once")
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._step_while_busy())
        await ended

    async def _step_while_busy(self) -> None:
        while self.running:
            await asyncio.sleep(self.times.step)
            for one in self.running:
                one.step(self.tokens)
            self.running = [one for one in self.running if not one.ended.done()]


def simulate(traffic: Traffic, machine: Machine) -> Simulated:
    """Sends all of ``traffic`` through and waits until the last request has ended.

    Raises AssertionError where at the end the plan does not add up, something is left behind, or the engine
    was misused.
    """
    return run(_simulated(traffic, machine))


async def _simulated(traffic: Traffic, machine: Machine) -> Simulated:
    loop = asyncio.get_running_loop()
    world = World(
        machine.gpu_slots,
        machine.host_slots,
        machine.max_running,
        machine.times,
        dict(machine.limits) | ({"slot_ranks": machine.shared * RANK} if machine.shared else {}),
        make_engine=SimulatedEngine,
    )
    world.engine.tokens = machine.tokens
    if machine.shared:
        world.engine.share(machine.shared)
    plan = TimedPlan(world.plan)
    world.dispatcher._plan = plan  # type: ignore[assignment]
    outcomes: list[str] = []
    waits: list[float] = []
    versions = [version(f"tenant-{a % traffic.tenants}", f"a{a}") for a in range(traffic.adapters)]

    async def client(request: Request) -> None:
        outcomes.append(await _ask(world, request, versions[request.adapter], waits))

    began = time.perf_counter()
    async with world, asyncio.TaskGroup() as group:
        for request in requests(traffic):
            await asyncio.sleep(request.at - loop.time())
            group.create_task(client(request))
    world.check_idle()
    return Simulated(
        outcomes=Counter(outcomes),
        waits=waits,
        seconds=plan.seconds,
        effects=plan.effects,
        drains=world.plan.snapshot().drains,
        virtual=loop.time(),
        wall=time.perf_counter() - began,
        placing=world.engine.placing,
        moves=world.engine.moves,
    )


async def _ask(world: World, request: Request, wanted: Version, waits: list[float]) -> str:
    """How it ended."""
    loop = asyncio.get_running_loop()
    arrived = loop.time()
    try:
        id_ = world.dispatcher.new_id(request.tenant)
        ask = Ask(id_, request.tenant, wanted.key, request.input_tokens, LONGEST)
        lease = await world.dispatcher.submit(ask, wanted)
    except TooManyRequests:
        return "refused"
    except Unavailable:
        return "timed out"
    waits.append(loop.time() - arrived)
    call = Call(lease.id, "completion", wanted.key, wanted.adapter, "salt", lease)
    try:
        await world.engine.generate(call, request.input_tokens, request.output_tokens)
    finally:
        await lease.close("completed")
    return "completed"


def requests(traffic: Traffic) -> Sequence[Request]:
    rng = random.Random(traffic.seed)
    rows = zip(
        gamma_arrivals(traffic.rate, traffic.cv, rng),
        zipf(traffic.popularity, 1.0, rng),
        log_normal_lengths(64, 0.8, 1024, rng),
        log_normal_lengths(32, 0.6, LONGEST, rng),
        strict=False,
    )
    return [
        Request(number, at, f"tenant-{k % traffic.tenants}", k % traffic.adapters, input_, output)
        for number, (at, k, input_, output) in enumerate(itertools.islice(rows, traffic.requests))
    ]
