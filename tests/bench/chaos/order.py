"""In which order faults are made."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol, TypeVar


class _Fault(Protocol):
    @property
    def like_another(self) -> bool: ...


F = TypeVar("F", bound=_Fault)


def in_order(faults: Sequence[F], times: int, rng: random.Random, *, hurry: bool) -> list[F]:
    """Each ``times``, by chance; in a ``hurry``, which may leave some out, those like another come last."""
    if hurry:
        return sorted(faults, key=lambda fault: fault.like_another) * times
    return [fault for _ in range(times) for fault in rng.sample(faults, len(faults))]
