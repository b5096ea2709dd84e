"""What the benchmarks compute, and that a missed target is said to be missed; no engine."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import statistics
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from adapters.inspection.inspect import inspect
from adapters.model import WEIGHTS_FILE, BaseModel, ModuleShape
from tests.bench.__main__ import Bench, main
from tests.bench.adapters import Adapter, mixed, write
from tests.bench.client import Client, Record
from tests.bench.plot import write_plot, write_samples
from tests.bench.report import Outcomes, number, summarize, table, write_json, write_table
from tests.bench.scenario import Goal, Measure, Round, Scenario, Simulation, Values
from tests.bench.scenarios import FULL_RUN, SCENARIOS, hog
from tests.bench.scenarios.residency import _trend
from tests.bench.scenarios.storm import parts
from tests.bench.servers import Loraplex, Server
from tests.bench.stats import (
    bootstrap,
    gaps,
    jain,
    median,
    percentile,
    ratio,
    slope,
    tokens_between,
    waiting_between,
    weight_error,
)
from tests.pure.project.simulated import number_of

# Arithmetic


def record(*chunks: float, arrival: float = 0.0, tokens: int | None = None, **fields: object) -> Record:
    return Record("a", "", arrival, 8, chunks=list(chunks), output_tokens=tokens, **fields)  # type: ignore[arg-type]


def test_percentile_is_the_nearest_rank() -> None:
    values = [float(i) for i in range(100, 0, -1)]
    assert percentile(values, 99) == 99
    assert percentile(values, 100) == 100
    assert percentile(values, 0) == 1
    assert percentile([3.0], 99) == 3
    assert percentile([1.0, math.inf], 50) == 1
    assert percentile([1.0, math.inf], 99) == math.inf
    assert math.isnan(percentile([], 99))


def test_median_of_what_never_came() -> None:
    assert median([3.0, 1.0, 2.0]) == 2
    assert median([1.0, 2.0]) == 1.5
    assert median([math.inf, math.inf]) == math.inf
    assert median([1.0, math.inf, math.inf]) == math.inf
    assert math.isnan(median([]))


def test_a_bootstrap_interval_is_the_normal_one_where_values_are_normal() -> None:
    draw = random.Random(3)
    values = [draw.gauss(5.0, 2.0) for _ in range(400)]
    low, high = bootstrap(values, 1000)
    assert low < sum(values) / 400 < high
    assert high - low == pytest.approx(2 * 1.96 * 2.0 / 20, rel=0.2)
    assert bootstrap([3.0, 3.0]) == (3.0, 3.0)


def test_jain() -> None:
    assert jain([5.0] * 10) == pytest.approx(1)
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([4.0, 2.0, 1.0]) == pytest.approx(49 / 63)
    assert math.isnan(jain([0.0, 0.0]))


def test_ratio() -> None:
    assert ratio(3, 2) == 1.5
    assert ratio(3, math.inf) == 0
    assert ratio(math.inf, 3) == math.inf
    assert math.isnan(ratio(math.inf, math.inf))
    assert math.isnan(ratio(1, 0))


def test_weight_error_is_relative_to_each_share() -> None:
    assert weight_error([40, 20, 10], [4, 2, 1]) == pytest.approx(0)
    assert weight_error([40, 20, 5], [4, 2, 1]) == pytest.approx(1 - (5 / 65) / (1 / 7))
    assert math.isnan(weight_error([0, 0], [1, 1]))


def test_gaps_belong_to_the_window_they_end_in() -> None:
    times = [0.0, 1.0, 3.0, 3.5]
    assert gaps(times) == [1.0, 2.0, 0.5]
    assert gaps(times, 2.0, 3.2) == [2.0]
    assert gaps(times, 4.0) == []
    assert gaps([1.0]) == []


@pytest.mark.parametrize(
    ("chunks", "storm", "again"),
    [
        ([1, 2, 3, 4, 5, 6], [1, 1, 1], [1, 1, 1]),
        ([1, 2, 3, 5.5, 6], [1, 1, 2.5], [0.5, 1]),
        ([1, 2, 3], [1, 1, 4], []),
    ],
    ids=["even", "stands still as the storm ends", "and never goes on"],
)
def test_a_gap_belongs_to_the_storm_it_began_in(
    chunks: list[float], storm: list[float], again: list[float]
) -> None:
    assert parts(chunks, 2, 4, 7) == (storm, again)


def test_a_chunk_of_several_tokens_counts_for_its_share() -> None:
    one_each, merged = record(1.0, 2.0, 3.0), record(1.0, 2.0, tokens=6)
    assert tokens_between([one_each], 1.5, 3.0) == 2
    assert tokens_between([one_each, merged], 1.5, 3.0) == 2 + 3


def test_who_waits_through_a_window_is_in_it() -> None:
    starved, answered, early, late = (
        record(9.0),
        record(2.5, arrival=2.2),
        record(0.5),
        record(5.0, arrival=4.0),
    )
    never = record(arrival=1.0)
    waiting = waiting_between([starved, answered, early, late, never], 2.0, 3.0)
    assert waiting == [starved, answered, never]


def test_times_of_a_record() -> None:
    assert record(1.5, arrival=1.0).to_first_token == 0.5
    assert record().to_first_token == math.inf
    assert record(1.5, arrival=1.0, end=3.0).duration == 2.0
    assert record(1.5, arrival=1.0, end=3.0, error="broke off").duration == math.inf
    assert record(1.5, arrival=1.0).duration == math.inf
    assert record(1.5, arrival=1.0, end=3.0).as_json(1.0)["chunks"] == [0.5]


# Declarations and the report


async def _not_measured(server: Server, client: Client, round_: Round) -> Values:
    raise AssertionError


def scenario(*measures: Measure) -> Scenario:
    return Scenario("storm", measures, lambda _: (), _not_measured)


def outcomes(ours: list[float], theirs: list[float]) -> Outcomes:
    made = Outcomes()
    for server, values in (("loraplex", ours), ("vllm", theirs)):
        for run, value in enumerate(values):
            made.add(server, run, {"x": value})
    return made


@pytest.mark.parametrize(
    ("goal", "ours", "theirs", "verdict"),
    [
        (Goal("ratio", "≥", 1.3), [14.0, 13.0, 12.0], [10.0, 10.0, 10.0], "met"),
        (Goal("ratio", "≥", 1.3), [12.9, 12.9, 20.0], [10.0, 10.0, 10.0], "missed"),
        (Goal("ratio", "≤", 0.7), [5.0, 5.0], [math.inf, math.inf], "met"),
        (Goal("ratio", "≤", 0.7), [math.inf], [math.inf], "missed"),
        (Goal("ratio", "≤", 0.7), [5.0], [], "missed"),
        (Goal("value", "≤", 2), [1.0, 2.0, 9.0], [], "met"),
        (Goal("value", "≤", 2), [1.0, 2.1, 9.0], [1.0], "missed"),
        (Goal("value", "≤", 2), [math.nan], [], "missed"),
        (Goal("value", "≥", 0.95), [], [], "missed"),
        (None, [1.0], [1.0], ""),
    ],
)
def test_verdicts(goal: Goal | None, ours: list[float], theirs: list[float], verdict: str) -> None:
    (row,) = summarize(scenario(Measure("x", "gap", "ms", goal)), outcomes(ours, theirs))
    assert row.verdict == verdict


def test_ratios_are_taken_run_by_run() -> None:
    (row,) = summarize(scenario(Measure("x", "gap")), outcomes([1.0, 4.0, 6.0], [1.0, 2.0, 4.0]))
    assert (row.ours, row.theirs) == (4.0, 2.0)
    assert (row.low, row.ratio, row.high) == (1.0, 1.5, 2.0)


def test_a_missed_target_is_in_the_table_and_in_the_file(tmp_path: Path) -> None:
    missed = scenario(Measure("x", "p99 gap", "ms", Goal("ratio", "≤", 0.7)))
    made = outcomes([9.0], [10.0])
    console = Console(record=True, width=140)
    console.print(table(summarize(missed, made), "1 run"))
    line = next(line for line in console.export_text().splitlines() if "p99 gap" in line)
    for part in ("storm", "9.00 ms", "10.0 ms", "0.90 (0.90–0.90)", "ratio ≤ 0.7", "missed"):
        assert part in line
    write_json(missed, made, tmp_path, quick=False)
    write_table(summarize(missed, made), tmp_path)
    *_, last = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert last == "| storm | p99 gap | 9.00 ms | 10.0 ms | 0.90 (0.90–0.90) | ratio ≤ 0.7 | missed |"
    document = json.loads((tmp_path / "storm.json").read_text(encoding="utf-8"))
    assert document["measures"][0]["verdict"] == "missed"
    assert document["runs"] == {"loraplex": {"0": {"x": 9.0}}, "vllm": {"0": {"x": 10.0}}}


def test_what_never_came_has_a_place_in_json_and_in_the_plot(tmp_path: Path) -> None:
    one = scenario(Measure("x", "cold", "s", Goal("value", "≤", 1)), Measure("y", "not measured"))
    made = outcomes([2.0, math.nan], [math.inf])
    write_json(one, made, tmp_path, quick=True)
    text = (tmp_path / "storm.json").read_text(encoding="utf-8")
    assert json.loads(text)["runs"] == {
        "loraplex": {"0": {"x": 2.0}, "1": {"x": None}},
        "vllm": {"0": {"x": "never"}},
    }
    write_plot(one, made, tmp_path)
    assert (tmp_path / "storm.png").read_bytes().startswith(b"\x89PNG")


def test_values_of_several_setups_come_together() -> None:
    made = Outcomes()
    made.add("vllm", 0, {"a": 1.0})
    made.add("vllm", 0, {"b": 2.0})
    assert made.of("vllm", "a") == {0: 1.0}
    assert made.of("vllm", "b") == {0: 2.0}
    assert made.of("loraplex", "a") == {}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1234.5, "1234 ms"),
        (98.76, "98.8 ms"),
        (0.01234, "0.0123 ms"),
        (0.0, "0 ms"),
        (math.inf, "never"),
        (math.nan, "–"),
    ],
)
def test_numbers(value: float, shown: str) -> None:
    assert number(value, "ms") == shown


def test_mixed_adapters_are_distinct_and_of_all_ranks() -> None:
    adapters = mixed(32)
    assert len({a.name for a in adapters}) == 32
    assert Counter(a.rank for a in adapters) == {8: 8, 16: 8, 32: 8, 64: 8}


def test_cold_adapters_belong_to_one_scenario_and_customers_to_one_weight() -> None:
    """Two scenarios of one process that share an adapter would make the second one's warm."""
    used = [(name, a) for name in FULL_RUN for a in set(SCENARIOS[name].adapters(Round()))]
    shared = {a.name for n, a in used if sum(a.name == b.name for _, b in used) > 1}
    assert not shared
    assert all(a.rank <= 64 for _, a in used)


