"""The process that compiles grammars for an engine, forked from one that has imported xgrammar and torch."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import sys
from typing import Any

from server.engine import engine, grammar_process
from server.engine.grammars import Grammars
from tests.support.forks import FORKED, WANTED


def instead_of_new_ones() -> None:
    """From now on engines that are started in this process have theirs forked, while ``WANTED`` is set."""
    vars(engine)["Grammars"] = _Grammars


class _Grammars(Grammars):
    def start(self) -> None:
        if WANTED not in os.environ:
            super().start()
            return
        self._control, theirs = socket.socketpair()
        with theirs:
            process: Any = _Process(theirs, self._tokenizer)
            self._process = process


class _Process:
    """As much of a ``subprocess.Popen`` as ``Grammars`` asks."""

    def __init__(self, control: socket.socket, tokenizer: str) -> None:
        # A daemon has no fork server of its own.
        self._process = FORKED.Process(
            target=_compile, args=(control, tokenizer), name="grammars", leads=True, daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.join()


def _compile(control: socket.socket, tokenizer: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin = io.StringIO(tokenizer)
    with contextlib.suppress(EOFError, ConnectionError), control:
        grammar_process.serve(control)
