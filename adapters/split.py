"""A canary: the requests for one name divided between several of its versions. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

WHOLE = 100


def choose(shares: Sequence[tuple[T, int]], name: str, unit: str) -> T:
    """One of ``shares``: the same for the same ``unit``, as a user's name. Shares are parts of their sum,
    which is ``WHOLE`` but where a version of a split is out of service.

    The units of one are spread anew under another ``name``. While a share grows, those of its units that lie
    next to it change over, and nobody else.
    """
    if len(shares) == 1:
        return shares[0][0]
    point = int.from_bytes(hashlib.sha256(f"{name}\0{unit}".encode("utf-8", "replace")).digest()[:8])
    point %= sum(share for _, share in shares)
    for chosen, share in shares:
        point -= share
        if point < 0:
            return chosen
    raise ValueError("no shares")
