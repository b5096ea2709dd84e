"""What a customer's streams notice of another customer's batch: first tokens with it and without, in turns.

A batch has more lines than can be answered, and is cancelled at the end of its turn.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

import httpx

from tests.bench.adapters import Adapter, of_rank
from tests.bench.client import Client, Record
from tests.bench.scenario import Goal, Measure, Round, Scenario, Values
from tests.bench.servers import Loraplex, Server
from tests.bench.stats import percentile
from tests.bench.workload import closed_loop, prompt, warm

OTHER, MINE = of_rank(16, 2, first=900)
CLIENTS, INPUT, OUTPUT = 2, 16, 16
LINES = 5000
TURNS = 4
URL = "/v1/completions"


class Batch:
    """Of the customer of ``adapter``."""

    def __init__(self, http: httpx.AsyncClient, server: Server, adapter: Adapter) -> None:
        self._http = http
        target = server.request(adapter, {})
        self._url, self._headers = target.url.removesuffix(URL), target.headers
        self._model = target.json["model"]
        self._id = ""

    async def begin(self, rng: random.Random) -> None:
        lines = [
            {"custom_id": str(number), "method": "POST", "url": URL, "body": self._body(rng)}
            for number in range(LINES)
        ]
        content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
        file = await self._post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", content)})
        asked = {"input_file_id": file["id"], "endpoint": URL, "completion_window": "24h"}
        self._id = (await self._post("/v1/batches", json=asked))["id"]

    def _body(self, rng: random.Random) -> dict[str, Any]:
        return {"model": self._model, "prompt": prompt(INPUT, rng), "max_tokens": OUTPUT, "temperature": 0}

    async def end(self) -> int:
        """Cancels it; how many lines were answered."""
        counts = (await self._post(f"/v1/batches/{self._id}/cancel"))["request_counts"]
        assert not counts["failed"], counts
        return int(counts["completed"])

    async def _post(self, path: str, **content: Any) -> dict[str, Any]:
        answer = await self._http.post(self._url + path, headers=self._headers, **content)
        answer.raise_for_status()
        return dict(answer.json())


async def measure(server: Server, client: Client, round_: Round) -> Values:
    assert isinstance(server, Loraplex)
    rng = round_.rng()
    await warm(server, client, [OTHER, MINE])
    turn = round_.seconds(30, 4)
    answered = taken = 0.0

    async def look(label: str) -> None:
        async def ask(number: int) -> Record:
            return await client.ask(OTHER, prompt(INPUT, rng), OUTPUT, label=label)

        async with closed_loop(CLIENTS, ask, drain=True):
            await asyncio.sleep(turn)

    async with httpx.AsyncClient(timeout=120, trust_env=False) as http:
        for _ in range(TURNS):
            await look("quiet")
            batch, began = Batch(http, server, MINE), time.perf_counter()
            await batch.begin(rng)
            await look("beside")
            answered, taken = answered + await batch.end(), taken + time.perf_counter() - began
    values: Values = {"lines": answered / taken}
    for label in ("quiet", "beside"):
        times = [record.to_first_token for record in client.labelled(label)]
        values |= {f"{label}_p50": percentile(times, 50), f"{label}_p99": percentile(times, 99)}
    return values | {"slower": values["beside_p99"] / values["quiet_p99"]}


SCENARIO = Scenario(
    "batches",
    (
        Measure("quiet_p50", "others' first token without a batch, median", "s"),
        Measure("quiet_p99", "others' first token without a batch, p99", "s"),
        Measure("beside_p50", "others' first token beside a batch, median", "s"),
        Measure("beside_p99", "others' first token beside a batch, p99", "s"),
        Measure("slower", "p99 beside a batch to p99 without", "×", Goal("value", "≤", 1.2)),
        Measure("lines", "lines of the batch, meanwhile", "/s"),
    ),
    lambda _: (OTHER, MINE),
    measure,
    servers=("loraplex",),
)
