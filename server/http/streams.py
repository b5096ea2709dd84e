"""Server-sent events over HTTP: a stream with its lease, comments while it waits, and slow clients."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from adapters.awake import grace
from adapters.errors import AdapterError
from server.errors import ServerError
from server.http.middleware import ClientLeft
from server.http.pieces import Pieces
from server.inference.completion import Completion, LeasedStream, Sink
from server.inference.dialects.base import Dialect
from server.scheduling.lease import Lease, told_of

COMMENT = ": the request waits\n\n"


class Comments:
    """Sends a comment whenever a stream has said nothing for ``seconds``; 0 for never.

    ``silent_since`` is in the loop's time, infinite while something is being sent or nothing may be. One
    timer a response: one for each chunk would cost as much as the chunk's own way through.
    """

    def __init__(self, send: Send, silent_since: Callable[[], float], seconds: float) -> None:
        self._send = send
        self._silent_since = silent_since
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._speaking: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(seconds, self._look) if seconds else None

    def _look(self) -> None:
        due = self._silent_since() + self._seconds
        if due <= self._loop.time():
            self._speaking = self._loop.create_task(self._say())
        wait = due - self._loop.time()
        self._timer = self._loop.call_later(wait if 0 < wait < self._seconds else self._seconds, self._look)

    async def _say(self) -> None:
        with suppress(OSError):  # the client has left, which the stream itself will notice
            await self._send({"type": "http.response.body", "body": COMMENT.encode(), "more_body": True})

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._speaking is not None:
            self._speaking.cancel()


class Late:
    """A stream that has not been opened yet: ``opening`` waits for its turn while its client is told so.

    Its chunks are a comment first, then those of the stream, or the refusal as an event. ``aclose`` is
    idempotent and always needed.
    """

    def __init__(self, opening: asyncio.Task[Completion], dialect: Dialect, log: dict[str, Any]) -> None:
        self._opening = opening
        self._dialect = dialect
        self._log = log
        self.lease: Lease | None = None
        self._sink: Sink | None = None
        self._stream: LeasedStream | None = None

    def goes_to(self, sink: Sink) -> None:
        """See ``LeasedStream``."""
        self._sink = sink

    async def __aiter__(self) -> AsyncIterator[str]:
        yield COMMENT
        try:
            opened = await asyncio.shield(self._opening)
        except ClientLeft:
            return
        except (ServerError, AdapterError) as exc:
            self._log["code"] = exc.code
            yield self._dialect.error_event(exc, 0)
            return
        self._take(opened)
        assert self._stream is not None, "a request that is to stream was answered with a document"
        if self._sink is not None:
            self._stream.goes_to(self._sink)
        async for chunk in self._stream:
            yield chunk

    def _take(self, opened: Completion) -> None:
        self.lease, self._stream = opened.lease, opened.stream
        self._log["model"] = opened.model

    async def aclose(self) -> None:
        self._opening.cancel()
        await asyncio.wait({self._opening})
        if self._stream is None and not self._opening.cancelled() and self._opening.exception() is None:
            self._take(self._opening.result())
        if self._stream is not None:
            await self._stream.aclose()


class Way:
    """The way of one answer's messages to its client. Times are the event loop's.

    ``waiting`` is since when a message is being sent, None while none is. ``sent`` is when the last one was
    handed over, infinite before the answer's head and after its end.
    """

    def __init__(self, send: Send, pieces: Pieces | None) -> None:
        self._send = send
        self._pieces = pieces
        self._now = asyncio.get_running_loop().time
        self.waiting: float | None = None
        self.sent = math.inf

    def silent_since(self) -> float:
        """See ``Comments``."""
        return math.inf if self.waiting is not None else self.sent

    async def message(self, message: Message) -> None:
        """Waits for a client who does not read."""
        self.waiting = self._now()
        await self._send(message)
        self.sent = self.waiting if message.get("more_body", True) else math.inf
        self.waiting = None

    def ready(self) -> bool:
        """Whether ``take`` can hand a chunk on without waiting for the client."""
        return self._pieces is not None and self._pieces.ready()

    def take(self, chunk: str) -> None:
        """Hands ``chunk`` on, past everything that looks at messages."""
        if chunk and self._pieces is not None:
            self._pieces.write(chunk.encode())
            self.sent = self._now()


class LeasedResponse(StreamingResponse):
    """SSE that closes its stream whatever happens: read to the end, left by the client, or never begun."""

    _way: Way

    def __init__(
        self,
        stream: LeasedStream | Late,
        lease: Lease | None,
        log: dict[str, Any],
        client_timeout: float,
        keepalive: float,
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would hold a stream back
        super().__init__(stream, media_type="text/event-stream", headers=headers)
        self._stream = stream
        self._lease = lease
        self._log = log
        self._client_timeout = client_timeout
        self._keepalive = keepalive

    async def stream_response(self, send: Send) -> None:
        """As Starlette's, except that a chunk goes straight to a client who reads."""
        way = self._way
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._stream:
            if way.ready():
                way.take(chunk)
            else:
                await send({"type": "http.response.body", "body": chunk.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ends the connection of a client that does not read: its place in the engine is others' too."""
        loop = asyncio.get_running_loop()
        limit = asyncio.timeout(None)
        timer: asyncio.TimerHandle
        spared: float | None = None  # the message for which the client had its grace, by its time
        self._way = way = Way(send, Pieces.of(scope))
        if isinstance(self._stream, LeasedStream | Late):
            self._stream.goes_to(way)
        comments = Comments(send, way.silent_since, self._keepalive)

        def look() -> None:
            """One timer a response: one for each chunk costs as much as the chunk's own way through."""
            nonlocal timer, spared
            due = self._client_timeout + (loop.time() if way.waiting is None else way.waiting)
            if due <= loop.time() and spared != way.waiting:
                spared = way.waiting
                due = loop.time() + grace(loop, timer)  # the client may have read it all
            if due > loop.time():
                timer = loop.call_at(due, look)
            else:
                limit.reschedule(due)

        timer = loop.call_later(self._client_timeout, look)
        try:
            async with limit:
                await super().__call__(scope, receive, way.message)
        except (TimeoutError, ClientDisconnect):
            if not limit.expired():
                raise
        finally:
            timer.cancel()
            look = lambda: None  # noqa: E731  it knows itself, and so all of this answer
            comments.stop()
            await self._stream.aclose()
            lease = self._stream.lease if isinstance(self._stream, Late) else self._lease
            self._log |= told_of(lease) if lease is not None else {}
