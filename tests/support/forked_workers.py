"""The tests' own processes, forked from one that has imported what they all need.

pytest-xdist starts each of its workers as a new Python, which imports torch, transformers, vLLM, the program
and its tests; so does the process from which it forks servers and engines (``tests.support.forks``). Here all
of them are forked from one that has done so once.
"""

from __future__ import annotations

import ast
import atexit
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import IO, Any

from execnet import gateway_io
from execnet.gateway_base import Popen2IO


def fork_workers(arguments: Sequence[str]) -> None:
    """From now on execnet, and so pytest-xdist, forks the processes that it would start on this machine.

    They are to run what pytest collects with ``arguments``.
    """
    os.environ["TESTS_TO_COLLECT"] = json.dumps(arguments)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.support.collected"])
    gateway_io.Popen2IOMaster = _Forked


class _Forked(Popen2IO):  # type: ignore[misc]  # execnet is not typed for us
    """A worker, and the two pipes to it, in place of execnet's ``Popen2IOMaster``."""

    def __init__(self, args: object, execmodel: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        theirs_in, ours_out = context.Pipe(duplex=False)
        ours_in, theirs_out = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(theirs_in, theirs_out), name="worker")
        self._process.start()
        theirs_in.close()
        theirs_out.close()
        super().__init__(_file(ours_out, "wb"), _file(ours_in, "rb"), execmodel)

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def _file(pipe: Connection, mode: str) -> IO[bytes]:
    with pipe:
        return open(os.dup(pipe.fileno()), mode)


def _work(given: Connection, answers: Connection) -> None:
    """As a new Python would begin that execnet has started."""
    from tests.support import forks

    forks.fork_server(without=(given.fileno(), answers.fileno()))
    for number, pipe in enumerate((given, answers)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    try:
        exec(ast.literal_eval(sys.stdin.readline()), {"__name__": "__main__"})  # execnet's first words
    finally:
        atexit._run_exitfuncs()  # which a process that was forked does not do
