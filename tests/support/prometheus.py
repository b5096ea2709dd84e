"""A real Prometheus for a test, where one is installed."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.ports import unused

PROGRAM, TOOL = shutil.which("prometheus"), shutil.which("promtool")
CONFIG = Path(__file__).parents[2] / "config"
ALERTS = CONFIG / "prometheus" / "alerts.yml"
# What minutes become, so that a test sees them pass.
WINDOW_S = 5


def hurried(rules: str) -> str:
    """The same rules over seconds, and without patience."""
    return re.sub(r"\[\d+[smh]\]", f"[{WINDOW_S}s]", re.sub(r"\n +for: \S+", "", rules))


class Prometheus:
    """What it answers."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def query(self, expr: str) -> list[dict[str, Any]]:
        """The samples of an instant query; AssertionError where Prometheus refuses it."""
        answer = (await self._http.get("/api/v1/query", params={"query": expr})).json()
        assert answer["status"] == "success", f"{expr}: {answer}"
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    async def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        alerts = (await self._http.get("/api/v1/alerts")).json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    async def until(self, alert: str, *, fires: bool) -> None:
        """Waits until ``alert`` fires, or does not any more."""
        firing: set[str] = set()
        try:
            async with asyncio.timeout(240):
                while (alert in (firing := await self.firing())) != fires:
                    await asyncio.sleep(0.2)
        except TimeoutError:
            raise AssertionError(
                f"{alert} does not {'fire' if fires else 'end'}; what fires: {firing}"
            ) from None

    async def until_calm(self) -> None:
        """Waits until nothing fires."""
        async with asyncio.timeout(240):
            while await self.firing():
                await asyncio.sleep(0.2)

    async def fires_while(self, alerts: tuple[str, ...], cause: Callable[[], Awaitable[Any]]) -> None:
        """Repeats ``cause`` until all of ``alerts`` have fired: there may be no sample from just before."""
        waiting = asyncio.gather(*(self.until(alert, fires=True) for alert in alerts))
        while not waiting.done():
            await cause()
            await asyncio.sleep(0.2)
        await waiting

    async def exemplars(self, series: str) -> list[dict[str, Any]]:
        """All exemplars of ``series``."""
        asked = {"query": series, "start": 0, "end": 4_000_000_000}
        found = await self._http.get("/api/v1/query_exemplars", params=asked)
        return [e for one in found.json()["data"] for e in one["exemplars"]]


@asynccontextmanager
async def prometheus(folder: Path, *ports: int) -> AsyncIterator[Prometheus]:
    """Scrapes ``ports`` of 127.0.0.1 each second, and evaluates our alerts as often."""
    assert PROGRAM is not None
    folder.mkdir()
    (folder / "alerts.yml").write_text(hurried(ALERTS.read_text()))
    often = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    job = {"job_name": "loraplex", "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in ports]}]}
    config = {"global": often, "rule_files": ["alerts.yml"], "scrape_configs": [job]}
    (folder / "prometheus.yml").write_text(json.dumps(config))  # which is YAML too
    own = unused()
    process = subprocess.Popen(
        [
            PROGRAM, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{own}", "--log.level=warn", "--enable-feature=exemplar-storage",
        ],
        stdout=subprocess.DEVNULL,
        stderr=(folder / "log").open("w"),
    )  # fmt: skip
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{own}", timeout=60) as http:
            async with asyncio.timeout(240):
                while not await _ready(http):
                    assert process.poll() is None, (folder / "log").read_text()
                    await asyncio.sleep(0.1)
            yield Prometheus(http)
    finally:
        process.terminate()
        process.wait()


async def _ready(http: httpx.AsyncClient) -> bool:
    try:
        return (await http.get("/-/ready")).status_code == 200
    except httpx.TransportError:
        return False
