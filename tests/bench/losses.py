"""``python -m tests.bench.losses``: replicas and gateways that are lost in mid-stream, ``--times`` each.

A gateway and two replicas, each a process. Six answers run, of four customers with an adapter each: four that
can go on elsewhere and two that cannot (they have a penalty). Then, in mid-stream, a process gets a signal:

    kill      SIGKILL to the replica with most to do
    freeze    SIGSTOP to it, and SIGCONT when the gateway has gone on without it
    drain     SIGTERM to it
    gateway   SIGKILL to the gateway

Of a replica's loss: the four have to be whole and equal to undisturbed ones, those of the two that ran there
told so (where it drains, they end there), the rest undisturbed, and the usage exact. Of the gateway's: every
client sees a broken connection, and nothing goes on in the replicas. The engines have no model, or with
``--real`` are vLLM's on the demo's base in float32 (on two busy cores, with ``LORAPLEX_REPLICA_STALL=15``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from server.demo.base import cache_folder, prepare
from server.demo.process import free_port
from tests.bench.adapters import make, of_rank
from tests.bench.servers import ENVIRONMENT
from tests.support.site import bearer

ADMIN, FLEET_KEY = bearer("admin-key-of-the-bench"), "fleet-key-of-the-bench"
CUSTOMERS, FIXED, TOKENS = 4, 2, 100
PATIENCE_S = 1800.0
FAULTS = ("freeze", "kill", "drain", "gateway")


class Wrong(Exception):
    """Something that had to hold does not."""


class TooLate(Exception):
    """An answer was over before the fault; nothing is known of it then."""


def check(holds: object, *told: object) -> None:
    """Wrong, saying ``told``, unless it holds."""
    if not holds:
        raise Wrong(" ".join(map(str, told))[:500])


async def until(holds: Callable[[], Awaitable[bool]], what: str) -> float:
    """The seconds that it took until ``holds``; Wrong where it never does."""
    clock = asyncio.get_running_loop().time
    began = clock()
    while clock() - began < PATIENCE_S:
        with suppress(httpx.TransportError):
            if await holds():
                return clock() - began
        await asyncio.sleep(0.05)
    raise Wrong(f"after {PATIENCE_S:.0f} s it is not so that {what}")


class Process:
    """A gateway or replica, and what is asked of it."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process = process
        self.http = httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def is_ready(self) -> bool:
        check(self.process.returncode is None, "a process has ended while it was starting")
        return (await self.http.get("/ready")).status_code == 200

    async def report(self) -> dict[str, Any]:
        """How a replica is."""
        answer = await self.http.get("/internal/v1/state", headers=bearer(FLEET_KEY))
        return dict(answer.json()["report"])

    async def is_idle(self) -> bool:
        report = await self.report()
        return not report["running"] and not report["queued"]

    async def metric(self, start: str) -> float:
        """The sum of the series whose lines begin so."""
        page = (await self.http.get("/metrics")).text
        return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(start))

    async def end(self) -> None:
        """With all that it has started."""
        await self.http.aclose()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()


async def prepared(customers: int, *, real: bool) -> tuple[dict[str, str], list[Path]]:
    """The settings of an engine, and folders of so many adapters for it."""
    if real:
        base = await asyncio.to_thread(prepare, cache_folder())
        chosen = of_rank(8, customers)
        await make(chosen)
        engine = json.dumps({"max_num_seqs": 8, "dtype": "float32"})
        settings = {"MODEL": str(base), "ENGINE_ARGS": engine, "MAX_MODEL_LEN": "512"}
        return settings, [adapter.folder for adapter in chosen]
    from tests.support import tiny  # imports torch

    shapes = {n: [shape.in_features, shape.out_features] for n, shape in tiny.base().modules.items()}
    os.environ["FAKE_MODULES"] = json.dumps(shapes)
    return {"MODEL": f"/models/{tiny.NAME}"}, [tiny.adapter(number) for number in range(customers)]


