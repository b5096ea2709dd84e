"""What faults share: the service, its customers, and a customer of their own."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import Any

from tests.bench.chaos.load import Load
from tests.bench.chaos.service import Service
from tests.support import changes
from tests.support.site import bearer

PATIENCE = 20.0  # seconds for what a fault waits for
OWN = 200  # the first of the adapters that faults upload
SPARE = "spare"  # the customer of the faults' own


class Missed(AssertionError):
    """What a fault saw and should not have."""


@dataclass
class World:
    """``killed`` are the times of SIGKILLs for the server."""

    service: Service
    load: Load
    rng: random.Random
    killed: list[float] = field(default_factory=list)
    number: int = OWN
    key: str = ""

    async def spare(self, name: str) -> str:
        """A new adapter ``name`` of the faults' customer; its digest."""
        service = self.service
        if not self.key:
            await service.admin("POST", "/tenants", json={"id": SPARE})
            self.key = (await service.admin("POST", f"/tenants/{SPARE}/keys", json={})).json()["key"]
        await service.admin("DELETE", f"/tenants/{SPARE}/adapters/{name}")
        return await self.upload(name)

    async def upload(self, name: str, number: int | None = None) -> str:
        self.number += number is None
        url = f"/admin/v1/tenants/{SPARE}/adapters"
        change = ("upload", name, self.number if number is None else number)
        made = await changes.make(self.service.http, url, change, self.load.adapter)
        if made.status_code != 201:
            raise Missed(f"an upload got {made.status_code} {made.text[:200]}")
        return str(made.json()["digest"])

    async def ask(self, name: str, **fields: Any) -> tuple[int, str, str]:
        """Status, text or code, and version."""
        body = {"model": name, "prompt": "hi", "max_tokens": 4, "temperature": 0, **fields}
        answer = await self.service.http.post("/v1/completions", json=body, headers=bearer(self.key))
        said = answer.json()
        text = said["choices"][0]["text"] if answer.is_success else said["error"]["code"]
        return answer.status_code, text, answer.headers.get("x-loraplex-version", "")

    async def until(self, name: str, status: int, code: str = "", every: float = 0.1) -> float:
        """Seconds until ``name``, asked ``every`` so many, is answered with ``status`` and ``code``."""
        began, last = time.monotonic(), ("", "")
        while time.monotonic() - began < PATIENCE:
            got, text, _ = await self.ask(name)
            if got == status and (not code or text == code):
                return time.monotonic() - began
            last = (str(got), text)
            await asyncio.sleep(every)
        raise Missed(f"{name} is answered {' '.join(last)} instead of {status} {code}")

    async def a_while(self) -> None:
        await asyncio.sleep(self.rng.uniform(2, 4))
