"""Evidence grows where a hypothesis is false, and hardly ever where it is true, however often one looks."""

from __future__ import annotations

import json
import math
import random
from datetime import timedelta

import pytest

from server.rollouts.evidence import Bets, Rates
from server.rollouts.guards import REPLAYED, Evidence, Finding, Guards, Seen
from server.rollouts.plan import Rollout
from tests.bench.rollout_simulation import CASES, LIVE, START, roll_out


def ever(enough: float, draw: random.Random, mean: float, looks: int = 400) -> bool:
    """Whether bets on ±1 with this mean ever have so much."""
    bets = Bets()
    for _ in range(looks):
        bets.see(1.0 if draw.random() < (1 + mean) / 2 else -1.0, -1.0)
        if bets.log_e >= math.log(enough):
            return True
    return False


def test_bets_seldom_win_in_a_fair_game_and_soon_in_another() -> None:
    """Looked at after each of 400 comparisons: at most one game in ten reaches ten times its money."""
    draw = random.Random(1)
    assert sum(ever(10, draw, 0.0) for _ in range(200)) <= 20
    assert sum(ever(10, draw, 0.3) for _ in range(50)) == 50


@pytest.mark.parametrize(("new", "live", "most", "least"), [(0.02, 0.02, 10, 0), (0.1, 0.01, 100, 95)])
def test_rates_seldom_object_to_equal_failures(new: float, live: float, most: int, least: int) -> None:
    draw = random.Random(2)
    objected = 0
    for _ in range(100):
        rates = Rates()
        for _ in range(500):
            rates.see(draw.random() < new, [draw.random() < live for _ in range(5)])
            if rates.log_e >= math.log(10):
                objected += 1
                break
    assert least <= objected <= most


def test_the_expectation_of_a_rate_bet_is_at_most_one_wherever_the_new_version_is_no_worse() -> None:
    """Exactly, over all outcomes of one block, for every pair of rates on a grid."""
    grid = [0.0, 0.01, 0.1, 0.5, 0.9, 1.0]
    for live in grid:
        for new in (rate for rate in grid if rate <= live):
            expected = [0.0, 0.0, 0.0]
            for failed in (0, 1):
                for others in range(4):
                    chance = new if failed else 1 - new
                    chance *= math.comb(3, others) * live**others * (1 - live) ** (3 - others)
                    rates = Rates(failures=3, requests=50)
                    rates.see(bool(failed), [n < others for n in range(3)])
                    expected = [e + chance * math.exp(m) for e, m in zip(expected, rates.money, strict=True)]
            assert max(expected) <= 1 + 1e-9, (new, live, expected)


def test_evidence_is_the_same_after_it_was_stored() -> None:
    draw = random.Random(3)
    whole = Evidence(Guards())
    kept = Evidence(Guards())
    for _ in range(200):
        is_new, seen = draw.random() < 0.4, LIVE.request(draw)
        whole.see(seen, is_new=is_new)
        kept.see(seen, is_new=is_new)
        kept = Evidence.from_json(Guards(), json.loads(json.dumps(kept.as_json())))
    assert kept.as_json() == whole.as_json()
    assert kept.findings() == whole.findings()


def test_a_guard_of_a_later_release_begins_with_nothing() -> None:
    stored = Evidence(Guards(drift=0.1))
    stored.see_replay({"tokens": 1, "changed": 0, "drift": 0.0, "divergence": 0.0})
    later = Evidence.from_json(Guards(drift=0.1, changed=0.2), stored.as_json())
    found = {finding.test: finding for finding in later.findings()}
    assert (found["drift"].compared, found["changed"].compared) == (1, 0)


def test_what_a_version_never_has_is_not_asked_of_it() -> None:
    """Embeddings have no tokens: their lengths, and what is made of them, decide nothing."""
    evidence = Evidence(Guards())
    for number in range(500):
        evidence.see(Seen(), is_new=bool(number % 2))
    found = {finding.guard: finding for finding in evidence.findings()}
    assert {guard for guard, finding in found.items() if finding.applies} == {"errors", "refusals"}
    assert found["errors"].verdict == "safe"


def test_guards_that_are_off_are_not_there() -> None:
    evidence = Evidence(Guards(errors=None, length=None))
    assert {finding.guard for finding in evidence.findings()} == {
        "refusals", "first_token", "tokens_per_second", "finish"
    }  # fmt: skip


