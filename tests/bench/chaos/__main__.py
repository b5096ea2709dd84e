"""The run: faults in random order at random moments, and a table of what came of them."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from server.demo.base import CHECKOUT
from tests.bench.chaos import service as services
from tests.bench.chaos.faults import FAULTS, Fault
from tests.bench.chaos.load import CONTROL, Load
from tests.bench.chaos.order import in_order
from tests.bench.chaos.report import Row, longest_pause, table
from tests.bench.chaos.service import Kind, Service
from tests.bench.chaos.world import Missed, World
from tests.support.services import PostgresServer, RedisServer

AGAIN = 90.0  # seconds after a fault within which there must be service; three times that of the real engine
ANSWERS = 3  # of each customer, until a fault is survived
CLEARED = 5  # after which a version that ran as the engine was lost is no suspect any more
OUT = CHECKOUT / "bench-results"


async def survived(world: World, since: float, lost: bool = False) -> bool:
    """Wait until each customer had answers that began after ``since``, and a change was acknowledged.

    Where the engine was ``lost`` nobody may be a suspect any more: the next fault would be the second loss in
    a row of a version that only happened to run, and it would be quarantined, as the contract says.
    """
    service, load = world.service, world.load
    deadline = time.monotonic() + AGAIN * (3 if load.real else 1)
    while time.monotonic() < deadline:
        who = (*load.tenants, CONTROL) if lost else load.tenants
        wanted = dict.fromkeys(who, CLEARED if lost else ANSWERS)
        served = all(
            sum(at > since + 0.5 for at in load.served[tenant]) >= most for tenant, most in wanted.items()
        )
        if served and load.changed and load.changed[-1] > since and await service.ready():
            return True
        await asyncio.sleep(0.1)
    return False


class Readiness:
    """Asks ``/ready`` ten times a second, and remembers when it said no for the last time."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.last: float | None = None

    async def __aenter__(self) -> Readiness:
        self._asking = asyncio.create_task(self._ask())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._asking.cancel()
        await asyncio.wait({self._asking})

    async def _ask(self) -> None:
        while True:
            ready = await self._service.ready()
            self.last = self.last if ready else time.monotonic()
            await asyncio.sleep(0.1)


async def disturbed(world: World, fault: Fault) -> Row:
    """One fault at a random moment, and all that has to be true after it."""
    service, load = world.service, world.load
    if fault.fresh:
        load.cuts = True
        await service.again()
        await survived(world, time.monotonic())
        await load.look([])
    await asyncio.sleep(world.rng.uniform(0.5, 2.5))
    load.outcomes, load.wrong, load.cuts = Counter(), [], fault.cuts
    world.killed, service.ends = [], []
    start, started_in = time.monotonic(), service.started_in
    said, missed = "", []
    async with Readiness(service) as ready:
        try:
            said = await fault.make(world)
        except Exception as exc:
            missed = [str(exc) if isinstance(exc, Missed) else f"{type(exc).__name__}: {exc}"]
        again = await survived(world, time.monotonic(), fault.fresh)
    end = time.monotonic()
    try:
        missed += await asyncio.wait_for(load.look(world.killed), 60)
    except Exception as exc:
        missed += [f"it could not be looked at: {type(exc).__name__}: {exc}"]
    pause = max(longest_pause(load.served[tenant], start, end) for tenant in load.tenants)
    if (unfit := service.work / "violations").exists():
        missed += [f"the engine was misused: {unfit.read_text()[:200]}"]
        unfit.unlink()
    return Row(
        fault.name,
        pause if again else float("inf"),
        longest_pause(load.changed, start, end),
        Counter(load.outcomes),
        said,
        (*missed, *load.wrong),
        tuple(service.ends),
        0.0 if ready.last is None else ready.last - start,
        started_in,
    )


async def measure(
    kind: Kind, faults: Sequence[Fault], times: int, seed: int, root: Path, minutes: float
) -> list[Row]:
    rng, began, longest = random.Random(seed), time.monotonic(), 0.0
    with services.folder(kind, root) as work:
        redis = RedisServer() if kind.postgres else None
        postgres = PostgresServer() if kind.postgres else None
        service = Service(kind, work, root / "clock", postgres, redis)
        load = Load(service, seed)
        watching = None
        try:
            service.start()
            await service.until_ready()
            await load.prepare()
            watching = asyncio.create_task(service.watch())
            load.begin()
            world, rows = World(service, load, rng), []
            order = in_order(faults, times, rng, hurry=minutes > 0)
            for number, fault in enumerate(order):
                start = time.monotonic()
                if minutes and start + longest > began + 60 * minutes:
                    print(f"no time for: {', '.join(one.name for one in order[number:])}")
                    break
                rows.append(await disturbed(world, fault))
                longest = max(longest, time.monotonic() - start)
                print(table(rows[-1:]).splitlines()[-1], flush=True)
            return rows
        finally:
            await load.end()
            if watching:
                watching.cancel()
            await service.close()
            OUT.mkdir(exist_ok=True)
            shutil.copy(work / "log" / "server.log", OUT / "chaos-server.log")


def main() -> int:
    parser = argparse.ArgumentParser(description="Make faults under load, and look at what was promised.")
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {'; '.join(FAULTS)}; all if none")
    given = parser.parse_args()
    if unknown := set(given.faults) - set(FAULTS):
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the server would go on
    settings = {name: os.environ.get(name, "") for name in ("DB", "ENGINE", "RUNS", "SEED", "MINUTES")}
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        root = Path(folder)
        root.chmod(0o755)
        postgres = settings["DB"] == "postgres"
        kind = Kind(settings["ENGINE"] == "real", postgres, services.can_mount(root))
        lied = services.lie(root)
        services.start_forking()
        faults = [f for f in FAULTS.values() if f.fits(kind) and (lied or not f.lies)]
        if given.faults:
            faults = [fault for fault in faults if fault.name in given.faults]
        minutes, seed = float(settings["MINUTES"] or 0), int(settings["SEED"] or 1)
        times = int(settings["RUNS"] or (1 if minutes else 3))
        rows = asyncio.run(measure(kind, faults, times, seed, root, minutes))
    heading = f"{kind}, seed {seed}"
    OUT.mkdir(exist_ok=True)
    file = OUT / f"chaos-{'real' if kind.real else 'postgres' if kind.postgres else 'sqlite'}.md"
    file.write_text(f"{heading}\n\n{table(rows)}\n")
    print(f"\n{heading}\n\n{table(rows)}\n\nwritten to {file}")
    return int(any(row.misses for row in rows))


if __name__ == "__main__":
    sys.exit(main())
