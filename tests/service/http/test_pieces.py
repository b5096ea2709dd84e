"""Pieces of an answer that go straight onto their connection, to clients who read and to others."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from server.http.connection import BoundedHeads
from server.http.streams import LeasedResponse

WITHIN_S = 120
PIECE = "x" * (64 << 10)
# What the sockets of both sides, and the buffer between, hold at most.
MOST_HELD = 64 << 20


class Stream:
    """``count`` pieces, or as many as are taken."""

    def __init__(self, count: int | None = None) -> None:
        self.left = count
        self.taken = 0
        self.closed = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[str]:
        while self.left is None or self.taken < self.left:
            self.taken += 1
            yield PIECE
            await asyncio.sleep(0)

    async def aclose(self) -> None:
        self.closed.set()


class App:
    """Answers with ``stream``; counts the messages that go the long way."""

    def __init__(self, stream: Stream, client_timeout: float = 60.0) -> None:
        self.stream = stream
        self.pieces = 0
        self._timeout = client_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Any) -> None:
            self.pieces += bool(message.get("body"))
            await send(message)

        answer = LeasedResponse(self.stream, None, {}, self._timeout, keepalive=0)  # type: ignore[arg-type]
        await answer(scope, receive, counted)


@asynccontextmanager
async def client_of(app: App) -> AsyncIterator[socket.socket]:
    """One that has asked and has read nothing."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, http=BoundedHeads, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        assert not task.done()
        await asyncio.sleep(0.01)
    address = server.servers[0].sockets[0].getsockname()
    with socket.socket() as client:
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, address)
        await asyncio.get_running_loop().sock_sendall(client, b"POST / HTTP/1.1\r\nhost: a\r\n\r\n")
        async with asyncio.timeout(WITHIN_S):
            yield client
    server.should_exit = server.force_exit = True
    await task


async def test_a_client_who_reads_has_all_of_it_past_asgi() -> None:
    app = App(Stream(40))
    async with client_of(app) as client:
        got = bytearray()
        while not got.endswith(b"\r\n0\r\n\r\n"):
            got += await asyncio.get_running_loop().sock_recv(client, 1 << 20)
    head, _, body = bytes(got).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert body == b"10000\r\n%b\r\n" % PIECE.encode() * 40 + b"0\r\n\r\n"
    assert app.pieces < 40


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_client_who_does_not_read_holds_little_and_is_left(leaves: bool) -> None:
    app = App(Stream(), client_timeout=3600.0 if leaves else 0.3)
    async with client_of(app) as client:
        if leaves:
            while not app.pieces:  # one that has to wait
                await asyncio.sleep(0.01)
            client.close()
        await app.stream.closed.wait()
    assert app.pieces >= 1
    assert app.stream.taken * len(PIECE) < MOST_HELD
