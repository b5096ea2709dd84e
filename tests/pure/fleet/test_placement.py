"""Where requests go: one example for each rule of the placement."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from server.fleet.placement import Move, Placement, Rules
from server.fleet.rendezvous import hashed, score
from server.fleet.reports import Report

REPORT = Report("r0", 1, base="base", kind="kind", state="ready", gpu_slots=8, max_running=64)
MANY = [f"tenant/adapter-{number}@digest" for number in range(2_000)]
V = MANY[0]


class Fleet:
    """Replicas that report what a test says of them, to one placement."""

    def __init__(self, *names: str, rules: Rules | None = None, **fields: Any) -> None:
        self.placement = Placement(rules)
        self.reports: dict[str, Report] = {}
        self.now = 0.0
        for name in names:
            self.says(name, **fields)

    def says(self, replica: str, **fields: Any) -> None:
        report = self.reports.get(replica, replace(REPORT, replica=replica, number=0))
        report = self.reports[replica] = replace(report, number=report.number + 1, **fields)
        self.placement.beat(self.now, report)

    def order(self, version: str | None = V, **fields: Any) -> list[str]:
        return self.placement.candidates(version, self.now, **fields)

    def homes(self) -> dict[str, str]:
        return {version: self.order(version)[0] for version in MANY}


def test_nobody_knows_of_a_replica() -> None:
    fleet = Fleet()
    assert (fleet.order(), fleet.order(None), fleet.placement.moves(0.0)) == ([], [], [])


def test_every_replica_is_a_candidate_once() -> None:
    fleet = Fleet("a", "b", "c")
    assert sorted(fleet.order()) == sorted(fleet.order(None)) == ["a", "b", "c"]


def test_nearer_comes_first() -> None:
    fleet = Fleet("a", "b", "c", "d")
    *_, third, second, first = fleet.order()  # against the hash's order
    fleet.says(first, in_slots=[V], in_host=[V])
    fleet.says(second, in_host=[V])
    fleet.placement.sent(0.0, V, third)
    assert fleet.order()[:3] == [first, second, third]


def test_homes_are_spread_and_agreed_upon() -> None:
    names = [f"r{number}" for number in range(8)]
    homes = Fleet(*names).homes()
    assert homes == Fleet(*reversed(names)).homes()
    spread = Counter(homes.values())
    assert set(spread) == set(names)
    assert max(spread.values()) < 1.25 * len(MANY) / 8


def test_a_replica_that_goes_moves_its_share_and_no_other() -> None:
    fleet = Fleet(*"abcde")
    before = fleet.homes()
    fleet.placement.forget("c")
    after = fleet.homes()
    assert {version for version in MANY if before[version] != after[version]} == {
        version for version in MANY if before[version] == "c"
    }
    assert set(after.values()) == set("abde")


def test_homes_follow_the_size_of_a_replica() -> None:
    fleet = Fleet("a", "b")
    fleet.says("b", max_running=3 * REPORT.max_running)
    assert 0.7 < Counter(fleet.homes().values())["b"] / len(MANY) < 0.8


def test_sent_lately_counts_until_it_should_have_been_reported() -> None:
    fleet = Fleet("a", "b", "c")
    last = fleet.order()[-1]
    fleet.placement.sent(0.0, V, last)
    fleet.placement.ended(V, last)
    assert fleet.order()[0] == last
    for name in "abc":
        fleet.says(name)
    fleet.now = 5.0
    assert fleet.order()[0] == last
    fleet.now = 6.5
    for name in "abc":
        fleet.says(name)
    assert fleet.order()[-1] == last


def test_what_is_under_way_keeps_its_home() -> None:
    fleet = Fleet("a", "b", "c")
    last = fleet.order()[-1]
    fleet.placement.sent(0.0, V, last)
    fleet.now = 60.0
    for name in "abc":
        fleet.says(name, running=0)
    assert fleet.order()[0] == last


def test_a_hot_version_gets_a_second_home_and_gives_it_up() -> None:
    fleet = Fleet("a", "b", "c", "d")
    first, second = fleet.order()[:2]
    fleet.says(first, in_slots=[V])
    for _ in range(9):  # as many as a replica takes in any case, and what may be chance
        assert fleet.order()[0] == first
        assert fleet.placement.moves(0.0) == []
        fleet.placement.sent(0.0, V, first)
    assert fleet.order()[0] == first, "it can run one more at once, and nobody waits for a load"
    assert fleet.placement.moves(0.0) == [Move(V, second)]
    assert fleet.placement.moves(0.0) == [], "it is coming"
    assert fleet.order()[0] == first
    fleet.placement.loaded(0.1, V, second)
    assert fleet.placement.homes(V, 0.1) == sorted((first, second))
    assert fleet.order()[0] == second
    for _ in range(6):
        fleet.placement.ended(V, first)
    assert fleet.order()[:2] == [first, second], "it has cooled down"


def test_a_very_hot_version_gets_as_many_homes_as_it_needs() -> None:
    fleet = Fleet(*[f"r{number}" for number in range(8)])
    first = fleet.order()[0]
    fleet.says(first, in_slots=[V])
    homes = {first}
    for _ in range(8):
        fleet.placement.sent(0.0, V, first)
    for wanted in (2, 4, 7):
        for name in homes:
            fleet.placement.sent(0.0, V, name)
            fleet.says(name, in_slots=[V], running=64)
        homes |= {move.replica for move in fleet.placement.moves(0.0)}
        assert len(homes) == wanted, "twice as many with each look, to 1.25 times the share of each"


def test_a_replica_that_is_full_gives_away_what_waits() -> None:
    fleet = Fleet("a", "b", "c", "d")
    first, second = fleet.order()[:2]
    fleet.says(first, in_slots=[V])
    for _ in range(64):
        assert fleet.order()[0] == first
        fleet.placement.sent(0.0, V, first)
    assert fleet.order()[0] == second


def test_where_nothing_is_left_to_spend_a_version_stays_at_home() -> None:
    fleet = Fleet("a", "b", rules=Rules(hot=0.0))
    versions = [version for version in MANY if fleet.order(version)[0] == "a"][:4]
    fleet.says("a", in_slots=versions, queued=40, running=64)
    spent = 0
    for version in versions:
        if fleet.order(version)[0] == "b":
            fleet.placement.sent(0.0, version, "b")
            spent += 1
    assert spent == 2, "as many as there are replicas"
    assert fleet.order(versions[-1])[0] == "a"
    assert fleet.placement.moves(0.0) == []
    fleet.now = 35.0
    for name in "ab":
        fleet.says(name)
    assert fleet.order(versions[-1])[0] == "b", "half of it is back"


def test_a_new_version_goes_where_there_is_room() -> None:
    fleet = Fleet("a", "b", room=4)
    held: dict[str, list[str]] = {"a": [], "b": []}
    for version in MANY[:8]:
        home = fleet.order(version)[0]
        fleet.placement.sent(0.0, version, home)
        held[home].append(version)
    assert sorted(map(len, held.values())) == [4, 4]
    fleet.says("a", in_host=held["a"])
    fleet.says("b", in_host=held["b"][:2])
    later = 20.0
    fleet.now = later
    fleet.says("a", in_host=held["a"])
    fleet.says("b", in_host=held["b"][:2])
    for version in held["b"]:
        fleet.placement.ended(version, "b")
    assert {fleet.order(version)[0] for version in MANY[8:40]} == {"b"}


def test_the_homes_of_a_version_share_what_is_beyond_their_mean() -> None:
    fleet = Fleet("a", "b", "c", "d", running=20)
    first, second = fleet.order()[:2]
    for name in (first, second):
        fleet.says(name, in_slots=[V])
    assert fleet.order()[0] == first
    fleet.says(first, running=22)
    assert fleet.order()[0] == second, "the first has more than the mean"
    fleet.says(second, running=24)
    assert fleet.order()[0] == first, "both have, and the second more of it"


def test_a_version_that_is_not_hot_is_left_where_it_is() -> None:
    fleet = Fleet("a", "b", "c", "d", running=24)
    first = fleet.order()[0]
    fleet.placement.sent(0.0, V, first)
    fleet.says(first, in_slots=[V], running=40)
    assert fleet.order()[0] == first
    assert fleet.placement.moves(0.0) == []


def test_the_bounds_follow_the_load() -> None:
    fleet = Fleet("a", "b", "c", "d", running=20)
    first, second = fleet.order()[:2]
    fleet.says(first, in_slots=[V], running=30)
    assert fleet.order()[0] == first, "nobody else holds it"
    fleet.says(second, in_host=[V])
    assert fleet.order()[:2] == [second, first]
    fleet.says(second, in_host=[])
    fleet.says(first, running=60)
    assert fleet.order()[0] == first, "it can run it at once"
    fleet.says(first, running=64)
    assert fleet.order()[0] == second
    assert fleet.order()[-1] == first


def test_a_replica_without_a_free_slot_takes_nothing_new() -> None:
    fleet = Fleet("a", "b")
    first, second = fleet.order()
    fleet.says(first, busy_slots=8)
    assert fleet.order() == [second, first]
    fleet.says(first, in_slots=[V])
    assert fleet.order() == [first, second]
    fleet.says(first, in_slots=[], in_host=[V])
    fleet.says(second, busy_slots=8)
    assert set(fleet.order()) == {first, second}, "somebody has to"


def test_load_is_what_was_reported_and_what_has_happened_since() -> None:
    fleet = Fleet("a", "b")
    fleet.says("a", running=10)
    assert fleet.order(None) == ["b", "a"]
    for _ in range(11):
        fleet.placement.sent(0.0, None, "b")
    assert fleet.order(None) == ["a", "b"]
    fleet.says("b", running=11)
    assert fleet.order(None) == ["a", "b"], "counted once"
    for _ in range(5):
        fleet.placement.ended(None, "b")
    assert fleet.order(None) == ["b", "a"]


@pytest.mark.parametrize("state", ["starting", "draining", "restarting", "gone"])
def test_only_ready_replicas_get_anything(state: str) -> None:
    fleet = Fleet("a", "b")
    fleet.says("a", state=state, in_slots=[V])
    assert (fleet.order(), fleet.order(None)) == (["b"], ["b"])


def test_a_silent_replica_gets_nothing() -> None:
    fleet = Fleet("a", "b")
    fleet.now = 5.0
    fleet.says("a")
    fleet.placement.beat(5.0, fleet.reports["b"])  # read again, and no newer than before
    fleet.now = 7.0
    assert fleet.order() == ["a"]
    fleet.says("b")
    assert sorted(fleet.order()) == ["a", "b"]


def test_a_lost_replica_is_back_with_its_next_beat() -> None:
    fleet = Fleet("a", "b")
    fleet.placement.lost("a")
    fleet.placement.lost("nobody")
    fleet.placement.beat(0.0, fleet.reports["a"])
    assert fleet.order() == ["b"]
    fleet.says("a")
    assert sorted(fleet.order()) == ["a", "b"]


def test_only_replicas_of_the_same_base_model() -> None:
    fleet = Fleet("a", "b", "c")
    fleet.says("c", base="another", in_slots=[V])
    assert sorted(fleet.order()) == ["a", "b"]
    fleet.placement.base = "another"
    assert fleet.order() == ["c"]


def test_an_answer_goes_on_where_everything_is_equal() -> None:
    fleet = Fleet("a", "b", "c")
    fleet.says("b", kind="another dtype")
    fleet.placement.lost("a")
    assert fleet.order(like="a") == ["c"]
    assert fleet.order(like="unheard of") == []


def test_a_new_replica_gets_its_share_a_few_at_a_time() -> None:
    fleet = Fleet("a", "b", gpu_slots=2_000, max_running=8_000)
    held: dict[str, list[str]] = {name: [] for name in "abc"}
    for version in MANY[:300]:
        home = fleet.order(version)[0]
        fleet.placement.sent(0.0, version, home)
        held[home].append(version)
    for name in "ab":
        fleet.says(name, in_slots=held[name], running=len(held[name]))
    assert fleet.placement.moves(0.0) == []
    fleet.says("c", gpu_slots=2_000, max_running=8_000)
    assert all(fleet.order(version)[0] != "c" for version in MANY[:300]), "nobody waits for a load"
    for second in range(200):
        fleet.now = float(second)
        moves = fleet.placement.moves(fleet.now)
        assert len(moves) <= Rules().moves
        assert all(move.replica == "c" for move in moves)
        held["c"] += [move.version for move in moves]
        for name in "abc":
            fleet.says(name, in_slots=list(held[name]), running=0 if name == "c" else len(held[name]))
    assert fleet.placement.moves(201.0) == []
    alone = Fleet(*"abc", gpu_slots=2_000, max_running=8_000)
    for version in MANY[:300]:
        assert (fleet.order(version)[0] == "c") == (alone.order(version)[0] == "c")


def test_the_most_wanted_moves_first() -> None:
    fleet = Fleet("a")
    versions = [version for version in MANY if Fleet("a", "b").order(version)[0] == "b"][:8]
    fleet.says("a", in_slots=versions, running=20)
    for number, version in enumerate(versions):
        for _ in range(number + 1):
            fleet.placement.sent(0.0, version, "a")
    fleet.says("b")
    assert fleet.placement.moves(0.0) == [Move(version, "b") for version in versions[:3:-1]]


def test_pins_are_kept_once_and_spread() -> None:
    fleet = Fleet("a", "b", "c", "d")
    pinned = MANY[:20]
    kept = fleet.placement.pins(pinned, 0.0)
    assert sorted(version for versions in kept.values() for version in versions) == sorted(pinned)
    assert max(map(len, kept.values())) <= 7  # 1.25 * 20 / 4, rounded up
    fleet.says("d", state="draining")
    moved = fleet.placement.pins(pinned, 0.0)
    assert sorted(version for versions in moved.values() for version in versions) == sorted(pinned)
    assert "d" not in moved
    assert Fleet().placement.pins(pinned, 0.0) == {}


def test_what_is_not_known_changes_nothing() -> None:
    fleet = Fleet("a")
    fleet.placement.sent(0.0, V, "nobody")
    fleet.placement.ended(V, "nobody")
    fleet.placement.forget("nobody")
    fleet.placement.ended(V, "a")
    assert repr(fleet.placement) == "Placement(a: ready, load 0, 0 in slots)"


def test_scores_are_spread_evenly() -> None:
    replicas = [hashed(f"r{number}") for number in range(64)]
    won = Counter(max(replicas, key=lambda r: score(hashed(version), r, 1.0)) for version in MANY * 1)
    assert len(won) == 64
    assert max(won.values()) < 2.2 * len(MANY) / 64
