"""``python -m tests.bench.rollout_inference``: what a rollout costs requests on the real engine.

A server on vLLM with two adapters, each with two equal versions; one of them has a rollout that sends half
of its requests to the newer version. Requests go to both in turns drawn by chance, one at a time, and what is
measured of each is the processor time of all processes, the engine's too, until its answer is there. Both of
a pair meet the same machine a moment apart. Looks at the rollout, every two seconds, fall on both alike:
``rollout-cost`` of ``python -m tests.bench`` measures them, and requests where a model takes no time at all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import tempfile
from pathlib import Path
from typing import Any

import httpx
import psutil

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from tests.bench.losses import ADMIN, Process, check, prepared, started, until
from tests.bench.scenarios.rollout_cost import begun
from tests.bench.servers import processor_s
from tests.bench.stats import median, middle, percent_more
from tests.support.resting import RESTING
from tests.support.site import bearer

TENANT = "/admin/v1/tenants/acme"
TOKENS, WARM = 48, 6


async def customer(http: httpx.AsyncClient, folder: Path) -> dict[str, str]:
    """Headers with the key of a customer whose adapters ``a`` and ``b`` have two equal versions, 1 live."""
    files = {file: (folder / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE)}
    (await http.post("/admin/v1/tenants", json={"id": "acme"}, headers=ADMIN)).raise_for_status()
    for name in "ab":
        for _ in range(2):
            made = await http.post(f"{TENANT}/adapters/{name}/versions", files=files, headers=ADMIN)
            made.raise_for_status()
        live = await http.patch(f"{TENANT}/adapters/{name}", json={"live": 1}, headers=ADMIN)
        live.raise_for_status()
    return bearer((await http.post(f"{TENANT}/keys", json={}, headers=ADMIN)).json()["key"])


async def pairs(server: Process, key: dict[str, str], many: int) -> dict[str, list[float]]:
    """Milliseconds of processor time of each request, by adapter; those of one place are a pair."""
    tree = psutil.Process(server.process.pid)
    processes = [one.pid for one in (tree, *tree.children(recursive=True))]
    asked, draw = 0, random.Random(1)

    async def took(name: str) -> float:
        nonlocal asked
        asked += 1
        body: dict[str, Any] = {
            "model": name,
            "messages": [{"role": "user", "content": "Count to a hundred."}],
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "temperature": 0,
            "user": str(asked),  # whose requests stay with one version
        }
        before = processor_s(*processes)
        (await server.http.post("/v1/chat/completions", json=body, headers=key)).raise_for_status()
        return 1000 * (processor_s(*processes) - before)

    found: dict[str, list[float]] = {"a": [], "b": []}
    for number in range(WARM + many):
        for name in draw.sample("ab", 2):
            value = await took(name)
            if number >= WARM:  # until then both versions come into slots
                found[name].append(value)
    return found


async def run(many: int) -> None:
    settings, (folder,) = await prepared(1, real=True)
    with tempfile.TemporaryDirectory(prefix="loraplex-rollout-") as data:
        # The engine's own process looks for a step's end all the time otherwise, which is no work.
        engine = json.dumps(json.loads(settings["ENGINE_ARGS"]) | RESTING)
        settings |= {"DATA_DIR": data, "GPU_SLOTS": "4", "ROLE": "all", "ENGINE_ARGS": engine}
        server = await started(settings, real=True)
        try:
            await until(server.is_ready, "the server is ready")
            key = await customer(server.http, folder)
            one = await begun(server.http, f"{TENANT}/adapters/a", ADMIN)
            found = await pairs(server, key, many)
            seen = (await server.http.get(one, headers=ADMIN)).json()
        finally:
            await server.end()
    check(seen["state"] == "running", seen)
    new = seen["numbers"]["new"]["requests"]
    check(new > 0, "the new version has answered nothing")
    logs = middle(math.log(a / b) for a, b in zip(found["a"], found["b"], strict=True))
    more, least, most = percent_more(logs)
    print(
        f"{median(found['b']):.0f} ms of processor time for {TOKENS} tokens without a rollout, and beside one"
    )
    print(
        f"{more:+.2f} % (95 % interval {least:+.2f} to {most:+.2f}); {many} pairs, {new} of the new version"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.rollout_inference", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--pairs", type=int, default=200)
    asyncio.run(run(parser.parse_args().pairs))


if __name__ == "__main__":
    main()
