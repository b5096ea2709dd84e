"""Host memory for adapters that is made once, at the start: one piece, pinned where there is a GPU.

Without it every tensor of every load is pinned alone: 448 calls of the driver for an adapter of an 8B Llama,
each under a lock that launches of kernels wait for, and blocks rounded up to powers of two. Here a file is
read straight into memory that is pinned already.

    Arena      which bytes of the piece are taken; pure
    HostPool   lends them to adapters; they are free again when nothing refers to them and the last copy out
               of them has ended
"""

from __future__ import annotations

import bisect
import ctypes
import logging
import mmap
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

from adapters.worker.host_memory import Buffer, BufferPool, whole

logger = logging.getLogger(__name__)

PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context


class Fence(Protocol):
    """A mark behind what a stream had been given when it was made; torch's events are such."""

    def query(self) -> bool:
        """Whether all of that has ended."""


class Arena:
    """Ranges of ``size`` bytes, none of them twice. The smallest gap that is large enough is used first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._gaps = [(0, size)] if size else []  # (first byte, bytes), by place; no two touch each other
        self._taken: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"Arena({self.size} bytes, free {self._gaps})"

    @property
    def free(self) -> int:
        return sum(length for _, length in self._gaps)

    def take(self, size: int) -> int | None:
        """The first byte of a range of ``size`` bytes, or None where no gap is so large."""
        fitting = [(length, at) for at, length in self._gaps if length >= size > 0]
        if not fitting:
            return None
        length, at = min(fitting)
        self._gaps.remove((at, length))
        if length > size:
            bisect.insort(self._gaps, (at + size, length - size))
        self._taken[at] = size
        return at

    def give_back(self, at: int) -> None:
        """The range that begins at ``at`` is free. KeyError if none was taken there."""
        length = self._taken.pop(at)
        place = bisect.bisect(self._gaps, (at, 0))
        if place < len(self._gaps) and self._gaps[place][0] == at + length:
            length += self._gaps.pop(place)[1]
        if place and sum(self._gaps[place - 1]) == at:
            before, more = self._gaps.pop(place - 1)
            at, length = before, more + length
        bisect.insort(self._gaps, (at, length))


class HostPool(BufferPool):
    """A piece of ``size`` bytes, lent in ranges; what does not fit is lent as ``BufferPool`` does.

    ``pin`` is told address and bytes of the piece, once; it raises RuntimeError or OSError if that cannot be,
    and the pool does without. ``settle`` is to be called on the engine's thread, every other method may run
    on any.
    """

    def __init__(
        self, size: int, entry: int, keep: int, pin: Callable[[int, int], None] | None = None
    ) -> None:
        super().__init__(entry, keep)
        self._arena = Arena(whole(size) if size > 0 else 0)
        self._piece: mmap.mmap | None = None
        self._left: list[int] = []  # ranges that nothing refers to; a copy may still read them
        self._behind: list[tuple[Fence, list[int]]] = []
        self._fenced = False
        self._begin = 0  # the piece's address
        self.misses = 0
        self.pinned = False
        if not self._arena.size:
            return
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._piece = mmap.mmap(-1, self._arena.size, flags=flags)
        self._begin = ctypes.addressof(ctypes.c_char.from_buffer(self._piece))
        if pin is not None:
            self._pin(self._piece, pin)

    def _pin(self, piece: mmap.mmap, pin: Callable[[int, int], None]) -> None:
        place = ctypes.c_char.from_buffer(piece)
        try:
            pin(ctypes.addressof(place), len(piece))
        except (RuntimeError, OSError) as exc:
            logger.warning("host memory for adapters could not be pinned at the start: %s", exc)
            self._arena, self._piece = Arena(0), None
        else:
            self.pinned = self._fenced = True

    def __repr__(self) -> str:
        return f"HostPool({self._arena!r}, {len(self._left)} left, beside it {super().__repr__()})"

    @property
    def size(self) -> int:
        return self._arena.size

    def account(self) -> dict[str, int]:
        """``bytes`` of the piece, how many are ``free``, whether ``pinned``; ``misses`` did not fit in."""
        with self._lock:
            self._free_what_ended()
            free = self._arena.free
        return {"bytes": self.size, "free": free, "pinned": int(self.pinned), "misses": self.misses}

    def touch(self) -> None:
        """Makes the piece's pages: page faults during a step slow it down several times. Before the first."""
        if self._piece is not None and not self.pinned:
            place = ctypes.c_char.from_buffer(self._piece)
            ctypes.memset(ctypes.addressof(place), 0, self.size)

    def lend(self, size: int) -> Buffer:
        """As ``BufferPool.lend``."""
        length = whole(size)
        with self._lock:
            self._free_what_ended()
            at = self._arena.take(length)
            if at is None:
                self.misses += self._arena.size > 0
        if at is None or self._piece is None:
            return super().lend(size)
        buffer = (ctypes.c_char * length).from_buffer(self._piece, at)
        # The collector may end a buffer in the middle of any method here: all that it does is this.
        weakref.finalize(buffer, self._left.append, at).atexit = False
        return buffer

    def tensor(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """As there; pinned where the piece is, also if it did not fit in: then by one call of the driver."""
        found = super().tensor(elements, dtype)
        return found if not self.pinned or self.holds(found) else found.pin_memory()

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` lies in the piece."""
        return self._begin <= tensor.data_ptr() < self._begin + self.size

    def settle(self, fence: Callable[[], Fence]) -> None:
        """Frees what was left, once all that ``fence`` marks now has ended."""
        with self._lock:
            self._free_what_ended()
            if self._fenced and (count := len(self._left)):
                self._behind.append((fence(), [self._left.pop(0) for _ in range(count)]))

    def _free_what_ended(self) -> None:
        """Fences of one stream end in the order in which they were made."""
        while self._left and not self._fenced:
            self._arena.give_back(self._left.pop())
        while self._behind and self._behind[0][0].query():
            for at in self._behind.pop(0)[1]:
                self._arena.give_back(at)


def pin_for_cuda(address: int, size: int) -> None:
    """Lets the GPU copy from there. RuntimeError where the driver refuses."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    # The result is an enumeration of C's, which no number equals; torch asks for its number too.
    if code := int(runtime.cudaHostRegister(address, size, PORTABLE)):
        raise RuntimeError(f"cudaHostRegister of {size} bytes: error {code}")
