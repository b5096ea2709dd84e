"""What hostile inputs are sent with: the server under attack, single requests, and raw bytes."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

MIB = 1 << 20
# Seconds after which a request is given up; what takes longer counts as "no answer".
PATIENCE = 12.0
# Once: each client that reads certificates costs the controls, which run in the same process, 20 ms.
TLS = httpx.create_ssl_context()


@dataclass(frozen=True)
class Victim:
    """The server under attack: its address, the attacker's key, a gateway's key, and the operator's calls.

    ``attacker`` is a customer who may upload adapters; ``small`` one whose adapters may take 2 MB.
    """

    url: str
    port: int
    base: Path
    base_name: str
    attacker: str
    small: str
    service: str
    control: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.attacker}"}


Outcomes = Counter[str]
Attack = Callable[[Victim], Coroutine[None, None, Outcomes]]


async def post(victim: Victim, path: str, **content: Any) -> str:
    """The status of one request, or ``no answer`` or ``closed``."""
    headers = victim.headers | content.pop("headers", {})
    async with httpx.AsyncClient(base_url=victim.url, timeout=PATIENCE, trust_env=False, verify=TLS) as http:
        try:
            return str((await http.post(path, headers=headers, **content)).status_code)
        except httpx.TimeoutException:
            return "no answer"
        except httpx.HTTPError:
            return "closed"


async def together(*sent: Awaitable[str]) -> Outcomes:
    return Counter(await asyncio.gather(*sent))


async def raw(victim: Victim, *pieces: bytes, most: int = 1, seconds: float = PATIENCE) -> str:
    """Send ``pieces``, the last of them up to ``most`` times; the status of what comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", victim.port)
    try:
        async with asyncio.timeout(seconds):
            for piece in pieces[:-1]:
                writer.write(piece)
            for _ in range(most):
                writer.write(pieces[-1])
                await writer.drain()
            line = await reader.readline()
            return line.split()[1].decode() if line else "closed"
    except TimeoutError:
        return "no answer"
    except ConnectionError:
        return "closed"
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def head(path: str, *lines: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: a", *lines, "", ""]).encode()
