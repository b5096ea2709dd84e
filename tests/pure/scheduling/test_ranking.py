"""The two orders against plain sorted lists."""

from __future__ import annotations

import random

import pytest

from server.scheduling.ranking import FairShare, Ranking, RoundRobin


@pytest.mark.parametrize("seed", range(5))
def test_a_ranking_is_a_sorted_list_that_can_be_changed(seed: int) -> None:
    rng = random.Random(seed)
    ranking: Ranking[str] = Ranking()
    model: dict[str, tuple[int, int]] = {}
    for step in range(3000):
        member = rng.choice("abcdefghij")
        if rng.random() < 0.6:
            rank = rng.randrange(8)
            ranking.set(member, rank)
            if member not in model or model[member][0] != rank:
                model[member] = (rank, step)
        else:
            ranking.drop(member)
            model.pop(member, None)
        expected = sorted(model, key=model.__getitem__)
        assert ranking.first() == (expected[0] if expected else None)
        assert ranking.leading(3) == expected[:3]
        assert len(ranking) == len(model)
        assert all((m in ranking) == (m in model) for m in "abcdefghij")


def test_a_ranking_does_not_grow_with_its_changes() -> None:
    ranking: Ranking[str] = Ranking()
    ranking.set("first", -1)
    for rank in range(10_000):
        ranking.set("a", rank)
    assert len(ranking._heap) < 50
    assert repr(ranking) == "Ranking(['first', 'a'])"


def test_turns_are_by_waiting_time_where_each_tenant_has_one_member() -> None:
    turns: RoundRobin[str] = RoundRobin()
    for since, member in [(3.0, "c"), (1.0, "a"), (2.0, "b")]:
        turns.add(member, f"tenant of {member}", since)
    assert _take_all(turns, 10.0) == ["a", "b", "c"]


def test_tenants_take_turns_however_many_members_they_have() -> None:
    turns: RoundRobin[str] = RoundRobin()
    for n in range(4):
        turns.add(f"noisy{n}", "noisy", 0.0)
    for n in range(2):
        turns.add(f"quiet{n}", "quiet", 0.0)
    assert _take_all(turns, 0.0) == ["noisy0", "quiet0", "noisy1", "quiet1", "noisy2", "noisy3"]


def test_a_turn_is_remembered_while_nothing_waits() -> None:
    turns: RoundRobin[str] = RoundRobin()
    turns.add("n0", "noisy", 0.0)
    turns.take("n0", 5.0)
    turns.add("n1", "noisy", 1.0)
    turns.add("q0", "quiet", 4.0)
    assert turns.first() == "q0"
    turns.drop("q0")
    turns.drop("unknown")
    assert turns.first() == "n1"
    assert ("n1" in turns, "q0" in turns, len(turns)) == (True, False, 1)


def _take_all(turns: RoundRobin[str], now: float) -> list[str]:
    order = []
    while (member := turns.first()) is not None:
        turns.take(member, now)
        order.append(member)
    return order


def test_shares_go_to_who_has_had_least_but_let_nobody_wait_too_long() -> None:
    had = {"greedy": 9.0, "modest": 1.0}
    shares: FairShare[str] = FairShare(lambda member: had[member[:-1]])
    shares.add("greedy1", "greedy", 0.0)
    shares.add("modest1", "modest", 5.0)
    shares.add("modest2", "modest", 6.0)
    assert shares.leading(3) == ["modest1", "greedy1"]
    assert (shares.next(-1.0), shares.next(0.0), shares.rank("modest2")) == ("modest1", "greedy1", 1.0)
    had["modest"] = 10.0
    shares.rerank("modest")
    assert shares.next(-1.0) == "greedy1"
    shares.take("greedy1", 7.0)
    shares.add("greedy2", "greedy", 2.0)
    assert shares.next(6.0) == "modest1", "greedy has waited since its last turn only"
    shares.drop("modest1")
    shares.drop("modest2")
    assert (shares.leading(3), shares.next(0.0)) == (["greedy2"], "greedy2")
