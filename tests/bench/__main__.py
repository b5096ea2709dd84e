"""The command line: ``python -m tests.bench [SCENARIO ...] [--runs N] [--out DIR] [--quick] ...``.

In each run, both servers are started once for each setup, in turns first, and measured by the same client; a
simulation needs neither.
The status is 0 if everything could be measured, whether or not the targets are met, and 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from server.demo.base import CHECKOUT, cache_folder, prepare
from tests.bench.adapters import make
from tests.bench.apart import in_a_process
from tests.bench.client import Client, Record
from tests.bench.plot import write_plot, write_samples
from tests.bench.report import Outcomes, Row, summarize, table, write_json, write_table
from tests.bench.scenario import Round, Scenario, Simulation
from tests.bench.scenarios import FULL_RUN, SCENARIOS
from tests.bench.servers import SERVERS, Server, Setup

RUNS = 3

# A log file is no terminal and has no width of its own.
console = Console(width=None if Console().is_terminal else 150, log_path=False)


class Bench:
    """``outcomes`` grows while it runs, and is written after each server, so that a stop loses little."""

    def __init__(
        self, scenarios: Sequence[Scenario | Simulation], servers: Sequence[Server], out: Path
    ) -> None:
        self.scenarios = scenarios
        self.outcomes = {scenario.name: Outcomes() for scenario in scenarios}
        self._servers = servers
        self._out = out

    async def run(self, round_: Round) -> None:
        due = [s for s in self.scenarios if s.runs is None or round_.number < s.runs]
        for simulation in (s for s in due if isinstance(s, Simulation)):
            await self._simulate(simulation, round_)
            self.write(quick=round_.quick)
        measured = [s for s in due if isinstance(s, Scenario)]
        # In turns, so that a machine that gets slower or faster does not favour one of them.
        servers = self._servers if round_.number % 2 == 0 else self._servers[::-1]
        for setup in dict.fromkeys(setup for scenario in measured for setup in scenario.setups):
            for server in servers:
                todo = [s for s in measured if setup in s.setups and s.due(server.name, round_)]
                if todo:
                    await self._session(server, setup, todo, round_)
                    self.write(quick=round_.quick)

    async def _simulate(self, simulation: Simulation, round_: Round) -> None:
        began = time.monotonic()
        (where,) = simulation.servers
        try:
            async with asyncio.timeout(simulation.longest):
                values = await in_a_process(simulation.simulate, round_)
            self.outcomes[simulation.name].add(where, round_.number, values)
            console.log(f"run {round_.number + 1}: {simulation.name}: {_since(began)}")
        except Exception as exc:
            self._failed(simulation, where, round_, exc)

    async def _session(
        self, server: Server, setup: Setup, scenarios: Sequence[Scenario], round_: Round
    ) -> None:
        """The other server is not even started: a worker of vLLM's takes half a core while it idles."""
        began = time.monotonic()
        try:
            async with server.running(setup):
                console.log(f"run {round_.number + 1}: {server.name} is up after {_since(began)}")
                await server.prepare(a for s in scenarios for a in s.adapters(round_))
                for scenario in scenarios:
                    await self._measure(server, scenario, round_)
        except Exception as exc:
            # The server did not start or did not live; the others can still be measured.
            for scenario in scenarios:
                if round_.number not in self.outcomes[scenario.name].values.get(server.name, {}):
                    self._failed(scenario, server.name, round_, exc)

    async def _measure(self, server: Server, scenario: Scenario, round_: Round) -> None:
        began = time.monotonic()
        origin = time.perf_counter()
        async with Client(server) as client:
            try:
                async with asyncio.timeout(scenario.longest):
                    values = await scenario.measure(server, client, round_)
                self.outcomes[scenario.name].add(server.name, round_.number, values)
                console.log(f"run {round_.number + 1}: {server.name}: {scenario.name}: {_since(began)}")
            except Exception as exc:
                self._failed(scenario, server.name, round_, exc)
            finally:
                # Also what there is of a measurement that is interrupted.
                self._keep(client, server, scenario, round_)
                self._write_raw(server, scenario, round_, client.records, origin)

    def _keep(self, client: Client, server: Server, scenario: Scenario, round_: Round) -> None:
        outcomes = self.outcomes[scenario.name]
        if client.samples:
            outcomes.samples.setdefault(server.name, {})[round_.number] = client.samples
        for record in client.failures():
            where = f"{server.name}, run {round_.number + 1}, {record.label}"
            outcomes.failed_requests.append(f"{where}: {record.error}")

    def _failed(self, scenario: Scenario | Simulation, server: str, round_: Round, exc: Exception) -> None:
        text = f"{server}, run {round_.number + 1}: {type(exc).__name__}: {exc}"
        self.outcomes[scenario.name].failures.append(text)
        console.log(f"[red]{scenario.name}: {text}[/red]", markup=True)

    def _write_raw(
        self, server: Server, scenario: Scenario, round_: Round, records: Sequence[Record], origin: float
    ) -> None:
        """Every request with the time of every chunk, a line each: for looking into what is surprising."""
        folder = self._out / "requests"
        folder.mkdir(exist_ok=True)
        name = f"{scenario.name}-{server.setup}-{server.name}-{round_.number + 1}.jsonl"
        lines = [json.dumps(record.as_json(origin)) for record in records]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def write(self, *, quick: bool) -> None:
        for scenario in self.scenarios:
            outcomes = self.outcomes[scenario.name]
            write_json(scenario, outcomes, self._out, quick=quick)
            write_plot(scenario, outcomes, self._out)
            write_samples(scenario, outcomes, self._out)
        write_table(self._rows(), self._out)

    def _rows(self) -> list[Row]:
        return [row for s in self.scenarios for row in summarize(s, self.outcomes[s.name])]

    def show(self, title: str) -> None:
        console.print(table(self._rows(), title))
        for name, outcomes in self.outcomes.items():
            for text in outcomes.failures:
                console.print(f"[red]not measured[/red]  {name}: {text}")
            if refused := outcomes.failed_requests:
                console.print(f"[red]{len(refused)} failed requests[/red]  {name}, the first: {refused[0]}")

    @property
    def complete(self) -> bool:
        return not any(outcomes.failures for outcomes in self.outcomes.values())


