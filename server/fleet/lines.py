"""Connections on which orders go to replicas and their frames come back, one order at a time on each.

    line = await lines.order(url, path, body, headers)    the head of the answer is there
    kind, payload = await line.next(tap)                  the next frame
    await line.end()                                      nothing comes behind the last one
    lines.release(line)                                   the next order may use it

A line hands frames to a ``tap`` as it reads them, while somebody waits in ``next``: no task wakes up for a
token. aiohttp, which asks replicas everything else, wakes one up for every piece of a body.
"""

from __future__ import annotations

import asyncio
import contextvars
import ssl
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import cast
from urllib.parse import urlsplit

import httptools

from adapters.awake import AwakeTimeout
from server.fleet.wire import Frames, Kind, Malformed

CONNECT_TIMEOUT_S = 3.0
# Below uvicorn's 5 s, which closes what is idle: an order must not meet a connection that is being closed.
KEEP_ALIVE_S = 3.0
# Bytes of frames that nobody has taken: beyond the first number nothing more is read, until the second.
MOST_HELD, FEW_HELD = 512 << 10, 256 << 10
MOST_REFUSAL = 1 << 20  # bytes of an answer that has no frames

Frame = tuple[Kind, bytes]
# Is offered frames, and returns how many of them, from the first on, it has taken.
Tap = Callable[[Sequence[Frame]], int]


class Lost(Exception):
    """The connection to a replica broke off before the end, or was given up."""


class Line(asyncio.Protocol):
    """One connection, to ``url``; see above. ``status`` is that of the answer, 0 until its head is there.

    Every method that waits raises Lost, and what a tap has raised. One of them waits at a time.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._tap: Tap | None = None
        self._paused = False
        self._begin()

    def _begin(self) -> None:
        self.status = 0
        self._whole = self._keeps = False
        self._body = b""  # what was just read of it
        self._refusal = b""
        self._frames = Frames()
        self._ready: deque[Frame] = deque()
        self._held = 0

    # --- for whoever has ordered -----------------------------------------------------------------------

    def send(self, head: bytes, body: bytes) -> None:
        """Sends a request."""
        if self._transport is None or self._failure is not None:
            raise Lost("the connection has ended")
        self._begin()
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(head)
        self._transport.write(body)

    async def head(self) -> int:
        """The answer's status."""
        while not self.status:
            await self._more()
        return self.status

    async def refusal(self) -> bytes:
        """The body of an answer whose status is not 200, which has no frames."""
        await self.end()
        return self._refusal

    async def next(self, tap: Tap | None = None) -> Frame:
        """The next frame that ``tap``, which is asked from now until there is one, does not take."""
        while not self._ready:
            if self._whole:
                raise Lost("the connection ended")
            await self._more(tap)
        return self._popped()

    def take(self, kind: Kind) -> bytes | None:
        """The payload of the next frame, if it is there already and of this kind."""
        return self._popped()[1] if self._ready and self._ready[0][0] is kind else None

    async def end(self) -> None:
        """Returns when the answer is whole."""
        while not self._whole:
            await self._more()

    def abort(self) -> None:
        """Gives the connection up, and what came on it; whoever waits is told Lost. May be repeated."""
        self._ready.clear()
        self._fail(Lost("the connection was closed"))

    @property
    def reusable(self) -> bool:
        """Whether another order may be sent."""
        return self._failure is None and self._whole and self._keeps and not self._ready

    def _popped(self) -> Frame:
        frame = self._ready.popleft()
        self._held -= len(frame[1])
        if self._paused and self._held <= FEW_HELD and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return frame

    async def _more(self, tap: Tap | None = None) -> None:
        if self._failure is not None:  # a new one: an exception refers to the frames that it passed
            raise Lost(str(self._failure)) if isinstance(self._failure, Lost) else self._failure
        self._waiter = self._loop.create_future()
        if tap is not None:  # the connection's own context is that of whoever had it made
            context = contextvars.copy_context()
            self._tap = lambda frame: context.run(tap, frame)
        try:
            await self._waiter
        finally:
            self._waiter = self._tap = None

    # --- what the connection tells ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are of no class of asyncio's

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._fail(Lost("the connection ended" if exc is None else f"{type(exc).__name__}: {exc}"))

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._whole:
            self._fail(Lost("it says something that nobody asked for"))
            return
        try:
            self._parser.feed_data(data)
            if self._body:
                self._arrived()
        except (httptools.HttpParserError, Malformed) as exc:
            self._fail(Lost(f"{type(exc).__name__}: {exc}"))
        except Exception as exc:  # the tap's: whoever waits has to know of it
            self._fail(exc)

    def on_headers_complete(self) -> None:
        """As the parser calls it, like what follows."""
        assert self._parser is not None
        self.status = self._parser.get_status_code()
        self._wake()

    def on_body(self, body: bytes) -> None:
        """Several times for one piece that was read, which are looked at together."""
        self._body = self._body + body if self._body else body

    def on_message_complete(self) -> None:
        assert self._parser is not None
        self._whole, self._keeps = True, bool(self._parser.should_keep_alive())
        self._wake()

    def _arrived(self) -> None:
        body, self._body = self._body, b""
        if self.status != 200:
            self._refusal += body
            if len(self._refusal) > MOST_REFUSAL:
                raise Malformed(f"an answer of more than {MOST_REFUSAL} bytes with status {self.status}")
            return
        frames = self._frames.feed(body)
        if frames and self._tap is not None and self._waiter is not None and not self._waiter.done():
            frames = frames[self._tap(frames) :]
        if not frames:
            return
        self._ready.extend(frames)
        self._held += sum(len(payload) for _, payload in frames)
        if self._held > MOST_HELD and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, why: Exception) -> None:
        """Leaves nothing that refers to itself in a circle."""
        if self._failure is None:
            self._failure, self._parser = why, None
            if self._transport is not None:
                self._transport.abort()
            self._wake()


