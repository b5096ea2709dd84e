"""An upload that the server fetches itself: ``{"source": URL}`` of a folder or an archive, if it is allowed.

Off unless the operator names prefixes. A source must begin with one of them, at the border of a path's part,
and so must whatever it redirects to; its host must not be a private address, unless the prefix itself is one.
http(s) is fetched here, so that the address that was checked is the one that is connected to; other schemes
(``file``, ``s3``, ``gs``) by fsspec, which needs its package for them.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import httpcore

from adapters.errors import UploadTooLarge
from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from adapters.store.archives import unpacked
from server.errors import Forbidden, Unprocessable

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
# Seconds: for the whole of it, and for a connection or the next piece.
TOTAL, STEP = 1800, 30
_REDIRECTS = 5
_BLOCK = 1 << 20
_WEB = ("http", "https")
_FAILURES = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    httpcore.UnsupportedProtocol,
    OSError,
    ValueError,  # a URL that none can be made of
)

Files = AsyncIterator[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class Allowed:
    """A source that may be fetched; ``private`` if its prefix names a private address."""

    url: str
    private: bool


def allow(source: str, prefixes: Sequence[str]) -> Allowed:
    """Raises Forbidden (``source_forbidden``) unless ``source`` lies under one of ``prefixes``."""
    parts = urlsplit(source)
    plain = unquote(source)
    tricks = "::" in source or "\\" in plain or not plain.isprintable() or ".." in plain.split("/")
    if not tricks and "@" not in parts.netloc:
        for prefix in prefixes:
            if source.startswith(prefix if prefix.endswith("/") else f"{prefix}/"):
                return Allowed(source, _is_private(urlsplit(prefix).hostname or ""))
    raise Forbidden(
        "This source may not be imported. Upload the files, or ask the operator to add a prefix of it to"
        " LORAPLEX_IMPORT_PREFIXES.",
        code="source_forbidden",
        param="source",
    )


def _is_private(host: str) -> bool:
    """Whether ``host`` is, as it is written, an address of this machine or of a private network."""
    try:
        return host == "localhost" or not ipaddress.ip_address(host).is_global
    except ValueError:
        return False


async def imported(
    source: str,
    prefixes: Sequence[str],
    folder: Path,
    *,
    max_bytes: int,
    counted: Callable[[AsyncIterator[bytes]], AsyncIterator[bytes]],
) -> Files:
    """The files at ``source``; an archive is kept in ``folder`` while it is read.

    ``counted`` sees the bytes of an archive while they come, and may raise.

    Raises Forbidden, Unprocessable (``source_unavailable``), UploadTooLarge, and what an archive leads to.
    """
    allow(source, prefixes)
    try:
        async with asyncio.timeout(TOTAL):
            if urlsplit(source).path.endswith(ARCHIVES):
                body = counted(_bytes_of(source, prefixes, max_bytes))
                async for entry in unpacked(body, folder, max_bytes=max_bytes):
                    yield entry
                return
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                async for piece in _bytes_of(f"{source.rstrip('/')}/{name}", prefixes, max_bytes):
                    yield name, piece
    except TimeoutError as error:
        raise _unavailable(f"it took more than {TOTAL} seconds") from error


async def _bytes_of(url: str, prefixes: Sequence[str], max_bytes: int) -> AsyncIterator[bytes]:
    received = 0
    pieces = _from_web(url, prefixes) if urlsplit(url).scheme in _WEB else _from_store(url, prefixes)
    async for piece in pieces:
        received += len(piece)
        if received > max_bytes:
            raise UploadTooLarge(f"The source is larger than the {max_bytes} bytes that are allowed.")
        yield piece


def _unavailable(why: str) -> Unprocessable:
    return Unprocessable(f"The source cannot be read: {why}.", code="source_unavailable", param="source")


async def _from_store(url: str, prefixes: Sequence[str]) -> AsyncIterator[bytes]:
    """Through fsspec, whose filesystems are asked in threads."""
    import fsspec

    if urlsplit(url).scheme == "file":
        real = await asyncio.to_thread(Path(unquote(urlsplit(url).path)).resolve)
        allow(real.as_uri(), prefixes)  # a link may lead out
    try:
        with await asyncio.to_thread(fsspec.open(url, "rb").open) as file:
            while piece := await asyncio.to_thread(file.read, _BLOCK):
                yield piece
    except Exception as error:  # each filesystem has its own
        raise _unavailable(type(error).__name__) from error


async def _from_web(url: str, prefixes: Sequence[str]) -> AsyncIterator[bytes]:
    timeout = dict.fromkeys(("connect", "read", "write", "pool"), STEP)
    try:
        for _ in range(_REDIRECTS + 1):
            allowed = allow(url, prefixes)
            async with (
                httpcore.AsyncConnectionPool(network_backend=_Guard(allowed.private)) as pool,
                pool.stream("GET", url, extensions={"timeout": timeout}) as response,
            ):
                headers = {name.lower(): value for name, value in response.headers}
                if response.status in (301, 302, 303, 307, 308) and b"location" in headers:
                    url = urljoin(url, headers[b"location"].decode("ascii", "replace"))
                    continue
                if response.status != 200:
                    raise _unavailable(f"it answered {response.status}")
                async for piece in response.aiter_stream():
                    yield piece
                return
        raise _unavailable(f"it redirects more than {_REDIRECTS} times")
    except _FAILURES as error:
        raise _unavailable(type(error).__name__) from error


async def look_up(host: str, port: int) -> list[Any]:
    return await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)


class _Guard(httpcore.AsyncNetworkBackend):
    """Connects to public addresses only, and to what it has looked at: a second look-up may say otherwise."""

    def __init__(self, private: bool) -> None:
        self._private = private
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        found = await look_up(host, port)
        address = str(found[0][4][0])
        if not self._private and any(_is_private(str(one[4][0]).split("%")[0]) for one in found):
            raise Forbidden(
                "The source's host has a private address. Name that address in LORAPLEX_IMPORT_PREFIXES if"
                " it is meant.",
                code="source_forbidden",
                param="source",
            )
        return await self._backend.connect_tcp(address, port, timeout, local_address, socket_options)
