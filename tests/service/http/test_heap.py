"""What large blocks leave in the C library's heap, in a process of its own: others share this one's."""

from __future__ import annotations

import subprocess
import sys

# Blocks of 1 MiB with small ones between them, as bodies and what is made of them; the large ones are freed.
PROGRAM = """
import ctypes, sys
from server.http import heap

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
libc.free.argtypes = (ctypes.c_void_p,)
if sys.argv[1] == "apart":
    heap.keep_large_blocks_apart()
libc.free(libc.malloc(8 << 20))  # as the largest body; after this glibc takes all smaller ones from the heap
large = []
for _ in range(64):
    large.append(libc.malloc(1 << 20))
    ctypes.memset(large[-1], 1, 1 << 20)
    libc.malloc(100 << 10)  # a small one, beyond what is recycled
for block in large:
    libc.free(block)


def resident():
    with open("/proc/self/smaps_rollup") as told:
        return next(int(line.split()[1]) for line in told if line.startswith("Pss_Anon")) >> 10


before, left = resident(), heap.free_bytes() >> 20
heap._trim_once()
print(left, before - resident())
"""


def run(how: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_large_blocks_that_were_freed_stay_in_no_heap() -> None:
    left, _ = run("apart")
    assert left < 16, "MiB that are free and not given back"


def test_what_stays_in_the_heap_is_given_back() -> None:
    left, given = run("as glibc does it")
    assert left > 48, "glibc does what this is for"
    assert given > 48
