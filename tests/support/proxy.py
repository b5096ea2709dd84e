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
        assert self._server is not None
        self._server.close()
        self.drop()

    def swallow(self) -> None:
        """Every connection stays, new ones are taken, and not a byte comes through until ``mend``."""
        self._passing.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*self._to)
        self._writers |= {writer, back}
        await asyncio.gather(self._pipe(reader, back), self._pipe(there, writer))

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                await self._passing.wait()
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
