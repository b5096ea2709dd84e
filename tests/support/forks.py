"""Processes that are forked from one that has imported everything, each within milliseconds.

A server and its engine are three processes of Python, each of which takes eight seconds of processor time to
import torch and vLLM. As the product starts them they import by themselves (``multiprocessing``'s "spawn");
with ``instead_of_spawn`` an engine's processes are forked, and ``Served`` is a server that is.

    PROCESSES     forks from one process, which is a child of the tests' own
    FORKED        the same for a server and an engine; whoever is forked by it forks its own children

So the engine of a server that was forked is below that server, as it would be, and ends with it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import connection, forkserver, reduction, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# In the environment of the processes whose children are to be forked.
WANTED = "TESTS_FORK_ENGINES"
# The value of a server whose first engine alone is forked.
FIRST = "first"
TITLE = "forked"  # of a process until it gives itself another


class _Process(ForkServerProcess):
    """A process whose standard output and error are those of its parent when it starts it.

    What a test captures is not what its fork server has been given.
    """

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_outputs": [reduction.DupFd(number) for number in (1, 2)]}

    def run(self) -> None:
        self._take_outputs()
        super().run()

    def _take_outputs(self) -> None:
        for number, given in enumerate(vars(self).pop("_outputs", ()), 1):
            descriptor = given.detach()
            os.dup2(descriptor, number)
            os.close(descriptor)


class Forked(_Process):
    """The same with the environment that its parent has when it starts it, and a fork server of its own.

    ``environment`` replaces that of the parent. With ``leads`` it leads a session.
    """

    def __init__(
        self, *args: Any, environment: Mapping[str, str] | None = None, leads: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._environment = None if environment is None else dict(environment)
        self._leads = leads

    def start(self) -> None:
        if self._environment is None:
            self._environment = dict(os.environ)
        super().start()
        if os.environ.get(WANTED) == FIRST:
            del os.environ[WANTED]

    def run(self) -> None:
        """As the process would begin that had been started with this environment."""
        import setproctitle

        assert self._environment is not None
        self._take_outputs()
        os.environ.clear()
        os.environ.update(self._environment)
        setproctitle.setproctitle(f"{TITLE} {self.name}")
        if self._leads:
            os.setsid()
        if not self.daemon:  # a daemon has no children
            fork_server()
        _log_as_told()
        _bind_threads()
        # vLLM looks through all objects when it ends. Those from before the fork stay, and to look at them
        # would copy hundreds of megabytes of pages and take seconds.
        vars(gc)["unfreeze"] = _nothing
        try:
            super().run()
        finally:
            atexit._run_exitfuncs()  # which a process that was forked does not do


class _Processes(ForkServerContext):
    Process = _Process


class _Forked(ForkServerContext):
    Process = Forked


PROCESSES = _Processes()
PROCESSES.set_forkserver_preload(["tests.support.imported"])
FORKED = _Forked()


def instead_of_spawn() -> None:
    """From now on vLLM forks the processes that it would spawn, while ``WANTED`` is in the environment."""
    from vllm.utils import system_utils

    def get_context(method: str) -> Any:
        forks = method == "spawn" and WANTED in os.environ
        return FORKED if forks else multiprocessing.get_context(method)

    names = vars(multiprocessing) | {"get_context": get_context}
    system_utils.multiprocessing = SimpleNamespace(**names)
    if WANTED in os.environ:
        from tests.support.forked_grammars import instead_of_new_ones

        instead_of_new_ones()


def _nothing() -> None:
    pass


def fork_server(without: Sequence[int] = ()) -> None:
    """Fork a fork server from this process, which has no thread yet, in place of the one it came from.

    It has none of the descriptors ``without``.
    """
    resource_tracker.ensure_running()
    server: Any = forkserver._forkserver
    with socket.socket(socket.AF_UNIX) as listener:
        address = connection.arbitrary_address("AF_UNIX")
        listener.bind(address)
        listener.listen()
        alive_r, alive_w = os.pipe()
        pid = os.fork()
        if pid == 0:
            for descriptor in (alive_w, *without):
                os.close(descriptor)
            _serve_forks(listener.detach(), alive_r)
        os.close(alive_r)
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
    server._forkserver_address = address
    server._forkserver_alive_fd = alive_w
    server._forkserver_pid = pid


def _serve_forks(listener: int, alive_r: int) -> None:
    import setproctitle

    setproctitle.setproctitle("fork server")
    with contextlib.suppress(BaseException):
        forkserver.main(listener, alive_r, [])
    os._exit(0)


def _log_as_told() -> None:
    """vLLM configures its log when it is imported, from the environment."""
    if "vllm.logger" in sys.modules:
        from vllm.logger import _configure_vllm_root_logger

        _configure_vllm_root_logger()


def _bind_threads() -> None:
    """What an OpenMP that is loaded now reads from the environment, as vLLM has set it for its workers."""
    import torch

    if number := os.environ.get("OMP_NUM_THREADS", ""):
        torch.set_num_threads(int(number))
    if cores := os.environ.get("GOMP_CPU_AFFINITY", ""):
        os.sched_setaffinity(0, map(int, cores.split()))


class Served:
    """``python -m server serve``, forked: a process as asyncio would have it, as far as tests ask."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self._process = FORKED.Process(
            target=_serve, args=(log,), name="server", environment=environment, leads=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """None as long as it runs; negative: the signal that ended it."""
        return self._process.exitcode

    async def wait(self) -> int:
        while (status := self._process.exitcode) is None:
            await asyncio.sleep(0.02)
        return status

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _serve(log: Path) -> None:
    from server import __main__

    with log.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    logging.getLogger().handlers.clear()
    sys.argv = ["server", "serve"]
    __main__.main()
