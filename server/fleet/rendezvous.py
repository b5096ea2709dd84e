"""Rendezvous hashing: which replicas a version belongs to, when nothing else says it.

Every replica has a score for every version, and the highest one is its home (Thaler and Ravishankar, "Using
name-based mappings to increase hit rates", 1998). Everybody who knows the same replicas computes the same
home without talking, and a replica that comes or goes moves its own share of the versions and no others.
"""

from __future__ import annotations

import hashlib
import math

_BITS = 64
_MASK = (1 << _BITS) - 1


def hashed(name: str) -> int:
    """64 bits of ``name``, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=_BITS // 8).digest())


def score(version: int, replica: int, weight: float) -> float:
    """How much a version (``hashed``) belongs to a replica (``hashed``) of this ``weight``.

    Of two replicas, one with twice the weight is the home of twice as many versions: with u uniform in (0,
    1), -weight / ln(u) is the highest for a replica with a probability proportional to its weight.
    """
    return -weight / math.log((_mixed(version ^ replica) + 0.5) / (1 << _BITS))


def _mixed(bits: int) -> int:
    """The finalizer of splitmix64: every bit of the result depends on every bit given."""
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
    return bits ^ (bits >> 31)
