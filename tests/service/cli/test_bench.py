"""``loraplex bench`` against a served app: what it counts is what the server counted."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest

from server.cli.bench import Workload
from server.cli.bench_load import Asked, Load, Shot
from server.cli.bench_report import as_json, page, percentile, rows
from server.cli.bench_run import _take
from server.cli.bench_workloads import ROUNDS, WORKLOADS, Bench, storm
from server.cli.chat import Side
from tests.service.cli.test_commands import run
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")
LOAD = Load(rate=50, seconds=20, burst=1, skew=1, prompt_words=5, max_tokens=4, seed=1)


async def test_two_customers_and_their_models(tmp_path: Path) -> None:
    async with fake_site(tmp_path / "data", FakeEngine(tiny.base(), times=Times(step=0.002))) as site:
        keys = [
            await site.tenant("acme", {"a": tiny.adapter(1)}),
            await site.tenant("zeta", {"z": tiny.adapter(2)}, base_allowed=False, limits={"max_tokens": 2}),
        ]
        (tmp_path / "keys").write_text("\n".join(keys))
        words = ("bench", site.url, "--keys", str(tmp_path / "keys"), "--rate", "20", "--seconds", "1")
        more = ("--max-tokens", "4", "--skew", "0", "--plot", str(tmp_path / "page.html"), "--json")
        done = await run(site, *words, *more)
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        whole, *each = found["rows"]
        assert whole["requests"] == len(found["requests"]) > 5
        assert {row["model"] for row in each} <= {"a", "z", tiny.NAME}
        counted = Counter(
            row["outcome"] for row in (await site.admin.get("/admin/v1/requests")).json()["data"]
        )
        assert counted["completed"] >= whole["good"] > 0
        (refused,) = (row for row in each if row["model"] == "z")
        assert refused["good"] == 0
        assert refused["first_p50"] is None
        assert "max_tokens" in refused["errors"] or "invalid" in refused["errors"]
        assert "<svg" in (tmp_path / "page.html").read_text()

        one = await run(site, "bench", site.url, "--model", "a@1", "--key", keys[0], "--seconds", "0.5")
        assert one.exit_code == 0
        assert "a@1" in one.stdout
        none = await run(site, "bench", site.url, "--model", "b", "--key", keys[0])
        assert (none.exit_code, "no_models" in none.stderr) == (1, True)
        misspelt = await run(site, "bench", site.url, "--model", "a", "--model", "suport", "--key", keys[0])
        assert (misspelt.exit_code, "may ask for suport" in misspelt.stderr) == (1, True)
        bare = await run(site, "bench", site.url, "--model", "default", "--key", keys[0], "--seconds", "0.5")
        assert (bare.exit_code, "default" in bare.stdout) == (0, True), bare.output
        absent = await run(site, "bench", site.url, "--keys", str(tmp_path / "absent"))
        assert (absent.exit_code, "does not exist" in absent.stderr) == (2, True)
        wrong = await run(site, "bench", site.url, "--key", "lp-wrong")
        assert (wrong.exit_code, "invalid_api_key" in wrong.stderr) == (1, True)
        assert "no_key" in (await run(site, "bench", site.url)).stderr


def test_a_thought_is_a_first_token() -> None:
    shot, side = Shot("a", began=1.0), Side("a")
    chunks: list[dict[str, Any]] = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"reasoning": "Hm."}}]},
        {"choices": [{"delta": {"content": "Yes."}}]},
    ]
    for at, chunk in enumerate(chunks, 2):
        _take(shot, chunk, float(at))
    assert shot.chunks == [3.0, 4.0]
    assert list(side._pieces(iter(chunks))) == ["", "Yes."]


def test_arrivals_are_as_many_and_as_uneven_as_asked() -> None:
    at = list(LOAD.arrivals(random.Random(1)))
    assert 850 < len(at) < 1150
    assert at == sorted(at)
    assert at == list(LOAD.arrivals(random.Random(1)))
    even = list(Load(2, 10, 0, 1, 5, 4, 1).arrivals(random.Random(1)))
    assert even == [i / 2 for i in range(20)]


def test_the_first_model_is_asked_most() -> None:
    choices = [Asked(name, "k") for name in "abc"]
    picks = LOAD.picks(choices, random.Random(1))
    counts = Counter(next(picks).model for _ in range(3000))
    assert counts["a"] > 1.7 * counts["b"] > 1.7 * counts["c"] * 0.9


def test_numbers_of_a_row() -> None:
    good = Shot("a", began=1.0, ended=3.0, chunks=[1.5, 2.0, 2.75], tokens=3)
    bad = Shot("a", began=2.0, ended=2.5, error="queue_full")
    (row,) = rows([good, bad])
    assert (row["requests"], row["good"], row["errors"]) == (2, 1, "1 queue_full")
    assert (row["first_p50"], row["gap_p50"], row["gap_p99"], row["total_p99"]) == (0.5, 0.5, 0.75, 2.0)
    assert row["tokens_per_second"] == 1.5
    assert as_json(bad)["first"] is None
    assert percentile([], 0.5) is None
    assert percentile([float("inf")], 0.5) is None
    assert "&lt;b&gt;" in page("<b>", [row], [good, bad])


PHASES = {
    "overhead": ["1 clients", "16 clients"],
    "cold": ["first time", "again"],
    "storm": ["quiet", "in the storm", "others"],
    "churn": ["uniform", "zipf"],
    "noisy": ["alone", "beside the noisy one", "the noisy one"],
    "limited": ["alone", "beside the limited one", "the limited one"],
    "starvation": ["busy models", "the last model"],
    "hog": ["the last model", "long answers"],
    "weights": ["1 a", "2 b", "3 c"],
    "overload": ["as many as it can", "one more", "three times as many"],
}


async def test_a_storm_of_many_models_comes_while_the_busy_client_asks() -> None:
    lasted = []

    class Noted(Bench):
        async def closed(self, phase: str, clients: Sequence[Iterator[Asked]]) -> None:
            pass

        async def each(self, phase: str, models: Sequence[Asked], apart: float | None = None) -> None:
            assert apart is not None
            lasted.append(len(models) * apart)

    async def ask(asked: Asked, max_tokens: int) -> Shot:
        raise AssertionError("nobody is asked")

    for models in (3, 100):
        choices = [Asked(str(at), "k") for at in range(models)]
        await storm(Noted(ask, choices, LOAD, random.Random(1), {}))
    assert lasted == pytest.approx([1.0, LOAD.seconds])


async def test_workloads_by_name(tmp_path: Path) -> None:
    assert list(PHASES) == list(WORKLOADS) == list(get_args(Workload))
    async with fake_site(tmp_path / "data", FakeEngine(tiny.base(), times=Times(step=0.002))) as site:
        key = await site.tenant("acme", {name: tiny.adapter(at) for at, name in enumerate("abc", 1)})
        words = (
            "bench",
            site.url,
            "--key",
            key,
            "--seconds",
            "0.3",
            "--max-tokens",
            "4",
            "--prompt-words",
            "3",
        )
        models = [word for name in "abc" for word in ("--model", name)]
        found = {}
        for name in PHASES:
            done = await run(site, *words, *models, "--workload", name, "--json")
            assert done.exit_code == 0, done.output
            found[name] = json.loads(done.stdout)
            rows = {row["phase"]: row for row in found[name]["rows"]}
            assert sorted(rows) == sorted(PHASES[name])
            assert all(row["good"] > 0 for row in rows.values()), rows
            if name != "overload":  # which may be refused
                assert all(row["good"] == row["requests"] for row in rows.values()), rows
            assert sum(row["requests"] for row in rows.values()) == len(found[name]["requests"])
        assert {one["model"] for one in found["overhead"]["requests"]} == {"a"}
        assert [one["model"] for one in found["cold"]["requests"]] == [*"abcabc"]
        others = next(row for row in found["storm"]["rows"] if row["phase"] == "others")
        assert others["requests"] == 2
        phases = {row["phase"]: row for name in PHASES for row in found[name]["rows"]}
        assert phases["the last model"]["requests"] == phases["one more"]["requests"] == 1
        last = next(row for row in found["starvation"]["rows"] if row["phase"] == "the last model")
        assert last["requests"] == ROUNDS
        assert [one["output_tokens"] for one in found["hog"]["requests"]] == [64, 64, 4]
        most = phases["as many as it can"]["good"]
        assert phases["three times as many"]["requests"] > 1.5 * most
        counted = Counter(
            row["outcome"] for row in (await site.admin.get("/admin/v1/requests")).json()["data"]
        )
        assert set(counted) <= {"completed", "refused", "unavailable"}
        for option in ("--rate", "--burst"):
            dropped = await run(site, *words, *models, "--workload", "overhead", option, "2")
            assert (dropped.exit_code, f"leave out {option}" in dropped.stderr) == (1, True)
        few = await run(site, *words, "--model", "a", "--workload", "storm")
        assert (few.exit_code, "too_few_models" in few.stderr) == (1, True)
