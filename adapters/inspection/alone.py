"""Runs a program on what a stranger has sent, in a process of its own and within bounds.

The program is a file of ours that imports nothing but the standard library. This file is run by itself, sets
the bounds, and then runs the program.
"""

from __future__ import annotations

import logging
import resource
import runpy
import subprocess
import sys
from typing import IO, Any

logger = logging.getLogger(__name__)


def run_alone(
    program: str, given: IO[bytes] | bytes, *, memory: int, seconds: int
) -> subprocess.CompletedProcess[bytes] | None:
    """``program`` (its path) with ``given`` as its input, and what it has written; see its ``returncode``.

    One that takes more than ``memory`` bytes or ``seconds`` of processor time fails or is ended by a signal.
    None, and the log says so, where none can be started. Blocks: call it in a thread.
    """
    source: dict[str, Any] = {"input": given} if isinstance(given, bytes) else {"stdin": given}
    try:
        return subprocess.run(  # noqa: S603  (our own files)
            [sys.executable, "-I", "-S", __file__, program, str(memory), str(seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            check=False,
            **source,
        )
    except OSError as exc:
        logger.error("parts of an upload go unchecked, no process could be started for them: %s", exc)
        return None


def _main() -> None:
    program, memory, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    _main()
