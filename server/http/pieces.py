"""Pieces of a streamed answer, straight onto their connection.

On its way through ASGI each message passes six functions that look at it, and all but the last of them want
an answer's head alone. An answer has one head, and a piece for every token.
"""

from __future__ import annotations

import weakref
from typing import Any

from starlette.types import Scope

_NAME = "loraplex.pieces"


def offer(cycle: Any) -> None:
    """Lets whoever answers the request of ``cycle``, uvicorn's RequestResponseCycle, find it by its scope.

    By a weak reference: the cycle has the scope, and a circle would be left to Python's collector.
    """
    cycle.scope.setdefault("extensions", {})[_NAME] = weakref.ref(cycle)


class Pieces:
    """``write`` does what uvicorn's ``send`` does with a piece of a body, where ``ready`` says that it can be
    done at once. Everything else, an answer's head and its end too, is for ``send``."""

    __slots__ = ("_cycle", "_flow", "_write")

    def __init__(self, cycle: Any) -> None:
        self._cycle = cycle
        self._flow = cycle.flow
        self._write = cycle.transport.write

    @classmethod
    def of(cls, scope: Scope) -> Pieces | None:
        """Of the request that ``scope`` came with; None for a copy of it, as HEAD is answered with, and where
        the server is another one."""
        offered = scope.get("extensions", {}).get(_NAME)
        cycle = offered() if offered is not None else None
        return cls(cycle) if cycle is not None and cycle.scope is scope else None

    def ready(self) -> bool:
        """Whether the answer has begun, in chunks, and its client reads."""
        cycle = self._cycle
        return bool(
            cycle.chunked_encoding
            and not self._flow.write_paused
            and not cycle.disconnected
            and not cycle.response_complete
        )

    def write(self, piece: bytes) -> None:
        """``piece`` must not be empty: that would be the body's end."""
        self._write(b"%x\r\n%b\r\n" % (len(piece), piece))
