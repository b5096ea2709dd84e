"""The guard without an engine: whatever a killed process has started ends with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from server.engine import guard

# Seconds that no test lasts, and nobody else's.
SLEEP = f"6170.{os.getpid()}"

# The guard has looked; what is started now has gone unseen when its parent is killed.
PARENT = """
import os, signal, subprocess, sys, time
sys.path.insert(0, {root!r})
from server.engine import guard
early = subprocess.Popen(["sleep", "{sleep}"])
guard.start()
(watching,) = set(guard.descendants(os.getpid())) - {{early.pid}}
def watches():
    try:
        there = [os.readlink(one.path) for one in os.scandir(f"/proc/{{watching}}/fd")]
    except OSError:
        return False
    return "anon_inode:[pidfd]" in there
while not watches():
    time.sleep(0.05)
time.sleep(1.5)
late = subprocess.Popen(["sh", "-c", "sleep {sleep} & sleep {sleep}"], start_new_session=True)
print(early.pid, late.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""

# It is killed before its guard runs.
AT_ONCE = """
import os, signal, subprocess, sys
sys.path.insert(0, {root!r})
from server.engine import guard
guard.start()
child = subprocess.Popen(["sleep", "{sleep}"], stdout=subprocess.DEVNULL, start_new_session=True)
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""

# Its guard is killed, and a little later it is killed itself.
UNGUARDED = """
import os, signal, subprocess, sys, time
sys.path.insert(0, {root!r})
from server.engine import guard
guard.start()
below = lambda: list(guard.descendants(os.getpid()))
(first,) = below()
os.kill(first, signal.SIGKILL)
while below() in ([], [first]):
    time.sleep(0.05)
child = subprocess.Popen(["sleep", "{sleep}"], start_new_session=True)
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("code", [UNGUARDED, AT_ONCE], ids=["replaced", "late"])
def test_what_ends_while_its_guard_is_not_there_yet_leaves_nothing(code: str) -> None:
    root = str(Path(guard.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code.format(root=root, sleep=SLEEP)],
        stdout=subprocess.PIPE,  # its guard has the other one, which would keep it from being forgotten
        text=True,
        check=False,
        timeout=240,
    )
    (child,) = map(int, done.stdout.split())
    deadline = time.monotonic() + 240
    while guard.started_at(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not guard.started_at(child)


def test_what_is_started_just_before_the_end_is_ended_too() -> None:
    root = str(Path(guard.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", PARENT.format(root=root, sleep=SLEEP)],
        capture_output=True,
        text=True,
        check=False,
    )
    left = [int(pid) for pid in done.stdout.split()]
    assert len(left) == 2, done.stderr
    deadline = time.monotonic() + 240
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if guard.started_at(pid)]
        time.sleep(0.05)
    assert left == []
    assert not [
        one.pid for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ["sleep", SLEEP]
    ]
