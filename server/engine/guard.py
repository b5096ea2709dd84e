"""Ends the engine's processes when the process that started them is gone, however it ended.

vLLM's processes outlive a parent that the kernel or SIGKILL ends, and keep its memory. So ``start`` runs this
file as a small process of its own: it notes the parent's descendants twice a second, waits for the parent's
end, and then kills whatever is left of them. It needs the standard library only, and ``/proc``: Linux.

A guard that ends before its parent, by SIGKILL for instance, is replaced at once.

Neither PR_SET_PDEATHSIG nor a pipe would do: the first fires when the *thread* ends that started a process,
the second stays open in every child that was forked. What was started since the last look is known by a mark
in its environment, which every process below inherits.
"""

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time

INTERVAL_S = 0.5
AGAIN_S = 0.2  # after which a guard that ended is replaced
ROUNDS = 5
MARK = "GUARDED_AS"

_keeper: "threading.Thread | None" = None


def start() -> None:
    """Have this process guarded from now on; nothing where there is no ``/proc`` or ``pidfd_open``."""
    global _keeper
    if not hasattr(os, "pidfd_open") or not os.path.isdir("/proc/self/task"):
        return
    if _keeper is not None and _keeper.is_alive():
        return
    os.environ[MARK] = secrets.token_hex(16)
    _keeper = threading.Thread(target=_keep, args=(_start(),), name="loraplex-guard", daemon=True)
    _keeper.start()


def _start() -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
    return subprocess.Popen(  # noqa: S603  (our own file)
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )


def _keep(guard: "subprocess.Popen[bytes]") -> None:
    """Replace the guard whenever it ends: it has no reason to while this process lives."""
    while True:
        guard.wait()
        time.sleep(AGAIN_S)
        with contextlib.suppress(OSError):  # no descriptor or no memory is left: then a little later
            guard = _start()


def started_at(pid: int) -> str:
    """When ``pid`` was started, in the kernel's ticks, so that a pid that was used again is told apart.

    Empty if there is no such process, or only its exit status is left.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def descendants(pid: int) -> "dict[int, str]":
    """pid -> ``started_at`` of every process below ``pid``."""
    found: dict[int, str] = {}
    left = [pid]
    while left:
        parent = left.pop()
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children") as file:
                    for child in map(int, file.read().split()):
                        found[child] = started_at(child)
                        left.append(child)
    return found


def marked(mark: str) -> "dict[int, str]":
    """pid -> ``started_at`` of every process that was started with this mark in its environment."""
    found: dict[int, str] = {}
    wanted = f"{MARK}={mark}".encode()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            if wanted in file.read().split(b"\0"):
                found[int(name)] = started_at(int(name))
    return found


def kill(processes: "dict[int, str]") -> None:
    """SIGKILL for those that still are who they were; it ends stopped ones too."""
    for pid, began in processes.items():
        if pid != os.getpid() and began and started_at(pid) == began:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def main(parent: int) -> None:
    """Watch until ``parent`` ends, then kill what it left. It may have ended already."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    poll = select.poll()
    with contextlib.suppress(ProcessLookupError):
        poll.register(os.pidfd_open(parent), select.POLLIN)
    known: dict[int, str] = {}
    while started_at(parent) and not poll.poll(INTERVAL_S * 1000):
        known = {pid: began for pid, began in known.items() if started_at(pid) == began}
        known.update(descendants(parent))
        known.pop(os.getpid(), None)
    for _ in range(ROUNDS):  # a process may have started another meanwhile
        known.update(marked(os.environ.get(MARK, "")))
        for pid in list(known):
            known.update(descendants(pid))
        kill(known)
        time.sleep(0.2)


if __name__ == "__main__":
    main(int(sys.argv[1]))