@pytest.mark.parametrize("name", SCENARIOS)
def test_declarations(name: str) -> None:
    declared = SCENARIOS[name]
    keys = [measure.key for measure in declared.measures]
    assert len(set(keys)) == len(keys)
    assert all(len(measure.title) <= 60 for measure in declared.measures)
    if declared.servers == (Loraplex.name,):
        assert all(m.goal is None or m.goal.of == "value" for m in declared.measures)


def test_an_unknown_scenario_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["storm", "typhoon"])
    assert refused.value.code == 2
    assert "no scenario typhoon" in capsys.readouterr().err


def test_adapters_are_what_an_upload_must_be(tmp_path: Path) -> None:
    shapes = {f"model.layers.0.mlp.{name}": (12, 8) for name in ("up_proj", "gate_proj")}
    for seed in (0, 1):
        write(tmp_path / str(seed), 4, seed, shapes)
    base = BaseModel("base", {name: ModuleShape(inputs, out) for name, (out, inputs) in shapes.items()}, 8)
    manifest = inspect(tmp_path / "0", base)
    assert (manifest.rank, len(manifest.modules), manifest.warnings) == (4, 2, ())
    first, second = ((tmp_path / str(seed) / WEIGHTS_FILE).read_bytes() for seed in (0, 1))
    assert first != second


