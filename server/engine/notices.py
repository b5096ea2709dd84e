"""Hears from workers that a load has ended, so that they need not be asked all the time.

A Unix socket whose name lies in no folder (Linux has such), and a token that every notice repeats: whatever
else is sent there is ignored. A notice says nothing but that it is worth asking.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import socket
import sys
from collections.abc import Callable

logger = logging.getLogger(__name__)

AT_ONCE = 64  # notices that are read before others have their turn


class Notices:
    """Made by ``open``; ``address`` and ``token`` are for the workers (``adapters.worker.notices``)."""

    def __init__(self, heard: socket.socket, address: str) -> None:
        self._socket = heard
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_notice: Callable[[], None] = lambda: None
        self.address = address
        self.token = secrets.token_hex(16)

    @classmethod
    def open(cls) -> Notices | None:
        """None where this system has no such sockets."""
        if sys.platform != "linux":
            return None
        heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        address = f"\0loraplex-{secrets.token_hex(16)}"
        try:
            heard.bind(address)
        except OSError as exc:
            logger.info("workers are asked whether loads have ended: %s", exc)
            heard.close()
            return None
        return cls(heard, address)

    def listen(self, on_notice: Callable[[], None]) -> None:
        """Calls ``on_notice`` after each notice from now on, on the running loop."""
        self._on_notice = on_notice
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._socket, self._read)

    def _read(self) -> None:
        heard = False
        with contextlib.suppress(OSError):  # no more, for now
            for _ in range(AT_ONCE):
                heard |= hmac.compare_digest(self._socket.recv(256), self.token.encode())
        if heard:
            self._on_notice()

    def close(self) -> None:
        """Safe to call again."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._socket)
        self._loop = None
        self._socket.close()
