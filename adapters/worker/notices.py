"""A worker says by itself that a load has left its staging thread.

Otherwise it would be asked through the engine's queue again and again, and each question waits for a step
and holds the next. What it says is a datagram to the process that asked for the load: it is worth asking now.
"""

from __future__ import annotations

import contextlib
import socket


class Teller:
    """``address`` and ``token`` are those of a ``server.engine.notices.Notices``. Any thread may tell."""

    def __init__(self, address: str, token: str) -> None:
        self._address = address
        self._token = token.encode()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def tell(self) -> bool:
        """Whether it was heard: not where the other process is on another machine, or busy."""
        with contextlib.suppress(OSError):
            return self._socket.sendto(self._token, self._address) == len(self._token)
        return False


def teller(given: tuple[str, str] | None) -> Teller | None:
    """What tells at this address and with this token; None where nobody listens, or cannot hear it."""
    if given is None:
        return None
    made = Teller(*given)
    return made if made.tell() else None
