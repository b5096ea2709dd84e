"""A fleet under Ray on two nodes of one machine, of which one is lost in mid-stream and another one comes."""

from __future__ import annotations

import asyncio
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
from tests.service.fleet.test_ray import COMMAND, customer, ready, say  # noqa: E402
from tests.support.ports import unused  # noqa: E402
from tests.support.site import ADMIN_KEY  # noqa: E402

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Cluster]:
    """Ray's head, which has room for one replica; the variables of this fleet, and Ray's, are set."""
    chosen = {
        "MODEL": "/models/fake",
        "SERVED_MODEL_NAME": "fake",
        "DATA_DIR": str(tmp_path),
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
async def client(nodes: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    url = f"http://127.0.0.1:{Settings.load(None).port}"
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as made:
        yield made


async def run(replicas: int) -> None:
    """So many replicas, each of which takes all of a node; returns when all of them are there."""
    made = fleet.application(Settings.load(None), fleet.Plan(cpus=1, replicas=replicas), command=COMMAND)
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
