"""What paging and fairness cost where nobody needs them: the base and one adapter, 1 and 16 clients."""

from __future__ import annotations

import asyncio
import math
import time

from tests.bench.adapters import Adapter, of_rank
from tests.bench.client import Client, Record
from tests.bench.scenario import Goal, Measure, Round, Scenario, Values
from tests.bench.servers import Server
from tests.bench.workload import prompt, warm

(ADAPTER,) = of_rank(16, 1, first=100)
MODELS: dict[str, Adapter | None] = {"base": None, "adapter": ADAPTER}
REQUESTS = {1: 4, 16: 2}  # clients -> requests of each
INPUT, OUTPUT = 16, 64  # tokens


async def measure(server: Server, client: Client, round_: Round) -> Values:
    await warm(server, client, list(MODELS.values()))
    values: Values = {}
    for model, adapter in MODELS.items():
        for clients in REQUESTS:
            cell = await _cell(server, client, round_, adapter, clients)
            values |= {f"{model}_{clients}_{key}": value for key, value in cell.items()}
    return values


async def _cell(
    server: Server, client: Client, round_: Round, adapter: Adapter | None, clients: int
) -> Values:
    """A fixed amount of work, so that no window cuts through a wave of requests."""
    rng = round_.rng(clients)
    requests, output = round_.count(REQUESTS[clients], 1), round_.count(OUTPUT, 8)

    async def one_client() -> list[Record]:
        return [await client.ask(adapter, prompt(INPUT, rng), output) for _ in range(requests)]

    start, cpu = time.perf_counter(), server.api_cpu_seconds()
    records = [r for done in await asyncio.gather(*(one_client() for _ in range(clients))) for r in done]
    seconds, used = time.perf_counter() - start, server.api_cpu_seconds() - cpu
    tokens = sum(r.output_tokens or 0 for r in records)
    return {"tokens_per_s": tokens / seconds, "cpu_per_1000": used / tokens * 1000 if tokens else math.nan}


def _measures() -> tuple[Measure, ...]:
    rows = []
    for model in MODELS:
        for clients in REQUESTS:
            where = f"{model}, {clients} client{'s' if clients > 1 else ''}"
            rows += [
                Measure(f"{model}_{clients}_tokens_per_s", where, "tok/s", Goal("ratio", "≥", 0.97)),
                Measure(
                    f"{model}_{clients}_cpu_per_1000",
                    f"{where}: API process per 1,000 tokens",
                    "CPU s",
                    Goal("ratio", "≤", 1.15),
                ),
            ]
    return tuple(rows)


SCENARIO = Scenario("overhead", _measures(), lambda _: (ADAPTER,), measure)
