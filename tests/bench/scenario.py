"""What a scenario declares: its measures, their targets, and how the servers are set up for it."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from tests.bench.adapters import Adapter
from tests.bench.client import Client
from tests.bench.servers import Server, Setup

Values = dict[str, float]
LONGEST = 400.0  # seconds


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on the median of the ratio to bare vLLM, or on the median of Loraplex's own value."""

    of: Literal["ratio", "value"]
    sign: Literal["≤", "≥"]
    bound: float

    def met(self, value: float) -> bool:
        """False for ``nan``: what was not measured has not been shown."""
        return value <= self.bound if self.sign == "≤" else value >= self.bound

    def __str__(self) -> str:
        return f"{'ratio ' if self.of == 'ratio' else ''}{self.sign} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Measure:
    """``key`` in what ``Scenario.measure`` returns; without a ``goal`` it is shown for the reader only."""

    key: str
    title: str
    unit: str = ""
    goal: Goal | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """One of the repetitions. A ``quick`` one shows that everything works, and its numbers mean nothing.

    ``trace`` and ``minutes`` are what the command line says, for those scenarios that take one.
    """

    number: int = 0
    quick: bool = False
    trace: Path | None = None
    minutes: float | None = None

    def seconds(self, full: float, quick: float) -> float:
        return quick if self.quick else full

    def count(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def rng(self, *salt: int) -> random.Random:
        """The same choices for both servers, others in each round."""
        return random.Random(f"{self.number}/{salt}")


@dataclass(frozen=True, slots=True)
class Scenario:
    """``measure`` is called once for each of ``setups``; what it returns is put together.

    ``adapters`` are on disk before, and in no server's memory: a scenario loads and warms what it wants warm.
    Adapters that must be cold belong to one scenario of a setup only. ``runs`` is for what takes too long to
    be repeated as often as the others, ``longest`` in seconds on one server is where it is given up. Servers
    in ``once`` are measured in the first run only: they always do the same there, or no target asks for it.
    """

    name: str
    measures: tuple[Measure, ...]
    adapters: Callable[[Round], tuple[Adapter, ...]]
    measure: Callable[[Server, Client, Round], Awaitable[Values]]
    setups: tuple[Setup, ...] = (Setup(),)
    servers: tuple[str, ...] = ("loraplex", "vllm")
    once: tuple[str, ...] = ()
    runs: int | None = None
    longest: float | None = LONGEST

    def due(self, server: str, round_: Round) -> bool:
        return server in self.servers and not (round_.number and server in self.once)


@dataclass(frozen=True, slots=True)
class Simulation:
    """A scenario that needs no server: ``simulate`` runs Loraplex's own decisions, in a process of its own.

    ``settings`` are what it was simulated with, for the report. After ``longest`` seconds it is given up.
    """

    setups: ClassVar[tuple[Setup, ...]] = ()
    servers: ClassVar[tuple[str, ...]] = ("loraplex",)

    name: str
    measures: tuple[Measure, ...]
    simulate: Callable[[Round], Values]
    settings: Mapping[str, Any] = field(default_factory=dict)
    runs: int | None = None
    longest: float = LONGEST

    def adapters(self, round_: Round) -> tuple[Adapter, ...]:
        return ()