def test_a_scenario_is_measured_as_often_as_it_says(tmp_path: Path) -> None:
    """A simulation needs no server, and its values come from a process of its own."""
    simulation = Simulation(
        "storm", (Measure("x", "number of the run", goal=Goal("value", "≤", 0)),), number_of, runs=1
    )
    running = Bench([simulation], [], tmp_path)

    async def all_runs() -> None:
        for number_ in range(2):
            await running.run(Round(number_))

    asyncio.run(all_runs())
    assert running.outcomes["storm"].values == {"loraplex": {0: {"x": 0.0}}}
    assert running.complete
    assert (tmp_path / "storm.png").is_file()
    assert json.loads((tmp_path / "storm.json").read_text())["measures"][0]["verdict"] == "met"


def test_a_slope_has_an_interval_that_holds_it() -> None:
    rng = random.Random(6)
    hours = [i / 360 for i in range(180)]
    held = 0
    for _ in range(200):
        per_hour, error = slope(hours, [500 + 12 * h + rng.gauss(0, 3) for h in hours])
        held += abs(per_hour - 12) <= error
    assert 180 <= held <= 199
    assert slope(hours, [7.0] * 180) == (0, 0)
    assert slope(hours, [3 * h for h in hours]) == (pytest.approx(3), pytest.approx(0, abs=1e-9))
    assert all(math.isnan(x) for x in slope([0, 1], [0, 1]))


def test_steps_that_stay_widen_the_interval() -> None:
    """A level that wanders by itself looks like growth to who takes its values for independent."""
    rng = random.Random(7)
    hours = [i / 360 for i in range(180)]
    apart = [rng.gauss(0, 1) for _ in hours]
    wandering = list(itertools.accumulate(apart, lambda level, step: 0.9 * level + step))
    scale = statistics.stdev(wandering) / statistics.stdev(apart)
    assert slope(hours, wandering)[1] > 3 * scale * slope(hours, apart)[1]


