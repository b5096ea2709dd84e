"""A fleet under Ray Serve, on engines without a model: placed, killed, updated, scaled."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")

from server.fleet import ray as fleet  # noqa: E402
from server.settings import Settings  # noqa: E402
from tests.support.ports import unused  # noqa: E402
from tests.support.site import ADMIN_KEY, bearer  # noqa: E402

pytestmark = pytest.mark.timeout(600)
COMMAND = (sys.executable, "-m", "tests.support.fake_server")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    with pytest.MonkeyPatch.context() as patch:
        chosen = {
            "MODEL": "/models/fake",
            "SERVED_MODEL_NAME": "fake",
            "DATA_DIR": str(tmp_path_factory.mktemp("data")),
            "PORT": str(unused()),
            "ADMIN_KEY": ADMIN_KEY,
            "REPLICA_STALL": "20",
            "LOG_LEVEL": "warning",
        }
        for name, value in chosen.items():
            patch.setenv(f"LORAPLEX_{name}", value)
        patch.setenv("RAY_TMPDIR", "/tmp")
        patch.delenv("RAY_ADDRESS", raising=False)
        with fleet.connected():
            fleet.serve.start(proxy_location="Disabled")
            yield Settings.load(None)


@pytest.mark.parametrize("host", ["127.0.0.2", "0.0.0.0", "::"])
def test_a_gateway_is_asked_where_it_listens(host: str) -> None:
    asked = object.__new__(fleet.Gateway)
    found = asked._address({"LORAPLEX_HOST": host, "LORAPLEX_PORT": "8000"})
    assert found == ({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), 8000)


def run(settings: Settings, **plan: Any) -> None:
    made = fleet.application(settings, fleet.Plan(cpus=0, **plan), command=COMMAND)
    fleet.serve.run(made, name=fleet.NAME, route_prefix=None)


@pytest.fixture
async def client(cluster: Settings) -> AsyncIterator[httpx.AsyncClient]:
    url = f"http://127.0.0.1:{cluster.port}"
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as made:
        yield made


async def ready(
    client: httpx.AsyncClient, number: int, *, new: int = 0, known: frozenset[str] = frozenset()
) -> frozenset[str]:
    """The replicas, as soon as exactly so many are ready, and so many ``new`` ones beside ``known``.

    One that was killed is shown for ten seconds more.
    """
    deadline = time.monotonic() + 240
    found: frozenset[str] = frozenset()
    while time.monotonic() < deadline:
        try:
            answer = await client.get("/admin/v1/replicas", headers=bearer(ADMIN_KEY))
            found = frozenset(one["id"] for one in answer.json()["data"] if one["state"] == "ready")
            if len(found) == number and len(found - known) >= new:
                return found
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.3)
    raise AssertionError(f"not {number} replicas: {found}")


async def customer(client: httpx.AsyncClient, name: str) -> dict[str, str]:
    admin = bearer(ADMIN_KEY)
    made = await client.post("/admin/v1/tenants", json={"id": name}, headers=admin)
    assert made.status_code == 201, made.text
    key = await client.post(f"/admin/v1/tenants/{name}/keys", json={}, headers=admin)
    return bearer(key.json()["key"])


async def say(client: httpx.AsyncClient, key: dict[str, str], tokens: int) -> str:
    body = {"model": "fake", "max_tokens": tokens, "messages": [{"role": "user", "content": "hello"}]}
    answer = await client.post("/v1/chat/completions", json=body, headers=key)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == tokens
    return str(answer.json()["choices"][0]["message"]["content"])


def actors(name: str) -> list[psutil.Process]:
    """The processes of Serve's replicas of a deployment, below this one."""
    title = f"ray::ServeReplica:{fleet.NAME}:{name}"
    found = []
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if one.cmdline()[:1] and one.cmdline()[0].startswith(title):
                found.append(one)
    return found


def test_serves_own_tools_build_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """They pass arguments as text, and read a file."""
    from ray.serve.schema import ServeDeploySchema

    monkeypatch.setenv("LORAPLEX_MODEL", "/models/fake")
    written = ServeDeploySchema.model_validate(yaml.safe_load(Path("config/ray.yml").read_text()))
    (told,) = written.applications
    assert told.import_path == "server.fleet.ray:app"
    for args in ({"replicas": "1", "cpus": "0"}, told.args):
        assert isinstance(fleet.app(args), fleet.serve.Application)
    with pytest.raises(ValueError, match="replica"):
        fleet.app({"replica": 1})
    grown = fleet._number(fleet.Plan(replicas=1, most=3))["autoscaling_config"]
    assert (grown.min_replicas, grown.initial_replicas, grown.max_replicas) == (1, None, 3), (
        "an update would go back to the initial number"
    )


async def test_a_fleet_lives_through_a_killed_actor_and_an_update(
    cluster: Settings, client: httpx.AsyncClient
) -> None:
    await asyncio.to_thread(run, cluster, replicas=2)
    first = await ready(client, 2)
    key = await customer(client, "acme")
    wanted = await say(client, key, 60)
    asking = [asyncio.create_task(say(client, key, 60)) for _ in range(4)]
    await asyncio.sleep(0.5)
    killed = actors("Replica")[0]
    below = killed.children(recursive=True)
    killed.kill()
    assert await asyncio.gather(*asking) == [wanted] * 4
    again = await ready(client, 2, new=1, known=first)
    assert len(again & first) == 1, "the other one lives on"
    assert not psutil.wait_procs(below, timeout=10)[1], "nothing outlives its actor"

    os.environ["LORAPLEX_QUEUE_TIMEOUT"] = "25"  # an update: other settings, and so other processes
    try:
        asking = [asyncio.create_task(say(client, key, 60)) for _ in range(4)]
        await asyncio.to_thread(run, cluster, replicas=2)
    finally:
        del os.environ["LORAPLEX_QUEUE_TIMEOUT"]
    await ready(client, 2, new=2, known=again)
    assert await say(client, key, 60) == wanted
    done = await asyncio.gather(*asking, return_exceptions=True)
    # The one gateway of this machine is replaced too: it ends what it answers.
    assert done == [wanted] * 4


async def test_it_grows_with_its_work_and_shrinks_without(
    cluster: Settings, client: httpx.AsyncClient
) -> None:
    await asyncio.to_thread(run, cluster, replicas=1, most=3, target=0.5, calm=5)
    await ready(client, 1)
    key = await customer(client, "busy")
    enough = asyncio.Event()

    async def keep_asking() -> None:
        while not enough.is_set():
            await say(client, key, 100)

    asking = [asyncio.create_task(keep_asking()) for _ in range(40)]
    await ready(client, 3)
    enough.set()
    await asyncio.gather(*asking)  # none has failed
    await ready(client, 1)