def by_guard(new: Seen, live: Seen, requests: int = 300) -> dict[str, Finding]:
    evidence = Evidence(Guards())
    for _ in range(requests):
        evidence.see(live, is_new=False)
        evidence.see(new, is_new=True)
    return {finding.test: finding for finding in evidence.findings()}


@pytest.mark.parametrize(
    ("test", "new"),
    [
        ("errors", Seen(failed=True)),
        ("refusals", Seen(refused=True)),
        ("first_token", Seen(first_token=0.2, token=0.01, length=50, cut=False)),
        ("tokens_per_second", Seen(first_token=0.1, token=0.02, length=50, cut=False)),
        ("longer", Seen(first_token=0.1, token=0.01, length=70, cut=False)),
        ("shorter", Seen(first_token=0.1, token=0.01, length=35, cut=False)),
        ("cut_more", Seen(first_token=0.1, token=0.01, length=50, cut=True)),
    ],
)
def test_each_guard_sees_what_it_is_for_and_no_other_does(test: str, new: Seen) -> None:
    live = Seen(first_token=0.1, token=0.01, length=50, cut=False)
    harmful = {name for name, finding in by_guard(new, live).items() if finding.verdict == "harm"}
    assert harmful == {test}


def test_answers_that_are_cut_less_often() -> None:
    found = by_guard(Seen(cut=False), Seen(cut=True))
    assert {name for name, finding in found.items() if finding.verdict == "harm"} == {"cut_less"}


@pytest.mark.parametrize("name", CASES)
def test_rollouts_end_as_they_should(name: str) -> None:
    """The benchmark in small, with shorter steps; one in twenty may be wrong, and of these none is."""
    quick = Rollout(version=2, live=1, since=START, hold=timedelta(seconds=60))
    outcomes = [roll_out(CASES[name], seed, quick) for seed in range(100, 106)]
    assert not any(outcome.wrong(CASES[name]) for outcome in outcomes)
    assert all(outcome.state for outcome in outcomes)


def test_replayed_prompts_decide_where_a_bound_is_set() -> None:
    same = {"drift": 0.0, "divergence": 0.0, "changed": 0, "tokens": 9}
    other = {"drift": 0.9, "divergence": 0.4, "changed": 1, "tokens": 9}
    bounded = Guards(drift=0.5, divergence=0.5, changed=0.3)
    for found, verdicts in (
        (same, {"drift": "safe", "divergence": "safe", "changed": "safe"}),
        (other, {"drift": "harm", "divergence": "safe", "changed": "harm"}),
    ):
        evidence, free = Evidence(bounded), Evidence(Guards())
        assert {f.verdict for f in evidence.findings() if f.guard in REPLAYED} == {"open"}
        for _ in range(30):
            evidence.see_replay(found)
            free.see_replay(found)
        evidence.see_replay({"failed": "too_long", "tokens": 0})
        evidence = Evidence.from_json(bounded, json.loads(json.dumps(evidence.as_json())))
        assert {f.test: f.verdict for f in evidence.findings() if f.guard in REPLAYED} == verdicts
        assert evidence.numbers()["replays"] == {
            "prompts": 30, "failed": 1, "tokens": 270, "changed": found["changed"], "drift": found["drift"],
            "divergence": found["divergence"], "largest_drift": found["drift"],
        }  # fmt: skip
        assert not [f for f in free.findings() if f.guard in REPLAYED], "without a bound it is only shown"
    assert Evidence(Guards()).numbers()["replays"] is None


def test_a_version_at_its_bound_is_rarely_sent_back() -> None:
    """Looked at after every prompt: the stated rate holds, a ninth of it for each of nine tests."""
    wrong = 0
    for seed in range(300):
        draw, evidence = random.Random(seed), Evidence(Guards(changed=0.3))
        for _ in range(200):
            changed = int(draw.random() < 0.3)
            evidence.see_replay({"drift": 0.0, "divergence": 0.0, "changed": changed, "tokens": 1})
            finding = next(f for f in evidence.findings() if f.test == "changed")
            if finding.verdict == "harm":
                wrong += 1
                break
    assert wrong <= 300 * 0.05 / 9 + 4, wrong