@pytest.mark.parametrize(
    ("per_hour", "verdict"), [(0.0, "met"), (-40.0, "met"), (4.0, "met"), (40.0, "missed")]
)
def test_growth_is_what_is_more_than_chance_and_one_percent(per_hour: float, verdict: str) -> None:
    rng = random.Random(8)
    hours = [i / 360 for i in range(120)]
    trend = _trend(hours, [1000 + per_hour * h + rng.gauss(0, 0.5) for h in hours])
    goal = next(m.goal for m in SCENARIOS["residency"].measures if m.key == "api_memory_growth")
    assert goal is not None
    assert ("met" if goal.met(trend["growth"]) else "missed") == verdict


def test_samples_are_drawn_and_written(tmp_path: Path) -> None:
    one, made = scenario(Measure("x", "level")), outcomes([1.0], [])
    write_samples(one, made, tmp_path)
    assert not (tmp_path / "storm-samples.png").exists()
    rows = [{"seconds": 0.0, "a": 1.0, "b": 2.0}, {"seconds": 60.0, "a": 3.0, "b": 4.0}]
    made.samples = {"loraplex": {0: rows}}
    write_samples(one, made, tmp_path)
    write_json(one, made, tmp_path, quick=False)
    assert (tmp_path / "storm-samples.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((tmp_path / "storm.json").read_text(encoding="utf-8"))
    assert document["samples"]["loraplex"]["0"] == rows


def test_a_process_is_measured_to_less_than_a_tick(tmp_path: Path) -> None:
    server = Loraplex(tmp_path, tmp_path)
    server._process = psutil.Process()
    clock, said = time.process_time, server.api_cpu_seconds
    for _ in range(5):
        readings = [clock(), said(), clock()]
        sum(range(100_000))  # some milliseconds: a tick has ten, and would show none of them, or too many
        readings += [clock(), said(), clock()]
        outer, took, inner = (readings[5 - at] - readings[at] for at in range(3))
        assert inner - 0.0005 < took < outer + 0.0005
    footprint = server.footprint()
    assert footprint["api_threads"] >= 1
    assert footprint["api_rss"] >= footprint["api_memory"] > 10
    assert footprint["engine_files"] == sum(p.num_fds() for p in psutil.Process().children(recursive=True))


class Hogged:
    """A server and its client: four answers at once, and a fifth after ``fifth_after`` seconds."""

    def __init__(self, fifth_after: float, changed: bool) -> None:
        self.records: list[Record] = []
        self._fifth_after, self._changed = fifth_after, changed

    def labelled(self, *labels: str) -> list[Record]:
        return [r for r in self.records if r.label in labels]

    async def load(self, adapter: Adapter) -> None:
        """It is where it is needed."""

    async def ask(
        self, adapter: Adapter, words: str, tokens: int, *, label: str, arrival: float | None = None
    ) -> Record:
        made = Record(adapter.name, label, time.perf_counter() if arrival is None else arrival, tokens)
        self.records.append(made)
        await asyncio.sleep(self._fifth_after if label == "fifth" else 0)
        made.chunks += [time.perf_counter(), time.perf_counter()]
        made.text = words + ("!" if self._changed and label == "four" and adapter == hog.FOUR[0] else "")
        await asyncio.sleep(0.05)
        made.chunks.append(time.perf_counter())
        made.end = time.perf_counter()
        return made


@pytest.mark.parametrize(("changed", "unchanged"), [(False, 4), (True, 3)])
async def test_the_answers_beside_a_fifth_are_compared_with_those_without(
    monkeypatch: pytest.MonkeyPatch, changed: bool, unchanged: int
) -> None:
    monkeypatch.setattr(hog, "BETWEEN", 0.01)
    monkeypatch.setattr(hog, "WATCHED", 120)
    both = Hogged(0.01, changed)
    values = await hog.measure(both, both, Round())  # type: ignore[arg-type]
    assert values["unchanged"] == unchanged
    assert 0.01 <= values["first_token"] < math.inf
    assert values["longest_gap"] >= 0.05


async def test_a_fifth_that_never_comes_leaves_nothing_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hog, "BETWEEN", 0.01)
    monkeypatch.setattr(hog, "WATCHED", 0.05)
    both = Hogged(60, changed=False)
    values = await hog.measure(both, both, Round())  # type: ignore[arg-type]
    assert values["first_token"] == math.inf
    assert math.isnan(values["unchanged"])
    assert not both.labelled("alone")
