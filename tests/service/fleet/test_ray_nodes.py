"""A fleet under Ray on two nodes of one machine: one is lost in mid-stream and another one comes, and the
control service of Ray's head, which keeps its state in Redis, is killed and comes back."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")

from ray.cluster_utils import Cluster  # noqa: E402

from server.fleet import ray as fleet  # noqa: E402
from server.settings import Settings  # noqa: E402
from tests.service.fleet.test_ray import COMMAND, actors, customer, ready, say  # noqa: E402
from tests.support import services  # noqa: E402
from tests.support.ports import unused  # noqa: E402
from tests.support.site import ADMIN_KEY  # noqa: E402

pytestmark = pytest.mark.timeout(900)


@contextlib.contextmanager
def head(data: Path) -> Iterator[Cluster]:
    """Ray's head, which has room for one replica; the variables of this fleet, and Ray's, are set."""
    chosen = {
        "MODEL": "/models/fake",
        "SERVED_MODEL_NAME": "fake",
        "DATA_DIR": str(data),
        "PORT": str(unused()),
        "ADMIN_KEY": ADMIN_KEY,
        "FLEET_KEY": "fleet-key-of-the-tests",
        "REPLICA_STALL": "20",
        "LOG_LEVEL": "warning",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in chosen.items():
            patch.setenv(f"LORAPLEX_{name}", value)
        patch.setenv("RAY_TMPDIR", "/tmp")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        try:
            patch.setenv("RAY_ADDRESS", cluster.address)
            with fleet.connected():
                fleet.serve.start(proxy_location="Disabled")
                yield cluster
        finally:
            cluster.shutdown()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Cluster]:
    with head(tmp_path) as made:
        yield made


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """As ``nodes``, with Ray's state in a Redis."""
    server = services.RedisServer()
    monkeypatch.setenv("RAY_REDIS_ADDRESS", f"127.0.0.1:{server.port}")
    try:
        with head(tmp_path) as made:
            yield made
    finally:
        server.kill()


@contextlib.asynccontextmanager
async def clients() -> AsyncIterator[httpx.AsyncClient]:
    url = f"http://127.0.0.1:{Settings.load(None).port}"
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as made:
        yield made


@pytest.fixture
async def client(nodes: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    async with clients() as made:
        yield made


async def run(replicas: int, **plan: Any) -> None:
    """So many replicas, each of which takes one of a node's places; returns when all of them are there."""
    chosen = fleet.Plan(cpus=1, replicas=replicas, **plan)
    made = fleet.application(Settings.load(None), chosen, command=COMMAND)
    await asyncio.to_thread(fleet.serve.run, made, name=fleet.NAME, route_prefix=None)


async def heard(client: httpx.AsyncClient) -> None:
    """The gateway has an answer of a replica."""
    async with asyncio.timeout(240):
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.3)


async def test_a_node_is_lost_and_another_one_comes(nodes: Cluster, client: httpx.AsyncClient) -> None:
    running = asyncio.create_task(run(2))
    first = await ready(client, 1)  # with the gateway on the head, and no room for another one
    await heard(client)
    key = await customer(client, "acme")
    wanted = await say(client, key, 60)
    second: Any = nodes.add_node(num_cpus=1)  # not in a thread: Ray takes signals there
    await running
    assert first < await ready(client, 2)
    asking = [asyncio.create_task(say(client, key, 60)) for _ in range(6)]
    await asyncio.sleep(1)
    nodes.remove_node(second, allow_graceful=False)
    assert await asyncio.gather(*asking) == [wanted] * 6
    assert await ready(client, 1) == first
    nodes.add_node(num_cpus=1)
    assert first < await ready(client, 2), "Serve places the lost one on the new node"
    assert await say(client, key, 60) == wanted


async def test_the_heads_control_service_is_killed_and_comes_back(kept: Cluster) -> None:
    """Nothing that runs needs it; after its return what dies is replaced again."""
    async with clients() as client:
        await run(1)
        first = await ready(client, 1)
        await heard(client)
        key = await customer(client, "acme")
        wanted = await say(client, key, 60)
        asking = [asyncio.create_task(say(client, key, 60)) for _ in range(6)]
        await asyncio.sleep(1)
        kept.head_node.kill_gcs_server()
        assert await asyncio.gather(*asking) == [wanted] * 6
        assert await say(client, key, 60) == wanted, "asked while it is away"
        kept.head_node.start_gcs_server()
        assert await ready(client, 1) == first, "the same replica"
        (one,) = actors("Replica")
        one.kill()
        assert not first & await ready(client, 1, new=1, known=first)
        assert await say(client, key, 60) == wanted
