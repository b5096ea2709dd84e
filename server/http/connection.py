"""uvicorn's HTTP protocol with the bounds on a request's head that its parser lacks, and a patient close."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from types import FrameType
from typing import Any, ClassVar, NoReturn

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.errors import envelope

HEAD_BYTES = 64 << 10
# What still comes is thrown away for so long: closing at once would overtake the answer.
_LINGER = 0.5
TICK_SECONDS = 0.5  # between two looks whether to leave


class _Patient:
    """A transport whose ``close`` is ``closing``'s to carry out."""

    def __init__(self, transport: Any, closing: BoundedHeads) -> None:
        self._transport = transport
        self._closing = closing
        self.write = transport.write  # what is asked for with every chunk of an answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        self._closing.close(self._transport)

    def is_closing(self) -> bool:
        return self._closing.closed or bool(self._transport.is_closing())


class BoundedHeads(HttpToolsProtocol):
    """Answers 431 to a head beyond ``HEAD_BYTES`` and what was read with it, 408 to one that does not end.

    ``seconds`` bounds the time from a head's first byte, or from the connection, to its end. A connection on
    which a request is still being sent is closed ``_LINGER`` seconds after its answer.
    """

    seconds: ClassVar[float] = 60.0
    _late: asyncio.TimerHandle
    closed = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(_Patient(transport, self))  # type: ignore[arg-type]
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.closed:
            return
        if self._between:
            self._begin()
        if self._in_head:
            self._received += len(data)
        super().data_received(data)
        if self._in_head and self._received > HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "head_too_large")

    def on_headers_complete(self) -> None:
        self._late.cancel()
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._between = True
        super().on_message_complete()

    def _begin(self) -> None:
        self._between, self._in_head, self._received = False, True, 0
        self._late = asyncio.get_running_loop().call_later(
            self.seconds, self._refuse, HTTPStatus.REQUEST_TIMEOUT, "request_timeout"
        )

    def _refuse(self, status: HTTPStatus, code: str) -> None:
        """Without an answer of its own where the one before it is still being given."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            body = json.dumps(envelope(f"{status.phrase}.", "invalid_request_error", code)).encode()
            head = (
                f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()

    def close(self, transport: Any) -> None:
        """Once: what still comes of a request is thrown away for a while before ``transport`` is closed."""
        if self.closed:
            return
        self.closed = True
        if self._between or (self._in_head and not self._received):
            transport.close()
        else:
            self.flow.resume_reading()
            asyncio.get_running_loop().call_later(_LINGER, transport.close)


class DrainingServer(uvicorn.Server):
    """uvicorn with a drain: on the first signal it goes on listening, not ready, until streams are done.

    ``drain`` returns when they are. A second signal ends the server as uvicorn ends it.
    """

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._drain_app = drain
        self._draining: asyncio.Task[None] | None = None

    async def main_loop(self) -> None:
        """As uvicorn's own, whose ten looks a second cost as much as one or two tokens of a stream."""
        while not await self.on_tick(0):
            await asyncio.sleep(TICK_SECONDS)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.started:
            _leave_at_once(sig)
        if self._draining is not None:
            super().handle_exit(sig, frame)
            return
        asyncio.get_running_loop().call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        try:
            await self._drain_app()
        finally:
            self.should_exit = True


def _leave_at_once(sig: int) -> NoReturn:
    """A signal while the model is being loaded, which nothing can interrupt and which may take minutes."""
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(128 + sig)
