"""A way to a database that can be cut, as by a restart, a failover or a network that fails."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Proxy:
    """Listens on 127.0.0.1 and passes bytes on to ``host``:``port`` while it is not cut."""

    def __init__(self, host: str, port: int) -> None:
        self.port = 0
        self._to = host, port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._passing = asyncio.Event()
        self._passing.set()
        self._delay = 0.0
        self._losing: tuple[bytes, bool, bool] | None = None

    async def mend(self) -> None:
        """New connections come through from now on."""
        self._passing.set()
        if self._server is not None and self._server.is_serving():
            return
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def drop(self) -> None:
        """Ends every connection that is open; new ones come through."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def cut(self) -> None:
        """Ends every connection, and refuses new ones."""
        self.refuse()
        self.drop()

    def refuse(self) -> None:
        """Refuses new connections."""
        assert self._server is not None
        self._server.close()

    def swallow(self) -> None:
        """Every connection stays, new ones are taken, and not a byte comes through until ``mend``."""
        self._passing.clear()

    def slow_down(self, seconds: float) -> None:
        """Each piece comes through so much later; 0 ends it."""
        self._delay = seconds

    def lose(self, piece: bytes, *, passes: bool, cut: bool = False) -> None:
        """The connection that sends ``piece`` next gets no answer and ends: whether the other end has it
        says ``passes``. ``cut`` then refuses new connections.
        """
        self._losing = piece, passes, cut

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*self._to)
        self._writers |= {writer, back}
        await asyncio.gather(self._pipe(reader, back, writer), self._pipe(there, writer))

    async def _pipe(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answers: asyncio.StreamWriter | None = None,
    ) -> None:
        """``answers`` is the way back."""
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                await self._passing.wait()
                if self._delay:
                    await asyncio.sleep(self._delay)
                if answers is not None and self._losing and self._losing[0] in data:
                    (_, passes, cut), self._losing = self._losing, None
                    if passes:
                        writer.write(data)
                        await writer.drain()
                    answers.transport.abort()
                    if cut:
                        self.refuse()
                    break
                writer.write(data)
        writer.close()


@asynccontextmanager
async def proxy(host: str, port: int) -> AsyncIterator[Proxy]:
    """Open when the block begins, cut when it ends."""
    made = Proxy(host, port)
    await made.mend()
    try:
        yield made
    finally:
        made.cut()
