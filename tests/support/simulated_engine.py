"""A simulated engine for the plan, which has laws of its own and breaks a test that violates one."""

from __future__ import annotations

import heapq
import itertools
import math
import random
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
