"""How an adapter's weights get from its file into host memory, in an engine's worker.

``safetensors`` maps the file, which costs the engine's process three things: page faults, for the file and
for the memory that the tensors are copied to, beside which an engine step may take several times as long; 64
bytes for every tensor of every load, which ``get_tensor`` never gives back; and its life, should the file be
cut short meanwhile. Here the file is read, into memory whose pages are there:

    room     memory as large as an adapter can be; its pages are the system's until they are written to
    loan     a room under all the tensors of one adapter; when the last of them is gone, it is spare
    spare    a room for the next adapter: left by one before, or written to before the first
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import math
import mmap
import os
import threading
import weakref
from collections.abc import KeysView
from dataclasses import dataclass

import torch

from adapters.inspection.safetensors_header import DTYPES

_MIB = 1 << 20

Loan = ctypes.Array[ctypes.c_char]


class Rooms:
    """``size`` bytes each, ``keep`` of which are kept when they are spare. Any method, on any thread."""

    def __init__(self, size: int, keep: int) -> None:
        self._size = _whole(size)
        self._keep = keep
        self._spare: list[mmap.mmap] = []  # by size
        # A loan may end wherever the garbage collector runs, in the middle of these methods too.
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"Rooms(spare {[len(room) // _MIB for room in self._spare]} MiB)"

    def make_ready(self, at_most: int) -> None:
        """Writes to as many spare rooms as ``at_most`` bytes allow, for when no engine step is running."""
        rooms = min(self._keep, at_most // self._size)
        loans = [self.lend(self._size) for _ in range(rooms)]
        for loan in loans:
            ctypes.memset(loan, 0, len(loan))

    def lend(self, size: int) -> Loan:
        """At least ``size`` bytes of any content, lent until nothing refers to the buffer any more."""
        with self._lock:
            room = next((room for room in self._spare if len(room) >= size), None)
            if room is not None:
                self._spare.remove(room)
        if room is None:
            length = max(_whole(size), self._size)
            room = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        loan = (ctypes.c_char * len(room)).from_buffer(room)
        weakref.finalize(loan, self._take_back, room).atexit = False
        return loan

    def _take_back(self, room: mmap.mmap) -> None:
        with self._lock:
            self._spare = sorted([*self._spare, room], key=len)[-self._keep :]


def _whole(size: int) -> int:
    """In whole MiB, because ctypes remembers every length that an array has had."""
    return -(-max(size, 1) // _MIB) * _MIB


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file, from its byte ``begin`` on; ``first``: how many elements of others come before."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    first: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        return self.begin + self.count * self.dtype.itemsize


def stored(file: int) -> list[Stored]:
    """The tensors of the safetensors file that is open as ``file``, in the order of their bytes.

    Raises ValueError, KeyError or TypeError where they do not fill the file, as those of a publication do:
    ``safetensors_header`` has checked that, which takes longer than a load may keep Python's lock.
    """
    size = os.fstat(file).st_size
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    if length > size - 8:
        raise ValueError(f"the weights are no safetensors file: a header of {length} bytes in {size}")
    header = json.loads(os.pread(file, length, 8))
    header.pop("__metadata__", None)
    tensors: list[Stored] = []
    begin, first = 8 + length, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        tensor = Stored(name, getattr(torch, DTYPES[entry["dtype"]][0]), tuple(entry["shape"]), begin, first)
        if entry["data_offsets"] != [begin - 8 - length, tensor.end - 8 - length]:
            raise ValueError(f"the weights are damaged: {name} has another size or place than it should")
        tensors.append(tensor)
        begin, first = tensor.end, first + tensor.count
    if begin != size:
        raise ValueError(f"the weights are damaged: they end at byte {begin} of {size}")
    return tensors


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
    """Reads adapters' files into ``rooms``; whatever they hold, their tensors are of ``dtype``."""

    def __init__(self, rooms: Rooms, dtype: torch.dtype) -> None:
        self._rooms = rooms
        self._dtype = dtype

    def open(self, path: str, framework: str = "pt") -> Weights:
        """Raises OSError, and ValueError, KeyError or TypeError where the file is not what was published."""
        with open(path, "rb", buffering=0) as file:
            tensors = stored(file.fileno())
            loan = self._rooms.lend(sum(tensor.count for tensor in tensors) * self._dtype.itemsize)
            flat = torch.frombuffer(loan, dtype=self._dtype)
            for dtype, group in itertools.groupby(tensors, key=lambda tensor: tensor.dtype):
                run = list(group)
                first, last = run[0], run[-1]
                size = last.end - first.begin
                if dtype == self._dtype:
                    at = first.first * dtype.itemsize
                    _fill(memoryview(loan)[at : at + size], file.fileno(), first.begin)
                elif size:
                    source = self._rooms.lend(size)
                    _fill(memoryview(source)[:size], file.fileno(), first.begin)
                    elements = torch.frombuffer(source, dtype=dtype, count=size // dtype.itemsize)
                    flat[first.first : last.first + last.count].copy_(elements)
        return Weights({t.name: flat[t.first : t.first + t.count].view(t.shape) for t in tensors})


def _fill(place: memoryview, file: int, begin: int) -> None:
    """Reads ``file`` from its byte ``begin`` on until ``place`` is full."""
    done = 0
    while done < len(place):
        if not (count := os.preadv(file, [place[done:]], begin + done)):
            raise ValueError("the weights were cut short while they were read")
        done += count


def stay_beside_the_engine() -> None:
    """For a thread beside the engine's: it runs on whatever core is free, and takes one only.

    On Linux affinity belongs to a thread, and so does the number of threads that its torch calls use. vLLM's
    CPU worker binds itself to some cores, which a thread inherits: it gets back all those that the parent
    process may use. Two OpenMP teams on the same cores would wait for each other in the middle of an engine
    step. (That worker also replaces ``torch.set_num_threads`` by a warning.) The thread is no nicer than the
    engine's: while it waits for a processor with Python's lock in its hand, the engine waits for both.
    """
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
    torch._C.set_num_threads(1)
