"""A served app for tests: a real uvicorn on a free port of 127.0.0.1, in the test's own event loop."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import uvicorn
from fastapi import FastAPI

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from server.http.connection import BoundedHeads
from server.settings import Settings
from tests.support.resting import RESTING

ADMIN_KEY = "admin-key-of-the-tests"
SERVICE_KEY = "service-key-of-the-tests"


# Made once: to read the system's certificates takes as long as ten requests.
TLS = ssl.create_default_context()


@dataclass(frozen=True)
class Site:
    """``admin`` is authenticated as the operator, ``http`` is not authenticated at all."""

    app: FastAPI
    url: str
    admin: httpx.AsyncClient
    http: httpx.AsyncClient
    server: uvicorn.Server

    @property
    def services(self) -> Any:
        """The app's ``Services``; untyped, as tests put fakes in the place of its parts."""
        return self.app.state.services

    async def tenant(self, id_: str, adapters: Mapping[str, Path] | None = None, **fields: Any) -> str:
        """Makes a tenant with these adapters, uploaded in order; returns its key."""
        made = await self.admin.post("/admin/v1/tenants", json={"id": id_, **fields})
        assert made.status_code == 201, made.text
        for name, folder in (adapters or {}).items():
            uploaded = await self.upload(id_, name, folder)
            assert uploaded.status_code == 201, uploaded.text
        key = await self.admin.post(f"/admin/v1/tenants/{id_}/keys", json={})
        return str(key.json()["key"])

    async def upload(self, tenant: str, name: str, folder: Path) -> httpx.Response:
        files = {n: (folder / n).read_bytes() for n in (CONFIG_FILE, WEIGHTS_FILE)}
        return await self.admin.post(f"/admin/v1/tenants/{tenant}/adapters/{name}/versions", files=files)

    def openai(self, key: str, **options: Any) -> openai.AsyncOpenAI:
        client = openai.DefaultAsyncHttpxClient(verify=TLS)
        own = {"base_url": f"{self.url}/v1", "api_key": key, "max_retries": 0, "http_client": client}
        return openai.AsyncOpenAI(**own | options)

    def anthropic(self, key: str, **options: Any) -> anthropic.AsyncAnthropic:
        client = anthropic.DefaultAsyncHttpxClient(verify=TLS)
        own = {"base_url": self.url, "api_key": key, "max_retries": 0, "http_client": client}
        return anthropic.AsyncAnthropic(**own | options)

    async def chat(self, key: str, text: str, **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], **fields}
        return await self.http.post("/v1/chat/completions", json=body, headers=bearer(key))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def waits_at_most(site: Site, seconds: float) -> None:
    """So long a request may wait in the queue from now on, one that waits already too."""
    plan = site.services.dispatcher._plan
    plan._capacity = replace(plan._capacity, queue_timeout=seconds)


def engine_settings(
    model: Path, data_dir: Path, engine_args: Mapping[str, Any] | None = None, **fields: Any
) -> Settings:
    """For a server on a real engine: with as many slots as memory allows, if not given, and a terse log.

    The engine leaves its core to other tests while it waits for a step.
    """
    return Settings(
        model=str(model),
        data_dir=data_dir,
        admin_key=ADMIN_KEY,
        service_key=SERVICE_KEY,
        log_format="text",
        log_level="warning",
        engine_args={**RESTING, **(engine_args or {})},
        # A busy machine is no reason to begin a stream.
        **{"gpu_slots": "auto", "host_slots": "auto", "sse_keepalive": 600.0, **fields},
    )


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[Site]:
    BoundedHeads.seconds = app.state.settings.client_timeout
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        http=BoundedHeads,
        log_config=None,
        lifespan="on",
        timeout_keep_alive=600,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        if task.done():
            task.result()
            raise RuntimeError("the server did not start")
        await asyncio.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    # A connection is given up before the server does so, or a request may meet it just as it closes.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2)
    async with (
        httpx.AsyncClient(
            base_url=url, headers=bearer(ADMIN_KEY), timeout=300, limits=limits, verify=TLS
        ) as admin,
        httpx.AsyncClient(base_url=url, timeout=300, limits=limits, verify=TLS) as http,
    ):
        yield Site(app, url, admin, http, server)
    server.should_exit = True
    await task
