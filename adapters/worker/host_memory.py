"""How an adapter's weights get from its file into host memory, in an engine's worker.

``safetensors`` maps the file, which costs the engine's process three things: page faults, for the file and
for the memory that the tensors are copied to, beside which an engine step may take several times as long; 64
bytes for every tensor of every load, which ``get_tensor`` never gives back; and its life, should the file be
cut short meanwhile. Here the file is read, into memory whose pages are there:

    region   memory mapped from the system, as large as an adapter can be; its pages come at the first write
    buffer   a region in use by all the tensors of one adapter; it is free when the last of them is gone
    free     a region for the next adapter: used by one before, or prefaulted before the first
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import sys
import threading
import weakref
from collections.abc import KeysView

import torch

from adapters.inspection.dora import is_doras
from adapters.inspection.safetensors_header import ITEM_BYTES, TensorHeader, read_entries
from adapters.inspection.tensor_stats import TORCH_DTYPES

TURN_S = 0.0005
_MIB = 1 << 20

Buffer = ctypes.Array[ctypes.c_char]


class BufferPool:
    """Hands out memory for adapters and takes it back by itself; every method may run on any thread.

    ``size`` is the least that a buffer has, in bytes, rounded up to MiB. The ``keep`` largest free regions
    are kept for later; the system gets back the others.
    """

    def __init__(self, size: int, keep: int) -> None:
        self._size = whole(size)
        self._keep = keep
        self._free: list[mmap.mmap] = []  # the smallest first
        # A buffer may be collected wherever the garbage collector runs, in the middle of these methods too:
        # then its region waits here until the method has ended.
        self._returned: list[mmap.mmap] = []
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"BufferPool(free {[len(region) // _MIB for region in self._free]} MiB)"

    def prefault(self, at_most: int) -> None:
        """Makes as many free regions as ``at_most`` bytes allow and touches their pages.

        Called before the first engine step: page faults during one slow it down several times.
        """
        count = min(self._keep, at_most // self._size)
        buffers = [self.lend(self._size) for _ in range(count)]
        for buffer in buffers:
            ctypes.memset(buffer, 0, len(buffer))

    def lend(self, size: int) -> Buffer:
        """A buffer of at least ``size`` bytes, whose contents are undefined.

        Its memory goes back to the pool when nothing refers to the buffer any more.
        """
        with self._lock:
            self._keep_returned()
            region = next((region for region in self._free if len(region) >= size), None)
            if region is not None:
                self._free.remove(region)
        if region is None:
            length = max(whole(size), self._size)
            region = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        buffer = (ctypes.c_char * len(region)).from_buffer(region)
        weakref.finalize(buffer, self._take_back, region).atexit = False
        return buffer

    def tensor(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat tensor in a buffer of its own; its contents are undefined."""
        buffer = self.lend(max(1, elements) * dtype.itemsize)
        return torch.frombuffer(buffer, dtype=dtype)[:elements]

    def _take_back(self, region: mmap.mmap) -> None:
        """Must not wait: who has the lock may be the method that this has interrupted."""
        self._returned.append(region)
        if self._lock.acquire(blocking=False):
            try:
                self._keep_returned()
            finally:
                self._lock.release()

    def _keep_returned(self) -> None:
        while self._returned:
            self._free = sorted([*self._free, self._returned.pop()], key=len)[-self._keep :]


def whole(size: int) -> int:
    """In whole MiB, because ctypes remembers every length that an array has had."""
    return -(-max(size, 1) // _MIB) * _MIB


def _tensors(file: int) -> tuple[int, dict[str, TensorHeader]]:
    """As ``read_entries``. Raises ValueError where the tensors do not fill the file, which only damage does:
    the full check at publication takes longer than a load may keep Python's lock.
    """
    begin, tensors = read_entries(file)
    at = 0
    for name, tensor in tensors.items():
        if (tensor.begin, tensor.end) != (at, at + tensor.elements * ITEM_BYTES[tensor.dtype]):
            raise ValueError(f"the weights are damaged: {name} has another size or place than it should")
        at = tensor.end
    if (size := os.fstat(file).st_size) != begin + at:
        raise ValueError(f"the weights are damaged: they end at byte {begin + at} of {size}")
    return begin, tensors


class Weights:
    """An adapter's tensors by name, with what vLLM uses of ``safe_open``."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *exc: object) -> None:
        self._tensors = {}

    def keys(self) -> KeysView[str]:
        return self._tensors.keys()

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]


class Loader:
    """Reads adapters' files into buffers of ``pool``, and converts their tensors to ``dtype``."""

    def __init__(self, pool: BufferPool, dtype: torch.dtype) -> None:
        self._pool = pool
        self._dtype = dtype

    def open(self, path: str, framework: str = "pt") -> Weights:
        """Raises OSError, and ValueError, KeyError or TypeError where the file is not what was published."""
        with open(path, "rb", buffering=0) as file:
            data, tensors = _tensors(file.fileno())
            # Where each tensor begins in the result, in elements.
            starts = list(itertools.accumulate((t.elements for t in tensors.values()), initial=0))
            buffer = self._pool.lend(starts[-1] * self._dtype.itemsize)
            flat = torch.frombuffer(buffer, dtype=self._dtype)
            placed = zip(starts, tensors.values(), strict=False)
            for name, group in itertools.groupby(placed, key=lambda pair: pair[1].dtype):
                run = list(group)
                (start, first), (_, last) = run[0], run[-1]
                dtype, size, begin = TORCH_DTYPES[name], last.end - first.begin, data + first.begin
                if dtype == self._dtype:
                    at = start * dtype.itemsize
                    _fill(memoryview(buffer)[at : at + size], file.fileno(), begin)
                elif size:
                    source = self._pool.lend(size)
                    _fill(memoryview(source)[:size], file.fileno(), begin)
                    count = size // dtype.itemsize
                    flat[start : start + count].copy_(torch.frombuffer(source, dtype=dtype, count=count))
        views = {
            name: flat[start : start + tensor.elements].view(tensor.shape)
            for start, (name, tensor) in zip(starts, tensors.items(), strict=False)
            if not is_doras(name)  # which vLLM would refuse: see adapters.worker.dora
        }
        return Weights(views)


def _fill(place: memoryview, file: int, begin: int) -> None:
    """Reads ``file`` from its byte ``begin`` on until ``place`` is full."""
    done = 0
    while done < len(place):
        if not (count := os.preadv(file, [place[done:]], begin + done)):
            raise ValueError("the weights were cut short while they were read")
        done += count


def take_short_turns() -> None:
    """A thread of this process that wants Python's lock gets it after half a millisecond, not after five.

    Of a load of rank 64 on an 8B Llama some 30 ms are Python, of which at most 1 ms is one call (the header's
    JSON); the rest is reading and torch's arithmetic, which hold no lock. A step of such a model on a GPU
    takes 8 ms, and asks for the lock after each call that has let it go.
    """
    sys.setswitchinterval(min(sys.getswitchinterval(), TURN_S))


def stay_beside_the_engine() -> None:
    """For a thread beside the engine's: it runs on whatever core is free, and takes one only.

    On Linux affinity belongs to a thread, and so does the number of threads that its torch calls use. vLLM's
    CPU worker binds itself to some cores, which a thread inherits: it gets back all those that the parent
    process may use. Two OpenMP teams on the same cores would wait for each other in the middle of an engine
    step. (That worker also replaces ``torch.set_num_threads`` by a warning.) The thread is not niced: a
    low-priority thread that is preempted while it holds the GIL would stall the engine.
    """
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
    torch._C.set_num_threads(1)