class Lines:
    """The lines of a gateway, used and idle. ``headers`` go with every order."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = headers
        self._idle: dict[str, list[tuple[Line, asyncio.TimerHandle]]] = {}  # by URL, the last used last

    async def order(self, url: str, path: str, body: bytes, headers: Mapping[str, str]) -> Line:
        """Posts ``body``; returns when the answer's head is there. Raises Lost, OSError and ValueError.

        To be given to ``release`` or aborted.
        """
        line = self._free(url) or await _connected(url)
        try:
            line.send(_head(url, path, len(body), {**self._headers, **headers}), body)
            await line.head()
        except BaseException:
            line.abort()
            raise
        return line

    def release(self, line: Line) -> None:
        """Keeps ``line`` for the next order, if its answer is whole; else ends it."""
        if line.reusable:
            timer = asyncio.get_running_loop().call_later(KEEP_ALIVE_S, self._drop, line)
            self._idle.setdefault(line.url, []).append((line, timer))
        else:
            line.abort()

    def close(self) -> None:
        """Ends what is idle; those in use are for their users to end."""
        for idle in self._idle.values():
            for line, timer in idle:
                timer.cancel()
                line.abort()
        self._idle.clear()

    def _free(self, url: str) -> Line | None:
        while idle := self._idle.get(url):
            line, timer = idle.pop()
            timer.cancel()
            if not idle:
                del self._idle[url]
            if line.reusable:
                return line
        return None

    def _drop(self, line: Line) -> None:
        kept = [one for one in self._idle.pop(line.url) if one[0] is not line]
        if kept:
            self._idle[line.url] = kept
        line.abort()


async def _connected(url: str) -> Line:
    at = urlsplit(url)
    port = at.port or (443 if at.scheme == "https" else 80)
    tls = _tls() if at.scheme == "https" else None
    async with AwakeTimeout(CONNECT_TIMEOUT_S):
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(lambda: Line(url), at.hostname or "", port, ssl=tls))[1]


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _head(url: str, path: str, length: int, headers: Mapping[str, str]) -> bytes:
    at = urlsplit(url)
    told = {
        "Host": at.netloc.rpartition("@")[2],
        "Content-Type": "application/octet-stream",
        "Content-Length": str(length),
        **headers,
    }
    lines = [
        f"POST {at.path.rstrip('/')}{path} HTTP/1.1",
        *(f"{name}: {text}" for name, text in told.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode()
