"""Every alert that tests/service/telemetry/test_prometheus.py does not fire: by its real cause, in a running
Prometheus, until the cause ends. Three servers have their faults beside each other, for one wait.

How long a cause must last, which is minutes, is promtool's to check (config/prometheus/alerts_test.yml).
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from adapters.model import WEIGHTS_FILE
from tests.service.publishing.test_golden import trained, upload
from tests.service.store.test_fitness import overwrite
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times, push_of
from tests.support.fleet import Fleet, fleet
from tests.support.prometheus import PROGRAM, Prometheus, prometheus
from tests.support.services import RedisServer
from tests.support.site import Site
from tests.support.tiny import fake_site

pytestmark = [
    pytest.mark.filterwarnings("ignore:max_tokens is deprecated"),
    pytest.mark.skipif(PROGRAM is None, reason="prometheus is not installed"),
]

ADAPTER = "/admin/v1/tenants/acme/adapters/a"
GIB = 1 << 30
# How long somebody waits for the only place in an engine: longer than QueueLong and SlowFirstToken allow.
WAIT_S = 11.0


def mounted(folder: Path, size: int) -> bool:
    """Whether ``folder`` is now a disk of its own of so many bytes; mounted before, it gets another size."""
    folder.mkdir(exist_ok=True)
    options = f"{'remount,' if folder.is_mount() else ''}size={size}"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
    return done.returncode == 0


@asynccontextmanager
async def small_disk(folder: Path) -> AsyncIterator[bool]:
    """False where this process may not mount one."""
    is_small = mounted(folder, GIB)
    try:
        yield is_small
    finally:
        if is_small:
            subprocess.run(["umount", "-l", folder], check=True)


async def ended(watching: Prometheus, alerts: tuple[str, ...]) -> None:
    for alert in alerts:
        await watching.until(alert, fires=False)


# --- a server whose adapters lie in an object store, with Redis and a small disk of its own --------------


async def storage(
    site: Site, watching: Prometheus, store: Path, redis: RedisServer, disk: Path | None
) -> None:
    key = await site.tenant("acme", {name: tiny.adapter(seed) for seed, name in enumerate("abcd", 1)})
    limited = await site.tenant("limited", limits={"requests_per_minute": 1000})

    async def all_in_turn() -> None:
        for name in "abcd":
            await site.chat(key, "hi", model=name, max_tokens=1)

    await watching.fires_while(("LoraplexThrashing",), all_in_turn)
    blobs = store / "blobs"
    blobs.rename(store / "away")
    failing = ("LoraplexFetchFailures", "LoraplexLoadFailures", "LoraplexErrors")
    await watching.fires_while(failing, all_in_turn)
    (store / "away").rename(blobs)
    redis.kill()
    without = ("LoraplexLimitsUncounted",)
    await watching.fires_while(without, lambda: site.chat(limited, "hi", model=tiny.NAME))
    redis.start()
    if disk is not None:
        await watching.until("LoraplexDiskLow", fires=True)
        mounted(disk, 3 * GIB)
    await site.chat(limited, "hi", model=tiny.NAME)
    await ended(watching, ("LoraplexThrashing", *failing, *without, "LoraplexDiskLow"))


# --- a server with versions that nobody should trust ----------------------------------------------------


async def versions(site: Site, watching: Prometheus, folder: Path) -> None:
    await watching.until("LoraplexGoldenProbesDiffer", fires=True)
    key = (await site.admin.post("/admin/v1/tenants/acme/keys", json={})).json()["key"]

    async def rolled_back() -> None:
        begun = await site.admin.post(f"{ADAPTER}/rollouts", json={"version": 2})
        assert begun.status_code == 201, begun.text
        where = f"{ADAPTER}/rollouts/{begun.json()['id']}"
        await site.admin.patch(where, json={"action": "pause"})
        await watching.until("LoraplexRolloutHeld", fires=True)
        await site.admin.patch(where, json={"action": "roll_back"})
        await ended(watching, ("LoraplexRolloutHeld",))

    await watching.fires_while(("LoraplexRolledBack",), rolled_back)

    plan = site.services.dispatcher._plan
    plan._sequences += 1  # a state that cannot be, as a defect would leave it
    await watching.fires_while(("LoraplexSelfCheckFailed",), lambda: site.chat(key, "hi", model="plain"))
    plan._sequences -= 1

    version = await site.services.publishing.catalog.resolve("acme", "plain")
    weights = folder / "blobs" / version.digest / WEIGHTS_FILE
    good = weights.read_bytes()
    site.services.dispatcher.retire(version)
    overwrite(weights)

    async def ask() -> None:
        await site.chat(key, "hi", model="plain")

    await watching.fires_while(("LoraplexUnserved",), ask)

    (folder / "usage" / "left.jsonl").write_bytes(b"1 {no record\n")
    await site.services.usage_writer.adopt()
    await watching.until("LoraplexUsageAside", fires=True)
    (folder / "usage" / "left.damaged").unlink()
    weights.write_bytes(good)
    await site.admin.delete("/admin/v1/tenants/acme/adapters/plain")
    # The version that was trained on this engine answers again.
    await site.admin.patch(ADAPTER, json={"live": 2})
    await ended(
        watching,
        (
            "LoraplexGoldenProbesDiffer",
            "LoraplexRolledBack",
            "LoraplexSelfCheckFailed",
            "LoraplexUnserved",
            "LoraplexUsageAside",
        ),
    )


@asynccontextmanager
async def after_an_upgrade(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    """A server whose engine is not the one of before: ``a@1``, which is live, differs from its probes."""
    async with fake_site(folder) as site:
        await site.tenant("acme", {"plain": tiny.adapter(3)})
        assert (await upload(site, await trained(site))).status_code == 201
        assert (await site.upload("acme", "a", tiny.adapter(2))).status_code == 201
        await site.admin.patch(ADAPTER, json={"live": 1})
    monkeypatch.setattr("tests.support.fakes.push_of", lambda path: 2 * push_of(path))
    engine = FakeEngine(tiny.base())
    engine.version = "fake 2"
    async with fake_site(folder, engine) as site:
        yield site


# --- a fleet with one place in its engine ---------------------------------------------------------------


async def work(site: Fleet, watching: Prometheus) -> None:
    key = await site.gateway.tenant("acme")
    slow = ("LoraplexQueueLong", "LoraplexSlowFirstToken")
    tokens = int(WAIT_S / 0.25) + 4
    asked = {"model": tiny.NAME, "stream": True}

    async def two_at_once() -> None:
        both = site.gateway.chat(key, "hi", max_tokens=tokens, **asked), site.gateway.chat(key, "hi", **asked)
        await asyncio.gather(*both)

    await watching.fires_while(slow, two_at_once)
    await ended(watching, slow)
    (replica,) = site.replicas
    replica.freeze()
    await watching.until("LoraplexReplicaDown", fires=True)
    replica.freezer.going.set()
    await ended(watching, ("LoraplexReplicaDown",))


async def test_the_other_alerts_fire_by_their_causes_and_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis, store, disk = RedisServer(), tmp_path / "store", tmp_path / "disk"
    fields: dict[str, Any] = {"gpu_slots": 2, "host_slots": 2, "blobs_cache": 1, "disk_reserve": 1 << 20}
    fields |= {"blobs_url": f"file://{store}", "limits_redis_url": redis.url, "limits_fail": "open"}
    store.mkdir()
    async with (
        small_disk(disk) as is_small,
        fake_site(disk, **fields) as first,
        after_an_upgrade(tmp_path / "second", monkeypatch) as second,
        fleet(tmp_path / "fleet", 1, Times(step=0.25), max_running=1) as third,
    ):
        ports = [urlsplit(site.url).port or 0 for site in (first, second, third.gateway)]
        ports += [replica.port for replica in third.replicas]
        async with prometheus(tmp_path / "prometheus", *ports) as watching, asyncio.TaskGroup() as group:
            group.create_task(storage(first, watching, store, redis, disk if is_small else None))
            group.create_task(versions(second, watching, tmp_path / "second"))
            group.create_task(work(third, watching))
    redis.kill()
