"""SIGKILL for a whole server on the real engine in the middle of a rollout, which goes on and ends right.

``ENGINE_KILLS=2`` runs it: the engine starts again after each kill. On the fake engine
``tests/service/rollouts/test_kills`` kills more often.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from tests.engine.processes import gone, server
from tests.engine.reference import ATTENTION, Reference, Spec
from tests.service.rollouts.test_kills import ADMIN, Client
from tests.service.rollouts.test_rollouts import ADAPTER
from tests.support.site import ADMIN_KEY

KILLS = int(os.environ.get("ENGINE_KILLS", "0"))
pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(not KILLS, reason="takes ENGINE_KILLS=2"),
    pytest.mark.timeout(600 + 300 * KILLS),
]
HOLD_S = 4.0


async def set_up(client: Client, folder: Path) -> None:
    """Two versions with the same files, the first one live."""
    (await client.http.post("/admin/v1/tenants", json={"id": "acme"}, headers=ADMIN)).raise_for_status()
    files = {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    for _ in range(2):
        made = await client.http.post(f"{ADAPTER}/versions", files=files, headers=ADMIN)
        assert made.status_code == 201, made.text
    await client.http.patch(ADAPTER, json={"live": 1}, headers=ADMIN)
    key = await client.http.post("/admin/v1/tenants/acme/keys", json={}, headers=ADMIN)
    client.key = key.json()["key"]
    await client.begin(hold=HOLD_S)


async def test_a_kill_changes_nothing(
    whole_base_dir: Path, whole_reference: Reference, tmp_path: Path
) -> None:
    folder = await asyncio.to_thread(
        whole_reference.make, Spec(seed=7, rank=8, targets=ATTENTION), tmp_path / "a"
    )
    data = tmp_path / "data"
    data.mkdir()
    client: Client | None = None
    decisions = 0
    for _ in range(KILLS):
        async with server(whole_base_dir, data, ADMIN_KEY=ADMIN_KEY) as running:
            if client is None:
                client = Client(running.http)
                await set_up(client, folder)
            client.http = running.http
            asking = asyncio.create_task(client.ask())
            async with asyncio.timeout(600):
                while len((found := await client.hold())["decisions"]) <= decisions:
                    await asyncio.sleep(0.2)
            assert found["state"] == "running", found
            decisions = len(found["decisions"])
            family = running.family()
            running.process.kill()
            await asking
            await running.exit_status()
            assert not await gone(family, 240), "the engine's processes outlived the server"
    assert client is not None
    async with server(whole_base_dir, data, ADMIN_KEY=ADMIN_KEY) as running:
        client.http = running.http
        assert len((await client.hold())["decisions"]) >= decisions, "what was decided stays"
        async with asyncio.timeout(300):
            await client.ask()
        ended = await client.hold()
    assert (ended["state"], ended["share"]) == ("completed", 100), ended
    actions = [decision["action"] for decision in ended["decisions"]]
    assert actions == ["start", "forward", "forward", "forward", "complete"]
    shown = ended["decisions"][-1]["numbers"]["new"]
    print(f"{KILLS} kills, {shown['requests']} requests of the new version, {client.asked * 20} in all")
