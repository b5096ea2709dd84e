"""A process that stood still judges nobody by its clock before it has read what came meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from adapters.awake import GRACE_S, AwakeClock
from server.http.connection import BoundedHeads
from server.http.streams import LeasedResponse
from server.publishing.intake import SLOW_AFTER_S, SLOW_BYTES_S, Intake
from tests.support import clock
from tests.support.clock import stand_still

REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


class Transport:
    """What a connection writes to; ``answers`` counts what it wrote."""

    def __init__(self) -> None:
        self.answers, self.closed = 0, False

    def write(self, data: bytes) -> None:
        self.answers += data.count(b"HTTP/1.1 ")

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def connected() -> tuple[BoundedHeads, Transport]:
    config = uvicorn.Config(app, log_config=None, timeout_keep_alive=5, lifespan="off")  # type: ignore[arg-type]
    config.load()
    made = BoundedHeads(config, ServerState(), {}, asyncio.get_running_loop())
    transport = Transport()
    made.connection_made(transport)
    return made, transport


async def until(done: Callable[[], bool]) -> None:
    for _ in range(10):
        await asyncio.sleep(0)
    assert done()


# With 5.2 the limit of five seconds ends just before the pause does.
@pytest.mark.parametrize("seconds", [5.2, 60])
def test_a_request_that_came_meanwhile_is_answered_on_its_idle_connection(seconds: float) -> None:
    async def scenario() -> None:
        made, transport = connected()
        made.data_received(REQUEST)
        await until(lambda: transport.answers == 1)
        stand_still(seconds)
        for _ in range(2):
            await asyncio.sleep(0)  # the timers that are due, which uvloop calls before it reads
        assert not transport.closed
        made.data_received(REQUEST)
        await until(lambda: transport.answers == 2)
        await asyncio.sleep(4)
        assert not transport.closed
        await asyncio.sleep(2)
        assert transport.closed, "idle for five seconds, in which the process ran"

    clock.run(scenario())


def test_an_idle_connection_on_which_nothing_came_is_closed() -> None:
    async def scenario() -> None:
        made, transport = connected()
        made.data_received(REQUEST)
        await until(lambda: transport.answers == 1)
        stand_still(60)
        await asyncio.sleep(2 * GRACE_S)
        assert transport.closed

    clock.run(scenario())


def test_a_head_whose_rest_came_meanwhile_is_answered() -> None:
    async def scenario() -> None:
        made, transport = connected()
        made.data_received(REQUEST[:10])
        stand_still(600)
        await asyncio.sleep(0)
        assert not transport.closed
        made.data_received(REQUEST[10:])
        await until(lambda: transport.answers == 1)
        assert not transport.closed

        late, its = connected()
        late.data_received(REQUEST[:10])
        await asyncio.sleep(BoundedHeads.seconds + 1)
        assert (its.answers, its.closed) == (1, True), "408, as ever"

    clock.run(scenario())


class Stream:
    async def __aiter__(self) -> AsyncIterator[str]:
        yield "data: 1\n\n"
        yield "data: 2\n\n"

    async def aclose(self) -> None:
        pass


def test_a_client_that_read_meanwhile_is_not_taken_for_one_that_does_not() -> None:
    async def scenario(reads: bool) -> int:
        sent = []
        room = asyncio.Event()

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) == 2:
                asyncio.get_running_loop().call_soon(stand_still, 600)
                await room.wait()  # the socket is full

        async def receive() -> Any:
            await asyncio.Event().wait()

        response = LeasedResponse(Stream(), None, {}, client_timeout=60, keepalive=0)  # type: ignore[arg-type]
        answering = asyncio.create_task(response({"type": "http", "method": "POST"}, receive, send))
        while len(sent) < 2:
            await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)  # what was due is done
        if reads:
            room.set()
        await answering
        return len(sent)

    assert clock.run(scenario(True)) == 4, "the head, two pieces, the end"
    assert clock.run(scenario(False)) == 2, "left after a while"


def test_a_limit_that_is_due_as_a_pause_ends_waits_for_what_was_read_meanwhile() -> None:
    """A timer that is hardly late tells nothing of the pause before it."""

    async def scenario(reads: bool) -> tuple[int, float]:
        loop, sent, room = asyncio.get_running_loop(), 0, asyncio.Event()

        async def send(message: Any) -> None:
            nonlocal sent
            sent += 1
            if sent == 2:
                await room.wait()

        async def receive() -> Any:
            await asyncio.Event().wait()

        response = LeasedResponse(Stream(), None, {}, client_timeout=60, keepalive=0)  # type: ignore[arg-type]
        began = loop.time()
        answering = asyncio.create_task(response({"type": "http", "method": "POST"}, receive, send))
        await asyncio.sleep(10)
        stand_still(began + 60.5 - loop.time())
        for _ in range(5):
            await asyncio.sleep(0)  # what was due is done
        if reads:
            room.set()
        await answering
        return sent, loop.time() - began

    assert clock.run(scenario(True))[0] == 4, "the head, two pieces, the end"
    sent, seconds = clock.run(scenario(False))
    assert sent == 2
    assert seconds < 62, "left after a moment"


def test_an_upload_is_not_slow_for_a_pause_of_the_server(tmp_path: Path) -> None:
    async def scenario(still: bool) -> bool:
        async def used(_: str) -> int:
            return 0

        intake = Intake([tmp_path], used, most=1, each=1, reserve=0)
        intake.clock = AwakeClock(1.0, asyncio.get_running_loop().time)

        async def room() -> None:
            pass

        intake.check_disk = room  # type: ignore[method-assign]  # no thread runs in virtual time

        async def body() -> AsyncIterator[bytes]:
            yield b"x" * int(4 * SLOW_AFTER_S * SLOW_BYTES_S // 10)

        async with intake.enter("acme") as place:
            async for _ in place.counted(body()):
                pass
            await asyncio.sleep(1)
            if still:
                stand_still(600)
            else:
                await asyncio.sleep(600)
            gave_way = intake._make_room()
            if gave_way:
                place.scope.reschedule(None)
        return gave_way

    assert not clock.run(scenario(still=True))
    assert clock.run(scenario(still=False))