def _since(began: float) -> str:
    return f"{time.monotonic() - began:.0f} s"


async def bench(options: argparse.Namespace) -> int:
    """Runs and reports, also what there is by then when it is interrupted."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    runs = 1 if options.quick else options.runs
    rounds = [Round(number, options.quick, options.trace, options.minutes) for number in range(runs)]
    scenarios = [SCENARIOS[name] for name in options.scenarios or FULL_RUN]
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as work:
        servers: list[Server] = []
        if any(isinstance(scenario, Scenario) for scenario in scenarios):
            base = await asyncio.to_thread(prepare, cache_folder())
            await make(a for s in scenarios for r in rounds for a in s.adapters(r))
            servers = [server(base, Path(work)) for server in SERVERS.values()]
        running = Bench(scenarios, servers, options.out)
        began = time.monotonic()
        try:
            for server in servers:
                await server.install(a for s in scenarios for r in rounds for a in s.adapters(r))
            for round_ in rounds:
                await running.run(round_)
        finally:
            for server in servers:
                await server.aclose()
            running.write(quick=options.quick)
            quick = ", quick: the numbers mean nothing" if options.quick else ""
            running.show(f"{runs} run{'s' if runs > 1 else ''}{quick}, {_since(began)}")
            console.print(f"Details and plots: {options.out}")
    return 0 if running.complete else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "scenarios",
        nargs="*",
        metavar="SCENARIO",
        help=f"any of {', '.join(SCENARIOS)}; {len(FULL_RUN)} of them",
    )
    parser.add_argument("--runs", type=int, default=RUNS, help=f"repetitions, {RUNS} unless given")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "bench-results", help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="one short run, to see that everything works")
    parser.add_argument("--trace", type=Path, help="JSON lines for the scenario replay")
    parser.add_argument("--minutes", type=float, help="for residency (30), overload (5), limited (2)")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.scenarios if name not in SCENARIOS]:
        parser.error(f"no scenario {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    if options.runs < 1:
        parser.error("--runs starts at 1")
    try:
        return asyncio.run(bench(options))
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130


if __name__ == "__main__":
    sys.exit(main())
