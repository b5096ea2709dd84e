"""What an action costs, the same on every machine: a count of calls instead of seconds.

It sees what is done item by item. It does not see operators, what one call into C does with much data, or
other threads: bound those by what they read, copy or compare.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Calls:
    """How many functions, of Python and of C, were called so far."""

    count = 0


@contextmanager
def counted() -> Iterator[Calls]:
    """Counts the calls of this thread in the block, those of its event loop too where the block waits."""
    calls = Calls()

    def profile(_frame: object, event: str, _what: object) -> None:
        calls.count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def calls_of(action: Callable[[], object]) -> int:
    """How many functions, of Python and of C, ``action`` calls in this thread."""
    with counted() as calls:
        action()
    return calls.count