async def started(settings: dict[str, str], *, real: bool) -> Process:
    """A process on a free port, which is not ready yet."""
    port = free_port(0)
    told = settings | {
        "PORT": str(port),
        "ADMIN_KEY": ADMIN["Authorization"].removeprefix("Bearer "),
        "FLEET_KEY": FLEET_KEY,
        "LOG_LEVEL": "error",
    }
    own = real or settings["ROLE"] == "gateway"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *(("server", "serve") if own else ("tests.support.fake_server",))),
        env=os.environ | ENVIRONMENT | {f"LORAPLEX_{name}": value for name, value in told.items()},
        start_new_session=True,
    )
    return Process(process, f"http://127.0.0.1:{port}")


async def customer(server: Process, name: str, folder: Path) -> dict[str, str]:
    """Headers with the key of a new customer, who has the adapter ``a``."""
    http, path = server.http, f"/admin/v1/tenants/{name}"
    files = {file: (folder / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE)}
    made = await http.post("/admin/v1/tenants", json={"id": name}, headers=ADMIN)
    upload = await http.post(f"{path}/adapters/a/versions", files=files, headers=ADMIN)
    check((made.status_code, upload.status_code) == (201, 201), made.text, upload.text)
    key = await http.post(f"{path}/keys", json={}, headers=ADMIN)
    return bearer(key.json()["key"])


class Answer:
    """A stream as its client sees it; ``pause`` is the longest time between two pieces, in seconds."""

    def __init__(self, customer: int, *, fixed: bool = False) -> None:
        self.customer = customer
        self.fixed = fixed
        self.text = ""
        self.pause = 0.0
        self.broken = False

    async def read(self, gateway: Process, key: dict[str, str]) -> None:
        clock = asyncio.get_running_loop().time
        sent = {
            "model": "a",
            "messages": [{"role": "user", "content": "Count to a hundred."}],
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            **({"presence_penalty": 0.5} if self.fixed else {}),
        }
        last = None
        try:
            async with gateway.http.stream(
                "POST", "/v1/chat/completions", json=sent, headers=key
            ) as response:
                check(response.status_code == 200, response.status_code)
                async for piece in response.aiter_text():
                    now = clock()
                    self.pause = max(self.pause, now - (last or now))
                    last = now
                    self.text += piece
        except httpx.TransportError:
            self.broken = True

    @property
    def said(self) -> list[str]:
        """Its pieces of text."""
        lines = [
            line.removeprefix("data: ") for line in self.text.split("\n\n") if line.startswith("data: {")
        ]
        with suppress(ValueError):  # the last one, where the connection broke
            events = [json.loads(line) for line in lines]
            deltas = [choice["delta"] for event in events for choice in event.get("choices", ())]
            return [delta["content"] for delta in deltas if delta.get("content")]
        return []

    @property
    def whole(self) -> bool:
        return self.text.endswith("data: [DONE]\n\n") and '"error"' not in self.text

    @property
    def told(self) -> bool:
        return '"replica_lost"' in self.text


