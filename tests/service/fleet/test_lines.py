"""Connections to replicas: frames that are taken as they come, frames that wait, and lines that break."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from server.fleet import lines
from server.fleet.lines import Frame, Line, Lines, Lost
from server.fleet.wire import Kind, frame
from server.http.pieces import Pieces, offer
from server.http.streams import Way
from tests.support import tiny
from tests.support.fakes import Times
from tests.support.fleet import Fleet, fleet
from tests.support.fleet_answers import body, read, told, usage

WITHIN_S = 120
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def said(number: int) -> bytes:
    return frame(Kind.CHUNK, b"%d" % number)


@dataclass
class Replica:
    """Answers the orders of every connection in turn, each by the next of ``answers``."""

    url: str = ""
    answers: list[Answer] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    connections: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while self.answers:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                self.heads.append(head + await reader.readexactly(length))
                await self.answers.pop(0)(writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def replica(
    *answers: Answer, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[Replica, Lines]]:
    made, known = Replica(answers=list(answers)), Lines({"Authorization": "Bearer key"})
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, ssl=tls)
    site = "https://localhost" if tls is not None else "http://127.0.0.1"
    made.url = f"{site}:{server.sockets[0].getsockname()[1]}"
    async with asyncio.timeout(WITHIN_S):
        try:
            yield made, known
        finally:
            known.close()
            server.close()


async def ordered(known: Lines, made: Replica) -> Line:
    return await known.order(made.url, "/open", b"{}", {"traceparent": "00-1"})


async def three(writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + b"".join(chunk(said(n)) for n in range(3)) + chunk(frame(Kind.END, b"{}")) + END)


async def test_frames_come_in_order_and_the_next_order_takes_the_same_connection() -> None:
    async with replica(three, three) as (made, known):
        for _ in range(2):
            line = await ordered(known, made)
            assert [await line.next() for _ in range(3)] == [(Kind.CHUNK, b"%d" % n) for n in range(3)]
            assert await line.next() == (Kind.END, b"{}")
            await line.end()
            known.release(line)
        assert made.connections == 1
        (first, _) = made.heads
        assert first.startswith(b"POST /open HTTP/1.1\r\nHost: 127.0.0.1:")
        assert b"Authorization: Bearer key\r\ntraceparent: 00-1\r\n" in first


def test_the_loop_that_servers_run_on_has_transports_of_its_own() -> None:
    async def scenario() -> None:
        async with replica(three) as (made, known):
            line = await ordered(known, made)
            assert await line.next(lambda frames: 0) == (Kind.CHUNK, b"0")
            line.abort()

    uvloop.run(scenario())


async def test_a_tap_takes_frames_while_somebody_waits_and_others_wake_him_up() -> None:
    go_on = asyncio.Event()

    async def slowly(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        for number in range(4):
            await go_on.wait()
            go_on.clear()
            whole = chunk(said(2 * number) + said(2 * number + 1))
            writer.write(whole[:7])  # in the middle of a frame
            await asyncio.sleep(0.01)
            writer.write(whole[7:])
        await go_on.wait()
        writer.write(chunk(said(8) + frame(Kind.MOVE, b"{}") + said(9)))

    taken: list[bytes] = []

    def tap(frames: Sequence[Frame]) -> int:
        for at, (kind, payload) in enumerate(frames):
            if kind is not Kind.CHUNK or payload == b"5":
                return at
            taken.append(payload)
        go_on.set()
        return len(frames)

    async with replica(slowly) as (made, known):
        line = await ordered(known, made)
        go_on.set()
        assert await line.next(tap) == (Kind.CHUNK, b"5"), "refused, so it waits"
        assert taken == [b"0", b"1", b"2", b"3", b"4"]
        go_on.set()
        assert await line.next(tap) == (Kind.MOVE, b"{}")
        assert taken[5:] == [b"6", b"7", b"8"]
        assert line.take(Kind.END) is None
        assert line.take(Kind.CHUNK) == b"9", "nothing behind a frame that was not taken is"
        line.abort()


async def test_what_a_tap_raises_is_raised_to_whoever_waits() -> None:
    def wrong(_: Sequence[Frame]) -> int:
        raise ZeroDivisionError

    async def later(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(chunk(said(0)))

    async with replica(later) as (made, known):
        line = await ordered(known, made)
        with pytest.raises(ZeroDivisionError):
            await line.next(wrong)
        assert not line.reusable


async def test_nothing_more_is_read_for_somebody_who_takes_nothing() -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        while True:
            writer.write(chunk(frame(Kind.CHUNK, bytes(64 << 10))))
            await writer.drain()

    async with replica(endless) as (made, known):
        line = await ordered(known, made)
        while not line._paused:
            await asyncio.sleep(0)
        held, taken = line._held, 0
        assert held <= lines.MOST_HELD + (2 << 20), "what one read may add"
        while taken < 4 * held:  # it is read on as soon as there is room
            taken += len((await line.next())[1])
            assert line._held <= held + (2 << 20)
        line.abort()


@pytest.mark.parametrize(
    "ends",
    [b"", chunk(b"\0\0\0\0\xff"), b"no chunk\r\n", chunk(said(1))[:-4]],
    ids=["closed", "no frame", "no chunk", "in a frame"],
)
async def test_a_connection_that_breaks_is_lost_behind_what_it_has_said(ends: bytes) -> None:
    async def breaks(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunk(said(0)))
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.write(ends)
        writer.close()

    async with replica(breaks, three) as (made, known):
        line = await ordered(known, made)
        assert await line.next() == (Kind.CHUNK, b"0")
        for _ in range(2):
            with pytest.raises(Lost):
                await line.next()
        known.release(line)
        again = await ordered(known, made)
        assert again is not line
        assert await again.next() == (Kind.CHUNK, b"0")
        again.abort()


async def test_who_waits_is_told_that_a_line_is_given_up() -> None:
    async def silent(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        await asyncio.Event().wait()

    async with replica(silent) as (made, known):
        line = await ordered(known, made)
        waiting = asyncio.ensure_future(line.next())
        await asyncio.sleep(0)
        line.abort()
        with pytest.raises(Lost):
            await waiting


async def test_a_refusal_is_read_whole_and_one_that_closes_is_not_used_again() -> None:
    async def refuses(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 401 Unauthorized\r\nconnection: close\r\ncontent-length: 6\r\n\r\nno")
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.write(b" way")

    async with replica(refuses, three) as (made, known):
        line = await ordered(known, made)
        assert (line.status, await line.refusal()) == (401, b"no way")
        known.release(line)
        assert not line.reusable
        (await ordered(known, made)).abort()
        assert made.connections == 2


async def test_an_idle_line_that_its_replica_closes_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def and_leaves(writer: asyncio.StreamWriter) -> None:
        await three(writer)
        writer.close()

    async with replica(and_leaves, three, three) as (made, known):
        line = await ordered(known, made)
        await line.end()
        while await line.next() != (Kind.END, b"{}"):
            pass
        known.release(line)
        while line.reusable:
            await asyncio.sleep(0.01)
        second = await ordered(known, made)
        assert second is not line
        while await second.next() != (Kind.END, b"{}"):
            pass
        await second.end()
        monkeypatch.setattr(lines, "KEEP_ALIVE_S", 0.01)
        known.release(second)
        while second.reusable:  # it is given up in time, too
            await asyncio.sleep(0.01)
        assert known._idle == {}


async def test_a_replica_behind_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = certified("localhost", tmp_path)
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain(certificate, key)
    monkeypatch.setattr(lines, "_tls", lambda: ssl.create_default_context(cafile=certificate))
    async with replica(three, tls=ours) as (made, known):
        line = await ordered(known, made)
        assert [await line.next() for _ in range(4)][-1] == (Kind.END, b"{}")
        line.abort()
        made.url = made.url.replace("localhost", "127.0.0.1")  # which the certificate is not for
        with pytest.raises(OSError):
            await ordered(known, made)


def certified(name: str, folder: Path) -> tuple[Path, Path]:
    """A certificate for ``name`` and its key, as files."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(
        subject, subject, key.public_key(), 1, now - timedelta(days=1), now + timedelta(days=1)
    ).add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    plain = Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    files[1].write_bytes(key.private_bytes(*plain))
    return files


