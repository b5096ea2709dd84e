"""Workers that say by themselves that a load has ended."""

from __future__ import annotations

import asyncio
import socket

import pytest

from adapters.worker.notices import Teller, teller
from server.engine.notices import Notices


async def opened() -> tuple[Notices, asyncio.Event]:
    notices, heard = Notices.open(), asyncio.Event()
    assert notices is not None
    notices.listen(heard.set)
    return notices, heard


async def test_a_notice_from_any_thread_is_heard() -> None:
    notices, heard = await opened()
    made = teller((notices.address, notices.token))
    assert made is not None
    for _ in range(3):
        heard.clear()
        assert await asyncio.to_thread(made.tell)
        async with asyncio.timeout(60):
            await heard.wait()
    notices.close()
    notices.close()
    assert not made.tell(), "nobody is there any more, and nothing is raised"


async def test_what_has_not_the_token_is_not_heard() -> None:
    notices, heard = await opened()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        for sent in (b"", b"0" * 32, b"x" * 5000):
            other.sendto(sent, notices.address)
    stranger = Teller(notices.address, "0" * 32)
    assert stranger.tell()
    await asyncio.sleep(0.05)
    assert not heard.is_set()
    notices.close()


@pytest.mark.parametrize("given", [None, ("\0loraplex-nobody", "t"), ("/no/such/folder/socket", "t")])
def test_where_nobody_hears_there_is_none_to_tell(given: tuple[str, str] | None) -> None:
    assert teller(given) is None
