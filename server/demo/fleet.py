"""``make fleet``: one gateway, two replicas, six customers; a replica is killed in mid-stream, and nobody
notices."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

import httpx
import psutil
from rich.table import Table

from server.demo.base import base_folder, cache_folder
from server.demo.client import Answer, DemoError, ask, create_customer
from server.demo.process import free_port, running, wait_until_ready
from server.demo.run import (
    ADAPTER,
    ADAPTERS,
    CUSTOMERS,
    console,
    environment,
    interruptible,
    prepare_base,
    step,
)

QUESTION = "How do I learn to play the guitar?"
# Two customers to each voice: six adapters of their own.
SIX = {f"{name}{suffix}": name for name in CUSTOMERS for suffix in ("", "-two")}
SHOWN = 36  # characters of an answer: the table fits a terminal of 80
LONG_ENOUGH = 0.6  # seconds into the answers, before the kill


def run(*, once: bool, port: int | None, cache: Path | None, ray: bool | None = None) -> int:
    """As the demo's ``run``; with ``once`` it ends after the table, with 0 only if no answer changed.

    ``ray`` None: under Ray where that is installed.
    """
    by_ray = find_spec("ray") is not None if ray is None else ray
    return interruptible(_fleet(once, port or 8000, (cache or cache_folder()).absolute(), by_ray))


async def _fleet(once: bool, wanted: int, cache: Path, by_ray: bool) -> int:
    await prepare_base(cache)
    port, key = free_port(wanted), secrets.token_urlsafe(32)
    data = cache / "fleet-data"
    data.mkdir(parents=True, exist_ok=True)
    log, url = data / "fleet.log", f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "server", "fleet", "up", "--replicas", "2"]
    command += ["--ray", "--cpus", "0"] if by_ray else []
    # In float32: in bfloat16 two words that are nearly as likely may change places with the number of
    # requests that are answered at once, on one engine as on two.
    engine = {"max_num_seqs": 16, "dtype": "float32"}
    more = {
        "RAY_ADDRESS": "",  # a cluster of its own
        "LORAPLEX_FLEET_KEY": secrets.token_urlsafe(32),
        "LORAPLEX_ENGINE_ARGS": json.dumps(engine),
    }
    async with (
        running(command, environment(base_folder(cache), data, port, key) | more, log) as fleet,
        httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client,
    ):
        admin = {"Authorization": f"Bearer {key}"}
        how = "under Ray" if by_ray else "as plain processes"
        with step(f"Starting a gateway and two replicas {how}, each with the model"):
            await wait_until_ready(fleet, client, log)
            await _both(client, admin)
        with step("Creating six customers and uploading an adapter for each"):
            async with httpx.AsyncClient(base_url=url, headers=admin, timeout=120, trust_env=False) as api:
                keys = {
                    name: await create_customer(api, name, ADAPTER, ADAPTERS / voice)
                    for name, voice in SIX.items()
                }
        with step("Asking all of them"):
            before = await _ask_all(client, keys)
        with step("Asking all of them again, and killing one replica while it answers"):
            asking = asyncio.create_task(_ask_all(client, keys))
            await asyncio.sleep(LONG_ENOUGH)
            killed = await _kill_one(client, admin)
            after = await asking
        console.print(_table(before, after, how))
        same = all(before[name].text == after[name].text for name in SIX)
        console.print(
            f"{killed} was killed; "
            + ("nobody noticed more than a pause." if same else "[red]an answer changed.[/red]")
        )
        if once or not same:
            return 0 if same else 1
        console.print(f"\nServing on {url} until Ctrl-C; the replica is being started again. The log: {log}")
        await fleet.wait()
    raise DemoError("the fleet ended")


async def _both(client: httpx.AsyncClient, admin: dict[str, str]) -> None:
    while len(await _replicas(client, admin)) < 2:
        await asyncio.sleep(0.3)


async def _replicas(client: httpx.AsyncClient, admin: dict[str, str]) -> list[dict[str, Any]]:
    found = await client.get("/admin/v1/replicas", headers=admin)
    return [one for one in found.raise_for_status().json()["data"] if one["state"] == "ready"]


async def _ask_all(client: httpx.AsyncClient, keys: dict[str, str]) -> dict[str, Answer]:
    answers = await asyncio.gather(*(ask(client, key, ADAPTER, QUESTION) for key in keys.values()))
    return dict(zip(keys, answers, strict=True))


async def _kill_one(client: httpx.AsyncClient, admin: dict[str, str]) -> str:
    """The busier replica; says which that was."""
    busiest = max(await _replicas(client, admin), key=lambda one: one["running"])
    process = await asyncio.to_thread(process_at, int(busiest["url"].rpartition(":")[2]))
    os.kill(process, signal.SIGKILL)
    return f"The replica at {busiest['url']}, process {process},"


def process_at(port: int) -> int:
    """Who listens on ``port`` of this machine, whoever started it; DemoError if nobody does."""
    for one in psutil.net_connections("tcp"):
        if one.status == psutil.CONN_LISTEN and one.laddr.port == port and one.pid is not None:
            return int(one.pid)
    raise DemoError(f"no process listens on port {port}")


def _table(before: dict[str, Answer], after: dict[str, Answer], how: str) -> Table:
    table = Table(title=f"“{QUESTION}”, two replicas {how}", title_justify="left")
    table.add_column("customer", no_wrap=True, min_width=max(map(len, SIX)))
    table.add_column("answer", no_wrap=True)
    table.add_column("seconds", justify="right", min_width=7)
    table.add_column("with kill", justify="right", min_width=9)
    table.add_column("same", min_width=4)
    for name, answer in before.items():
        same = "yes" if answer.text == after[name].text else "NO"
        table.add_row(
            name,
            shorten(answer.text, SHOWN, placeholder=" …"),
            f"{answer.total:.1f}",
            f"{after[name].total:.1f}",
            same,
        )
        if same == "NO":
            table.add_row("", shorten(after[name].text, SHOWN, placeholder=" …"), "", "", "")
    return table
