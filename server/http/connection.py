"""uvicorn's HTTP protocol with the bounds that its parser lacks, and its server with a drain."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import json
import logging
import multiprocessing
import os
import resource
import signal
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus
from types import FrameType
from typing import Any, ClassVar, NoReturn

import httptools
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from adapters.awake import grace
from server.errors import envelope
from server.http.pieces import offer
from server.http.shares import Asking, shares_of, who_asks
from server.http.turns import turns_of

logger = logging.getLogger(__name__)

HEAD_BYTES = 64 << 10
# What still comes is thrown away for so long: closing at once would overtake the answer.
_LINGER = 0.5
TICK_SECONDS = 0.5  # between two looks whether to leave
# A chunk of one byte has five bytes around it; eight are no reason for suspicion yet.
_CHUNKED = 8
PIPELINED = 16
STALLED_SECONDS = 5.0  # without a piece of a body, while others find no room
LEAST_PACE = 1024  # bytes of a body in a second, on average, while others find no room
# Whose questions are answered while there is no room for others; so many connections are kept for them.
_PROBES = frozenset({b"health", b"ready", b"metrics"})
SPARE = 8
# Of a fleet's own calls, whose one key is every customer's.
_FLEET = b"/internal/"
_ONE_KEY = (
    "As many of this server's connections have a request of your key under way as one key may have. Send this"
    " one again when some of them are answered."
)
_LATER = "Retry-After: 1\r\n"
_KINDS = {  # of refusals that are no fault of the request: the error's type, and a header
    HTTPStatus.SERVICE_UNAVAILABLE: ("service_unavailable_error", _LATER),
    HTTPStatus.TOO_MANY_REQUESTS: ("rate_limit_error", _LATER),
}


def _nobody(_: str) -> bool:
    return False


class _Patient:
    """A transport whose ``close`` is ``closing``'s to carry out; it is lost when that is None."""

    def __init__(self, transport: Any, closing: BoundedHeads) -> None:
        self._transport = transport
        self.closing: BoundedHeads | None = closing
        self.write = transport.write  # what is asked for with every chunk of an answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        if self.closing is not None:
            self.closing.close(self._transport)

    def is_closing(self) -> bool:
        return self.closing is None or self.closing.closed or bool(self._transport.is_closing())


