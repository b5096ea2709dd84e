"""One customer attacks, another must not notice: ``python -m tests.bench.attack``, or ``make attack``.

A server on the demo's base is sent every hostile input of ``hostile.py``, a kind at a time, beside two
controls: a stream that never pauses, and a customer who asks short questions. Before each kind the
controls run undisturbed. A kind passes if the controls' answers are those of the quiet time, the stream's
longest gap is at most ``GAP`` times its quiet p99, the API process keeps its memory, and the attacker got
refusals only. ``ENGINE=fake`` takes the tests' engine instead, and leaves out what the compiler of grammars
would answer.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from server.demo.base import BASE_NAME, CHECKOUT, cache_folder, prepare
from tests.bench.client import NEVER_END
from tests.bench.hostile import KINDS, Kind
from tests.bench.hostile_wire import ATTACKER_NICE, Outcomes, Victim, attacker
from tests.bench.servers import Loraplex, Setup
from tests.support import tiny

GAP = 2.0
MEMORY = 32.0  # MiB that the API process may keep of an attack
QUIET = 20.0  # seconds
PROMPTS = ("My parcel has not arrived.", "Why is the sky blue?", "Count to ten.")
STREAM = "Once upon a time"
EVERY = {STREAM, *PROMPTS}  # what must have been answered in peace before it can be compared
COMPILED = {"patterns", "grammars", "large constraints"}
HEAD = (
    f"The attacker is a process on the server's machine, at nice {ATTACKER_NICE}: in life it is another"
    " machine, and what it costs itself is not what it costs others."
)
OUT = CHECKOUT / "bench-results" / "attack.md"
# In float32: in bfloat16 a batch of another size alone changes answers.
SETUP = Setup(gpu_slots=2, host_slots=4, max_num_seqs=8, max_lora_rank=16, dtype="float32")


class Attacked(Loraplex):
    """With a service key, as behind a gateway. ``fake`` has the tests' engine, which needs no model."""

    service = secrets.token_urlsafe(24)
    fake = False

    def command(self, port: int) -> list[str]:
        return [sys.executable, "-m", "tests.bench.hostile_server"] if self.fake else super().command(port)

    def environment(self, port: int) -> dict[str, str]:
        return super().environment(port) | {"LORAPLEX_SERVICE_KEY": self.service}

    async def customer(self, name: str, scopes: Sequence[str] = ("inference",), **limits: int) -> str:
        """Make a customer; return its key."""
        await self._admin("POST", "/tenants", json={"id": name, "base_allowed": True, "limits": limits})
        made = await self._admin("POST", f"/tenants/{name}/keys", json={"scopes": list(scopes)})
        return str(made.json()["key"])

    async def upload(self, tenant: str, folder: Path) -> None:
        files = {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
        await self._admin("POST", f"/tenants/{tenant}/adapters/support/versions", files=files)


@dataclass
class Seen:
    """What the controls saw in a while.

    ``gaps`` of the stream and times of ``/health`` are in seconds, ``memory`` is the API process's in MiB,
    ``answers`` are by prompt.
    """

    gaps: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    answers: dict[str, set[str]] = field(default_factory=dict)

    def p99(self) -> float:
        return sorted(self.gaps)[max(0, int(len(self.gaps) * 0.99) - 1)]

    def note(self, prompt: str, text: str) -> None:
        self.answers.setdefault(prompt, set()).add(text)


@dataclass(frozen=True)
class Verdict:
    """One kind's row. ``gap`` and ``health`` are the longest, in seconds; memory is in MiB."""

    kind: str
    outcomes: Outcomes
    wrong_outcomes: frozenset[str]
    equal: bool
    gap: float
    quiet_p99: float
    health: float
    memory: float
    peak: float

    @property
    def misses(self) -> list[str]:
        found = []
        if not self.equal:
            found.append("answers differ")
        if self.gap > GAP * self.quiet_p99:
            found.append("gap")
        if self.memory > MEMORY:
            found.append("memory")
        if self.wrong_outcomes:
            found.append(f"outcomes {', '.join(sorted(self.wrong_outcomes))}")
        return found


def verdict(kind: Kind, outcomes: Outcomes, quiet: Seen, seen: Seen) -> Verdict:
    """Compare what the controls saw during ``kind`` with the quiet time before it."""
    return Verdict(
        kind=kind.name,
        outcomes=outcomes,
        wrong_outcomes=frozenset(outcomes) - kind.right,
        equal=all(texts <= quiet.answers.get(prompt, set()) for prompt, texts in seen.answers.items()),
        gap=max(seen.gaps, default=float("inf")),
        quiet_p99=quiet.p99(),
        health=max(seen.health, default=float("inf")),
        memory=seen.memory[-1] - quiet.memory[-1],
        peak=max(seen.memory) - quiet.memory[-1],
    )


def table(verdicts: Sequence[Verdict]) -> str:
    """Markdown."""
    rows = [
        "| attack | what came back | controls' answers | longest gap / quiet p99 | longest `/health` "
        "| API memory kept / at most | |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for v in verdicts:
        came = ", ".join(f"{count} × {what}" for what, count in sorted(v.outcomes.items())) or "nothing"
        rows.append(
            f"| {v.kind} | {came} | {'equal' if v.equal else 'differ'} "
            f"| {v.gap * 1e3:.0f} / {v.quiet_p99 * 1e3:.0f} ms = {v.gap / v.quiet_p99:.1f} × "
            f"| {v.health * 1e3:.0f} ms | {v.memory:+.0f} / {v.peak:+.0f} MiB "
            f"| {'missed: ' + '; '.join(v.misses) if v.misses else 'met'} |"
        )
    return "\n".join(rows)


class Controls:
    """The stream, the customer, and a pulse; what they see goes to ``seen``, which may be exchanged."""

    def __init__(self, server: Attacked, key: str) -> None:
        self.seen = Seen()
        self._server = server
        limits = httpx.Limits(max_connections=None, keepalive_expiry=2)
        self._http = httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False, limits=limits)
        self._headers = {"Authorization": f"Bearer {key}"}

    async def run(self) -> None:
        """Until cancelled."""
        async with self._http, asyncio.TaskGroup() as group:
            group.create_task(self._stream())
            group.create_task(self._ask())
            group.create_task(self._pulse())

    async def _stream(self) -> None:
        body = {
            "model": "support",
            "prompt": STREAM,
            "max_tokens": 40,
            "temperature": 0,
            "logit_bias": NEVER_END,
            "stream": True,
        }
        while True:
            text, last = "", time.perf_counter()
            try:
                async with self._http.stream(
                    "POST", "/v1/completions", headers=self._headers, json=body
                ) as answer:
                    async for line in answer.aiter_lines():
                        if line.startswith("data: {"):
                            now = time.perf_counter()
                            self.seen.gaps.append(now - last)
                            last = now
                            text += json.loads(line[6:])["choices"][0]["text"]
            except (httpx.HTTPError, KeyError) as exc:
                text = repr(exc)
            self.seen.note(STREAM, text)

    async def _ask(self) -> None:
        for prompt in itertools.cycle(PROMPTS):
            body = {"model": "support", "prompt": prompt, "max_tokens": 12, "temperature": 0}
            try:
                answer = await self._http.post("/v1/completions", headers=self._headers, json=body)
                text = answer.json()["choices"][0]["text"] if answer.is_success else answer.text
            except httpx.HTTPError as exc:
                text = repr(exc)
            self.seen.note(prompt, text)
            await asyncio.sleep(0.3)

    async def _pulse(self) -> None:
        while True:
            began = time.perf_counter()
            try:
                await self._http.get("/health")
            except httpx.HTTPError:
                self.seen.health.append(60.0)
            self.seen.health.append(time.perf_counter() - began)
            # In a thread, or the stream beside it would wait: it looks as if the server had stalled.
            self.seen.memory.append(await asyncio.to_thread(self._server.api_memory))
            await asyncio.sleep(0.1)


@asynccontextmanager
async def attacked(work: Path, *, fake: bool = False) -> AsyncIterator[tuple[Attacked, Victim]]:
    base = prepare(cache_folder())
    server = Attacked(base, work)
    server.fake = fake
    async with server.running(SETUP):
        control = await server.customer("control")
        await server.upload("control", tiny.adapter(1) if fake else CHECKOUT / "config" / "demo" / "acme")
        writes = ("inference", "adapters:write")
        victim = Victim(
            url=server.url,
            port=urlsplit(server.url).port or 0,
            base=base,
            base_name=BASE_NAME,
            attacker=await server.customer("attacker", writes),
            small=await server.customer("small", writes, max_storage_bytes=2_000_000),
            service=server.service,
            control=control,
        )
        yield server, victim
    await server.aclose()


async def measure(kinds: Sequence[Kind], quiet_seconds: float, *, fake: bool = False) -> list[Verdict]:
    """Attack with each of ``kinds`` in turn, all on one server."""
    verdicts = []
    work = Path(tempfile.mkdtemp(prefix="attack-"))
    try:
        async with attacked(work, fake=fake) as (server, victim), attacker() as apart:
            controls = Controls(server, victim.control)
            running = asyncio.create_task(controls.run())
            await asyncio.sleep(5)  # the first answers are slower
            for kind in kinds:
                quiet = controls.seen = Seen()
                await asyncio.sleep(quiet_seconds)
                while not quiet.answers.keys() >= EVERY:
                    await asyncio.sleep(0.1)
                seen = controls.seen = Seen()
                outcomes = await apart.run(kind.attack, victim)
                await asyncio.sleep(5)
                verdicts.append(verdict(kind, outcomes, quiet, seen))
                print(table(verdicts[-1:]).splitlines()[-1], flush=True)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return verdicts


def kinds_of(engine: str) -> tuple[list[Kind], bool]:
    """(what is tried on ``engine``, whether it is the fake one, which compiles no grammars)."""
    fake = engine == "fake"
    return [kind for kind in KINDS if not (fake and kind.name in COMPILED)], fake


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [kind.name for kind in KINDS]
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(names)}; all if none")
    parser.add_argument("--quiet", type=float, default=QUIET, help="least seconds in peace before each")
    given = parser.parse_args()
    if unknown := set(given.kinds) - set(names):
        parser.error(f"no such kind: {', '.join(sorted(unknown))}")
    kinds, fake = kinds_of(os.environ.get("ENGINE", "real"))
    verdicts = asyncio.run(
        measure([k for k in kinds if not given.kinds or k.name in given.kinds], given.quiet, fake=fake)
    )
    OUT.parent.mkdir(exist_ok=True)
    found = f"{HEAD}\n\n{table(verdicts)}\n"
    OUT.write_text(found)
    print(f"\n{found}\nwritten to {OUT}")
    return int(any(v.misses for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
