"""The faults, and where each fits. They are made, and undone if they are of a kind that ends, by a function
of a ``World``, which says what it saw; ``Missed`` says what it saw and should not have.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.bench.chaos import customers, processes, storage
from tests.bench.chaos.service import CORE, WORKER, Kind
from tests.bench.chaos.world import World


@dataclass(frozen=True)
class Fault:
    """``cuts``: answers may break, since the server itself ends. ``fresh``: in a new life of the server, as
    an earlier loss of the engine would make it wait longer. ``like_another``: shows little more than one
    that is more like what happens. ``lies``: by what the server preloads.
    """

    name: str
    make: Callable[[World], Awaitable[str]]
    cuts: bool = False
    fresh: bool = False
    like_another: bool = False
    lies: bool = False
    fits: Callable[[Kind], bool] = lambda kind: not kind.real


def _sqlite(kind: Kind) -> bool:
    return not kind.real and not kind.postgres


def _on_postgres(kind: Kind) -> bool:
    return not kind.real and kind.postgres


def _on_disks(kind: Kind) -> bool:
    return not kind.real and kind.disks


def _on_sqlite_disks(kind: Kind) -> bool:
    return _on_disks(kind) and not kind.postgres


def _real(kind: Kind) -> bool:
    return kind.real


def _any(_: Kind) -> bool:
    return True


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("SIGKILL for the server", processes.kill_server, cuts=True, fits=_any),
        Fault("SIGKILL while the server starts, three times", processes.kill_at_start, cuts=True),
        Fault("SIGKILL for the server in a backup", storage.killed_in_a_backup, cuts=True),
        Fault("SIGTERM for the server", processes.end_server, cuts=True, fits=_any),
        Fault("SIGSTOP for the server, 3 s", processes.stop_server),
        Fault("a second server on the folder", processes.second_server),
        Fault("256 descriptors, 400 idle connections", processes.few_descriptors, cuts=True),
        Fault("the clock goes a day ahead and back", processes.clock(86_400), lies=True),
        Fault("the clock goes a day back and ahead", processes.clock(-86_400), lies=True),
        Fault("the engine dies", processes.die, fresh=True),
        Fault("the engine hangs", processes.hang, fresh=True),
        Fault("a load into a slot takes too long", processes.slow_activation, fresh=True),
        *(
            Fault(
                f"{number.name} for {what}",
                processes.end(name, number),
                fresh=True,
                like_another=number is not signal.SIGKILL,
                fits=_real,
            )
            for what, name in (("EngineCore", CORE), ("the engine's worker", WORKER))
            for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)
        ),
        Fault("SIGKILL for the guard", processes.kill_guard, fits=_real),
        Fault("SIGKILL for guard and server", processes.kill_guard_and_server, cuts=True, fits=_real),
        Fault("SIGSTOP for EngineCore and worker", processes.stop(CORE, WORKER), fresh=True, fits=_real),
        Fault("SIGSTOP for the engine's worker", processes.stop(WORKER), fresh=True, fits=_real),
        Fault("no memory for the engine", processes.no_memory, fresh=True, fits=_real),
        Fault("the data folder's disk is full", storage.full("data"), fits=_on_disks),
        Fault("the database's disk is full", storage.full("db"), fits=_on_sqlite_disks),
        Fault("the log's disk is full", storage.full("log"), fits=_on_disks),
        Fault("no file can grow", storage.nothing_grows),
        Fault("the data folder is read-only", storage.read_only, fits=_on_disks),
        Fault("the data folder turns read-only", storage.failing("data", errno.EROFS), lies=True),
        Fault("the database turns read-only", storage.failing("db", errno.EROFS), lies=True, fits=_sqlite),
        Fault("the log turns read-only", storage.failing("log", errno.EROFS), lies=True),
        Fault("the data folder's disk fails", storage.failing("data", errno.EIO), lies=True),
        Fault("the database's disk fails", storage.failing("db", errno.EIO), lies=True, fits=_sqlite),
        Fault("a damaged file", storage.damaged, cuts=True),
        Fault("a file damaged under the server", storage.damaged_under_it),
        Fault("a file gone under the server", storage.gone_under_it),
        Fault("SQLite locked by another process", storage.lock_database, fits=_sqlite),
        Fault("the engine dies while SQLite is locked", storage.die_while_locked, fresh=True, fits=_sqlite),
        Fault("PostgreSQL restarted", storage.restart_postgres, fits=_on_postgres),
        Fault("no PostgreSQL, 4 to 6 s", storage.postgres_away, fits=_on_postgres),
        Fault("SIGKILL for PostgreSQL", storage.kill_postgres, fits=_on_postgres),
        Fault("SIGSTOP for PostgreSQL, 6 to 9 s", storage.stop_postgres, fits=_on_postgres),
        Fault("PostgreSQL's connections cut five times", storage.cut_connections, fits=_on_postgres),
        Fault("PostgreSQL killed, its standby promoted", storage.killed_and_promoted, fits=_on_postgres),
        Fault("PostgreSQL silent, its standby promoted", storage.silent_and_promoted, fits=_on_postgres),
        Fault("Redis takes 0.3 s, for 6 s", storage.slow_redis(0.3, 20), fits=_on_postgres),
        Fault("Redis takes 4 s, twice", storage.slow_redis(4, 2), fits=_on_postgres),
        Fault("no Redis, 2 to 4 s", storage.kill_redis, fits=_on_postgres),
        Fault("Redis restarted", storage.restart_redis, fits=_on_postgres),
        Fault("SIGSTOP for Redis, 3 s", storage.stop_redis, fits=_on_postgres),
        Fault("Redis flushed", storage.flush_redis, fits=_on_postgres),
        Fault("80 clients vanish", customers.vanish),
        Fault("an adapter makes NaN", customers.quarantine),
        Fault("uploads cut in the middle", customers.cut_uploads),
        Fault("an adapter deleted in use", customers.delete_in_use),
        Fault("live versions back and forth", customers.back_and_forth),
    )
}