async def test_nobody_listens() -> None:
    async with replica() as (made, known):
        made.url = "http://127.0.0.1:1"
        with pytest.raises(OSError):
            await ordered(known, made)


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with fleet(tmp_path, 1, Times(step=0.002)) as made:
        yield made


@pytest.mark.parametrize("reads", ["always", "never", "now and then"])
async def test_an_answer_is_the_same_whichever_way_its_chunks_go(
    one: Fleet, reads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the tasks to a client who reads, and by them where he may not be reading."""
    asked = taken = 0

    def ready(way: Way) -> bool:
        nonlocal asked
        asked += 1
        held_up = reads == "never" or (reads == "now and then" and asked % 3 == 0)
        return not held_up and way._pieces is not None and way._pieces.ready()

    def counted(way: Way, text: str) -> None:
        nonlocal taken
        taken += 1
        take(way, text)

    take = Way.take
    monkeypatch.setattr(Way, "ready", ready)
    monkeypatch.setattr(Way, "take", counted)
    key = await one.gateway.tenant("acme", {"a": tiny.adapter(1)})
    text, used = told(await read(one.gateway, key, body(60)))
    digest = text.partition(" ")[0]
    assert text == digest + "".join(f" {n}" for n in range(1, 60))
    assert used["completion_tokens"] == 60
    assert {"always": taken > 0, "never": taken == 0, "now and then": 0 < taken < asked}[reads]
    (row,) = await usage(one)
    assert (row["outcome"], row["output_tokens"]) == ("completed", 60)


def test_a_copy_of_a_scope_has_no_pieces() -> None:
    """As one that HEAD is answered with, whose body nobody is to get."""

    class Cycle:
        def __init__(self) -> None:
            self.scope: dict[str, object] = {}
            self.flow = self.transport = self
            self.write = print

    cycle = Cycle()
    offer(cycle)
    assert Pieces.of(cycle.scope) is not None
    assert Pieces.of({**cycle.scope, "method": "GET"}) is None
    assert Pieces.of({}) is None