class Losses:
    """The fleet, its customers, and what undisturbed answers say."""

    def __init__(self, folder: Path, *, real: bool) -> None:
        self.replicas: list[Process] = []
        self.gateway: Process
        self.pauses: dict[str, list[float]] = {fault: [] for fault in FAULTS}
        self.moved = self.told = 0
        self._folder = folder
        self._real = real
        self._keys: list[dict[str, str]] = []
        self._wanted: list[list[str]] = []
        self._settings: dict[str, str] = {}

    async def start(self) -> None:
        folders = await self._prepare()
        self.replicas = [await self._started("replica") for _ in range(2)]
        self.gateway = await self._started("gateway")
        await self._ready()
        for number, folder in enumerate(folders):
            self._keys.append(await customer(self.gateway, f"c{number}", folder))
        for number in range(CUSTOMERS):
            answer = Answer(number)
            await answer.read(self.gateway, self._keys[number])
            check(answer.whole, answer.text[-300:])
            self._wanted.append(answer.said)
        check(len({"".join(said) for said in self._wanted}) == CUSTOMERS, "all adapters say the same")

    async def stop(self) -> None:
        for one in (*self.replicas, *([self.gateway] if hasattr(self, "gateway") else ())):
            await one.end()

    async def hit_in_time(self, fault: str) -> bool:
        """Whether all answers were still running when ``hit`` came to it."""
        try:
            await self.hit(fault)
        except TooLate:
            return False
        return True

    async def hit(self, fault: str) -> None:
        """One fault, and all that has to hold after it."""
        before = await self._usage()
        failed = 'loraplex_moved_answers_total{reason="failed"}'
        moved, lost = "loraplex_moved_answers_total", await self.gateway.metric(failed)
        moves = await self.gateway.metric(moved)
        answers = [Answer(number) for number in range(CUSTOMERS)]
        answers += [Answer(number, fixed=True) for number in range(FIXED)]
        reading = [asyncio.create_task(one.read(self.gateway, self._keys[one.customer])) for one in answers]

        async def under_way() -> bool:
            return all(
                len(one.said) > TOKENS // 10 or task.done()
                for one, task in zip(answers, reading, strict=True)
            )

        await until(under_way, "all answers have begun")
        if any(task.done() for task in reading):
            await asyncio.gather(*reading)
            raise TooLate
        reports = [await one.report() for one in self.replicas]
        busy = max(range(2), key=lambda number: reports[number]["running"])
        if fault == "gateway":
            self.gateway.send(signal.SIGKILL)
            await asyncio.gather(*reading)
            await self._check_broken(answers)
            return
        hit = self.replicas[busy]
        hit.send({"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "drain": signal.SIGTERM}[fault])
        await asyncio.gather(*reading)
        if fault == "freeze":
            hit.send(signal.SIGCONT)
            await until(hit.is_idle, "what a replica was asked for before it froze has ended there")
        else:
            await self._replace(hit, status=0 if fault == "drain" else -signal.SIGKILL)
        await self._ready()
        self._check(fault, answers)
        told = sum(one.told for one in answers)
        check(await self.gateway.metric(failed) - lost == told, "the metric has another number of failures")
        await self._check_usage(before, answers)
        self.moved += int(await self.gateway.metric(moved) - moves) - told
        self.told += told
        self.pauses[fault].append(max(one.pause for one in answers))

    def _check(self, fault: str, answers: list[Answer]) -> None:
        for one in answers:
            check(not one.broken, "a connection broke")
            if one.fixed and fault != "drain" and one.told:
                continue
            check(one.whole, f"customer {one.customer}, fixed: {one.fixed}:", one.text[-200:])
            if not one.fixed:
                check(one.said == self._wanted[one.customer], "another answer:", *one.said)

    async def _check_broken(self, answers: list[Answer]) -> None:
        """After the gateway's end; its pause is how long replicas went on."""
        for one in answers:
            check(one.broken and not one.whole, "a client did not notice")
        gone = await until(self._all_idle, "nothing goes on in the replicas")
        self.pauses["gateway"].append(gone)
        await self.gateway.end()
        self.gateway = await self._started("gateway")
        await self._ready()
        again = Answer(0)
        await again.read(self.gateway, self._keys[0])
        check(again.said == self._wanted[0], "another answer through the next gateway")

    async def _check_usage(self, before: Counter[str], answers: list[Answer]) -> None:
        whole, told = [one for one in answers if one.whole], [one for one in answers if one.told]
        wanted = {"completed": len(whole), "completed tokens": len(whole) * TOKENS, "failed": len(told)}

        async def counted() -> bool:
            found = await self._usage() - before
            return found["completed"] + found["failed"] >= len(answers)

        await until(counted, "all answers are in the usage")
        found = await self._usage() - before
        check({key: found[key] for key in wanted} == wanted, "usage:", dict(found), "instead of", wanted)
        said = sum(len(one.said) for one in told)
        exact = found["failed tokens"] >= said if self._real else found["failed tokens"] == said
        check(exact, f"usage: {found['failed tokens']} tokens of answers that said {said}")

    # --- the fleet -----------------------------------------------------------------------------------

    async def _prepare(self) -> list[Path]:
        """Folders of as many adapters as there are customers."""
        self._settings, folders = await prepared(CUSTOMERS, real=self._real)
        self._settings |= {"DATA_DIR": str(self._folder), "GPU_SLOTS": str(CUSTOMERS)}
        return folders

    async def _started(self, role: str) -> Process:
        return await started(self._settings | {"ROLE": role}, real=self._real)

    async def _replace(self, one: Process, *, status: int) -> None:
        check(await one.process.wait() == status, f"it ended with {one.process.returncode}")
        self.replicas.remove(one)
        await one.end()
        self.replicas.append(await self._started("replica"))

    async def _ready(self) -> None:
        """The gateway knows both replicas, and nothing else."""

        async def up() -> bool:
            return await self.gateway.metric("loraplex_replica_up{") == 2

        for one in (*self.replicas, self.gateway):
            await until(one.is_ready, "a process is ready")
        await until(up, "the gateway knows both replicas")

    async def _all_idle(self) -> bool:
        return all([await one.is_idle() for one in self.replicas])

    async def _usage(self) -> Counter[str]:
        answer = await self.gateway.http.get("/admin/v1/usage?by=outcome", headers=ADMIN)
        found: Counter[str] = Counter()
        for row in answer.json()["data"]:
            found[row["outcome"]] += row["requests"]
            found[f"{row['outcome']} tokens"] += row["output_tokens"]
        return found


async def run(times: int, faults: list[str], *, real: bool) -> bool:
    """Whether all was as it has to be."""
    folder = Path(tempfile.mkdtemp(prefix="loraplex-losses-"))
    losses, failed = Losses(folder, real=real), Counter[str]()
    try:
        await losses.start()
        for fault in faults:
            for number in range(times):
                try:
                    while not await losses.hit_in_time(fault):
                        print(f"{fault} {number + 1}: the machine is too slow; once more", flush=True)
                    print(f"{fault} {number + 1}: {losses.pauses[fault][-1]:.2f} s", flush=True)
                except Wrong as exc:
                    failed[fault] += 1
                    print(f"{fault} {number + 1}: {exc}", flush=True)
                    await losses.stop()
                    losses = await _anew(losses, folder, real=real)
            print(_row(fault, losses.pauses[fault], failed[fault]), flush=True)
        print(f"{losses.moved} answers moved, {losses.told} could not and were told", flush=True)
    finally:
        await losses.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return not failed


async def _anew(before: Losses, folder: Path, *, real: bool) -> Losses:
    """Another fleet after one of which nothing is known any more."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    made = Losses(folder, real=real)
    made.pauses, made.moved, made.told = before.pauses, before.moved, before.told
    await made.start()
    return made


def _row(fault: str, pauses: list[float], failed: int) -> str:
    what = "replicas went on for" if fault == "gateway" else "pause of"
    times = f"{median(pauses):.2f} s (median), {max(pauses):.2f} s (longest)" if pauses else "nothing"
    return f"{fault}: {len(pauses)} as they have to be, {failed} not; {what} {times}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.losses", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("faults", nargs="*", help=f"any of {', '.join(FAULTS)}; all of them")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--real", action="store_true", help="on vLLM")
    options = parser.parse_args()
    if unknown := set(options.faults) - set(FAULTS):
        parser.error(f"no fault {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    raise SystemExit(not asyncio.run(run(options.times, options.faults or list(FAULTS), real=options.real)))


if __name__ == "__main__":
    main()