class BoundedHeads(HttpToolsProtocol):
    """A connection whose client can take only so much memory, time and room before it has said anything.

    431 for a head beyond ``HEAD_BYTES``, and for as much of trailers, chunk sizes
    and chunk extensions beyond what a body in small chunks needs; 408 for a head that does not end within
    ``seconds`` of its first byte, or of the connection. After an answer the rest of its request has
    ``rest_seconds``; a connection that the server closes meanwhile is closed ``_LINGER`` seconds after its
    answer. More than ``PIPELINED`` requests ahead of their answers end the connection. At most ``limit``
    connections are open: a new one takes the place of those that have been idle longest, or on which a body
    comes most slowly. Where there are none of either, up to ``SPARE`` more are open, on which probes are
    answered and all else is refused with 503. A request of a key that has its share of the connections
    (``shares``) is refused with 429, unless it is a probe; ``auth`` looks whether its tenant has. The app's
    lifespan may put ``vouches`` into its state: whether a key is that of a gateway, whose customers have a
    share each.

    Trailers are thrown away: as headers they would come behind all that a proxy looked at. A request to go on
    in another protocol is answered in this one, its body too, which Java's client sends along; llhttp would
    take that for the next request.
    """

    seconds: ClassVar[float] = 60.0
    rest_seconds: ClassVar[float] = 60.0
    limit: ClassVar[int] = 8192
    _late: asyncio.TimerHandle
    closed = False
    _between = _in_head = _overrun = _is_spare = False
    _received = _body = 0
    _body_began, _body_bytes = 0.0, 0
    _heard = 0.0  # when the last bytes came
    _asking: Asking
    _running: Any = None  # the cycle that is answered; ``cycle`` may wait behind it

    def connection_made(self, transport: Any) -> None:
        super().connection_made(_Patient(transport, self))  # type: ignore[arg-type]
        self._heard = self.loop.time()
        self._asking = Asking(shares_of(self.server_state))
        self._begin()
        if len(self.connections) > self.limit:
            self._is_spare = not self._make_room()
            if self._is_spare and len(self.connections) > self.limit + SPARE:
                self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Leaves nothing that refers to itself in a circle.

        Two thousand connections that ended at once left seventy thousand objects to Python's collector of
        circles, for which every stream waits.
        """
        self._late.cancel()
        self._asking.leave()
        running, self._running = self._running, None
        if running is not None and not running.response_complete:  # uvicorn tells the last one alone
            running.disconnected = True
            running.message_event.set()
        super().connection_lost(exc)
        self.transport.closing = None  # type: ignore[attr-defined]
        self.pipeline.clear()
        self._part()

    def _part(self) -> None:
        if self.cycle is not None and self.cycle.response_complete:
            self.cycle = None  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if self.closed:
            return
        self._heard = self.loop.time()
        if self._between:
            self._begin()
        self._body = 0
        self._feed(data)
        self._received = max(0, self._received + len(data) - self._body - _CHUNKED * self._body)
        if self._overrun:
            self.transport.close()
        elif not self._between and self._received > HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "head_too_large")

    def _feed(self, data: bytes) -> None:
        """As uvicorn's, except for an upgrade: what came is read again without the wish for one."""
        self._unset_keepalive_if_required()
        try:
            while True:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    data = self._plain_head() + data[upgrade.args[0] :]
                    self.parser = httptools.HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")

    def _plain_head(self) -> bytes:
        """The head that was read last, without an upgrade. Raises HttpParserError for CONNECT."""
        method, version = self.parser.get_method(), self.parser.get_http_version()
        if method == b"CONNECT":
            raise httptools.HttpParserError("CONNECT is for proxies")
        lines = [b"%s %s HTTP/%s" % (method, self.url, version.encode())]
        for name, value in self.headers:
            if name == b"connection":
                value = b"close" if b"close" in value.lower() else b"keep-alive"
            if name != b"upgrade":
                lines.append(b"%s: %s" % (name, value))
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        if self._between:  # the next one came along with the end of the one before
            self._begin()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Without the blanks behind a value, which are none of it (RFC 9112, 5.1); llhttp leaves them."""
        super().on_header(name, value.rstrip(b" \t"))

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= PIPELINED:
            self._overrun = True
        if self._overrun or self.parser.should_upgrade():
            return
        self._late.cancel()
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "head_too_large")
            self._overrun = True  # what was read with it is no request any more
            return
        if self._is_spare and not self._finds_room():
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "too_many_connections")
            self._overrun = True
            return
        counts = not (self.url.startswith(_FLEET) or self._is_probe())
        who = who_asks(self.headers, self.app_state.get("vouches", _nobody)) if counts else frozenset[int]()
        if not self._asking.begin(who, self.limit):
            self._refuse(HTTPStatus.TOO_MANY_REQUESTS, "too_many_connections", _ONE_KEY)
            self._overrun = True
            return
        self._in_head = False
        self._received = 0
        self._body_began, self._body_bytes = self.loop.time(), 0
        super().on_headers_complete()
        self.headers = []  # where trailers go; the request keeps its own

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        offer(cycle)
        self._asking.offer(cycle.scope)
        self._running = cycle
        if cycle.scope["http_version"] == "1.0":
            cycle.waiting_for_100_continue = False
            app = partial(_without_chunks, cycle, app)
        turns_of(self.loop).begin(partial(super()._start_asgi_task, cycle, app), cycle.scope)

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        self._body_bytes += len(body)
        if not self._overrun:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._overrun or self.parser.should_upgrade():
            return
        self._late.cancel()
        self._between = True
        self._received = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._asking.end()
        super().on_response_complete()
        if self.parser is None:  # set so just now, as the connection was lost
            self._part()  # type: ignore[unreachable]
        elif not (self._between or self._in_head or self.transport.is_closing()):
            self._late = self.loop.call_later(self.rest_seconds, self._overdue, self.transport.close)

    def timeout_keep_alive_handler(self) -> None:
        """Closes an idle connection, but none on which a request has come while the process stood still."""
        timer = self.timeout_keep_alive_task
        if timer is None:
            super().timeout_keep_alive_handler()
        else:
            later = grace(self.loop, timer)
            self.timeout_keep_alive_task = self.loop.call_later(later, super().timeout_keep_alive_handler)

    def _overdue(self, act: Callable[[], None]) -> None:
        self._late = self.loop.call_later(grace(self.loop, self._late), act)

    def _begin(self) -> None:
        self._between, self._in_head, self._received = False, True, 0
        refuse = partial(self._refuse, HTTPStatus.REQUEST_TIMEOUT, "request_timeout")
        self._late = self.loop.call_later(self.seconds, self._overdue, refuse)

    def _refuse(self, status: HTTPStatus, code: str, message: str = "") -> None:
        """Answers with ``status`` unless another answer is due or under way on this connection; closes it."""
        if self.transport.is_closing():
            return
        if self._may_answer():
            kind, later = _KINDS.get(status, ("invalid_request_error", ""))
            body = json.dumps(envelope(message or f"{status.phrase}.", kind, code)).encode()
            head = (
                f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n{later}"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            if self.cycle is not None:  # the app is told that nobody reads an answer of its own
                self.cycle.disconnected = True
                self.cycle.message_event.set()
        self.transport.close()

    def _may_answer(self) -> bool:
        cycle = self.cycle
        if self._in_head:
            return cycle is None or cycle.response_complete
        return cycle is not None and not cycle.response_started and not self.pipeline

    def _finds_room(self) -> bool:
        """Whether the request that has begun may go on, as a probe may on a spare connection."""
        if len(self.connections) <= self.limit or self._make_room():
            self._is_spare = False
            return True
        return self._is_probe()

    def _is_probe(self) -> bool:
        """Below any prefix. A body may be long in coming, and what follows ``#`` or ``?`` is no path."""
        path = self.url.partition(b"#")[0].partition(b"?")[0]
        is_read = self.parser.get_method() in (b"GET", b"HEAD")
        return is_read and path.rstrip(b"/").rpartition(b"/")[2] in _PROBES

    def _make_room(self) -> bool:
        """Closes a part of the idle connections, the longest idle first; where there are none, of those on
        which a body comes too slowly. False where there are none of either."""
        now = self.loop.time()
        others = [one for one in self.connections if isinstance(one, BoundedHeads) and one is not self]
        idle = [(one._heard, number) for number, one in enumerate(others) if one._is_idle(now)]
        slow = idle or [
            (pace, number) for number, one in enumerate(others) if (pace := one._pace(now)) < LEAST_PACE
        ]
        for _, number in heapq.nsmallest(max(1, self.limit // 64), slow):
            others[number].closed = True
            others[number].transport._transport.abort()  # type: ignore[attr-defined]
        return bool(slow)

    def _pace(self, now: float) -> float:
        """Bytes a second of a body that has been coming for a while; of all else, more than enough."""
        if self.closed or self._in_head or self._between or self.flow.read_paused:
            return LEAST_PACE
        seconds = now - self._body_began
        return LEAST_PACE if seconds < STALLED_SECONDS else self._body_bytes / seconds

    def _is_idle(self, now: float) -> bool:
        """Without a whole request, and without a piece of one for a while if it has a head; or answered.

        The rest of a request that has been refused may still come for a minute.
        """
        if self.closed:
            return False  # it goes by itself
        if self._in_head or self.cycle is None or self.cycle.response_complete:
            return True
        return not self._between and now - self._heard > STALLED_SECONDS

    def close(self, transport: Any) -> None:
        """Once: what still comes of a request is thrown away for a while before ``transport`` is closed."""
        if self.closed:
            return
        self.closed = True
        if self._between or (self._in_head and not self._received):
            transport.close()
        else:
            self.flow.resume_reading()
            self.loop.call_later(_LINGER, transport.close)


async def _without_chunks(cycle: Any, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """``app`` for a client of HTTP/1.0: an answer without a length ends with its connection (RFC 9112)."""
    ends_with_connection = False

    async def plain(message: Message) -> None:
        nonlocal ends_with_connection
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            ends_with_connection = b"content-length" not in names
            if ends_with_connection:
                cycle.chunked_encoding = False
        elif ends_with_connection:
            cycle.expected_content_length = len(message.get("body", b""))  # what uvicorn holds it against
        await send(message)

    await app(scope, receive, plain)


def connections_for(descriptors: int) -> int:
    """How many connections a process with so many file descriptors takes.

    An upload has a file beside its connection, and the engine, the database and the store need some 60.
    """
    return max(16, min(8192, (descriptors - 64) // 3))


def raise_descriptors() -> int:
    """Takes as many file descriptors as the process may have; returns their number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return hard if hard != resource.RLIM_INFINITY else 1 << 20
    return soft


class DrainingServer(uvicorn.Server):
    """uvicorn with a drain: on the first signal it goes on listening, not ready, until streams are done.

    ``drain`` returns when they are. A second signal ends the server as uvicorn ends it. ``listening`` is
    called once, when connections are taken.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        drain: Callable[[], Awaitable[None]],
        listening: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self._drain_app = drain
        self._listening = listening
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, which returns when it listens."""
        await super().startup(sockets)
        if self.started:
            self._listening()

    async def main_loop(self) -> None:
        """As uvicorn's own, whose ten looks a second cost as much as one or two tokens of a stream."""
        while not await self.on_tick(0):
            await asyncio.sleep(TICK_SECONDS)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.started:
            _leave_at_once(sig)
        if self._draining is not None:
            super().handle_exit(sig, frame)
            self._say("%s again: the server does not wait for what runs", sig)
            return
        self._say("%s: the server drains; a second signal ends it at once", sig)
        asyncio.get_running_loop().call_soon_threadsafe(self._begin_drain)

    def _say(self, message: str, sig: int) -> None:
        """Not within the handler of a signal, which may have interrupted the log itself."""
        name = signal.Signals(sig).name
        asyncio.get_running_loop().call_soon_threadsafe(logger.warning, message, name)

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
