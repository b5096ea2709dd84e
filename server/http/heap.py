"""What hostile and large requests leave in the C library's heap goes back to the system.

glibc takes a block from the heap rather than as a mapping of its own once a block of that size was freed
before: after one body of 4 MiB all of them lie between what small objects stay behind, and their room is
never given back. In twenty minutes of hostile input the heap of this process grew by a sixth, and not a
byte more of it was in use.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache

LARGE = 256 << 10  # bytes, from which a block is a mapping of its own
LOOK_S = 30.0
LEFT = 16 << 20  # bytes that are free in the heap and not worth a look
_MMAP_THRESHOLD = -3  # of mallopt(3)


class _Info(ctypes.Structure):
    """``struct mallinfo2``."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
            "keepcost",
        )
    )  # fmt: skip


@cache
def _libc() -> ctypes.CDLL | None:
    """glibc; None where the C library is another one."""
    with contextlib.suppress(OSError, AttributeError):
        found = ctypes.CDLL(None)
        found.mallinfo2.restype = _Info
        found.malloc_trim.argtypes = (ctypes.c_size_t,)
        return found
    return None


def keep_large_blocks_apart() -> None:
    """From now on, whatever was freed before; nothing where the C library is not glibc."""
    if (libc := _libc()) is not None:
        libc.mallopt(_MMAP_THRESHOLD, LARGE)


def free_bytes() -> int:
    """Bytes of the heap that nobody uses; 0 where that is not known."""
    libc = _libc()
    return int(libc.mallinfo2().fordblks) if libc is not None else 0


def give_back() -> None:
    """Whole pages of the heap that nobody uses. Takes some milliseconds, without Python's lock."""
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)


@asynccontextmanager
async def trimmed() -> AsyncIterator[None]:
    """Every ``LOOK_S`` seconds while the block runs, in a thread, where there is something to give back."""
    task = asyncio.create_task(_trim())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _trim() -> None:
    while True:
        await asyncio.sleep(LOOK_S)
        await asyncio.to_thread(_trim_once)


def _trim_once() -> None:
    if free_bytes() > LEFT:
        give_back()
