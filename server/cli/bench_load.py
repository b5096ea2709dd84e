"""What ``loraplex bench`` sends, and what it notes of each request."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Asked:
    """What may be asked for: a model, with the key of whoever it belongs to."""

    model: str
    key: str


@dataclass(slots=True)
class Shot:
    """One request. Times are in seconds since the bench began; ``chunks`` are of the answer's pieces."""

    model: str
    began: float
    ended: float | None = None
    chunks: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None

    @property
    def first(self) -> float:
        """Seconds to the first piece; infinite without one."""
        return self.chunks[0] - self.began if self.chunks else math.inf

    @property
    def total(self) -> float:
        """Seconds in all; infinite for one that did not end well."""
        return self.ended - self.began if self.ended is not None and self.error is None else math.inf


@dataclass(frozen=True, slots=True)
class Load:
    """``rate`` requests a second for ``seconds``.

    ``burst`` is the coefficient of variation of the time between arrivals (0: even, 1: Poisson's), ``skew``
    the exponent of Zipf's law over the models (0: all alike).
    """

    rate: float
    seconds: float
    burst: float
    skew: float
    prompt_words: int
    max_tokens: int
    seed: int

    def arrivals(self, rng: random.Random) -> Iterator[float]:
        """Seconds from the beginning, in order."""
        at = 0.0
        while at < self.seconds:
            yield at
            mean = 1 / self.rate
            shape = self.burst**-2 if self.burst else 0.0
            at += rng.gammavariate(shape, mean / shape) if shape else mean

    async def due(self, rng: random.Random, began: float) -> AsyncIterator[None]:
        """Goes on at each of the ``arrivals``; ``began`` is a moment of ``time.monotonic()``."""
        for at in self.arrivals(rng):
            await asyncio.sleep(max(0.0, began + at - time.monotonic()))
            yield

    def picks(self, choices: Sequence[Asked], rng: random.Random) -> Iterator[Asked]:
        """The first one most often."""
        weights = list(itertools.accumulate((place + 1) ** -self.skew for place in range(len(choices))))
        while True:
            yield rng.choices(choices, cum_weights=weights)[0]
