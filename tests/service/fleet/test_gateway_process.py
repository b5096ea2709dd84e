"""A gateway as a process of its own, which has no folder of the base model, and is killed."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.support import tiny
from tests.support.fakes import Times
from tests.support.fleet import FLEET_KEY, replica
from tests.support.fleet_answers import CHAT, body
from tests.support.ports import unused
from tests.support.site import ADMIN_KEY, bearer

STARTED_WITHIN_S = 240.0


@asynccontextmanager
async def gateway(folder: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, httpx.AsyncClient]]:
    told = {
        "MODEL": f"/not/on/this/machine/{tiny.NAME}",
        "DATA_DIR": str(folder),
        "PORT": str(unused()),
        "ROLE": "gateway",
        "FLEET_KEY": FLEET_KEY,
        "ADMIN_KEY": ADMIN_KEY,
        "LOG_LEVEL": "error",
    }
    environment = os.environ | {f"LORAPLEX_{name}": value for name, value in told.items()}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "server", "serve", env=environment)
    url = f"http://127.0.0.1:{told['PORT']}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as http:
            async with asyncio.timeout(STARTED_WITHIN_S):
                while True:
                    assert process.returncode is None, "the gateway has not started"
                    with suppress(httpx.TransportError):
                        if (await http.get("/ready")).status_code == 200:
                            break
                    await asyncio.sleep(0.1)
            yield process, http
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_clients_notice_that_it_is_killed_and_nothing_goes_on_in_its_replicas(tmp_path: Path) -> None:
    async with replica(tmp_path, Times(step=0.2)) as one, gateway(tmp_path) as (process, http):
        admin = bearer(ADMIN_KEY)
        made = await http.post("/admin/v1/tenants", json={"id": "acme", "base_allowed": True}, headers=admin)
        assert made.status_code == 201, made.text
        key = (await http.post("/admin/v1/tenants/acme/keys", json={}, headers=admin)).json()["key"]
        asked = body(400, model=tiny.NAME)
        async with http.stream("POST", CHAT, json=asked, headers=bearer(key)) as answer:
            chunks = answer.aiter_text()
            for _ in range(4):
                assert "error" not in await anext(chunks)
            (run,) = one.engine.running
            process.kill()
            with pytest.raises(httpx.TransportError):
                async for _ in chunks:
                    pass
        before = sum(run.produced.values())
        async with asyncio.timeout(60):
            while one.engine.running or one.app.state.replica.calls or one.services.dispatcher.open_leases():
                await asyncio.sleep(0.01)
        assert sum(run.produced.values()) - before <= 3, "tokens for nobody"
