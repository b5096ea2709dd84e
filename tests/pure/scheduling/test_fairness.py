"""The queue of queues: who is next, and what each tenant is charged."""

from __future__ import annotations

from typing import Any

import pytest

from server.scheduling.fair_queue import ELSEWHERE_MOST, RECENT_RUNS, REMEMBERED, FairQueue, Request
from server.scheduling.nouns import Ask


def push(queue: FairQueue, tenant: str, id_: str, now: float = 0.0, **changes: Any) -> Request:
    values = {"version": None, "prompt_tokens": 10, "max_tokens": 100, **changes}
    return queue.push(Ask(id=id_, tenant=tenant, **values), now)


def first(queue: FairQueue) -> str | None:
    request = queue.first()
    return None if request is None else request.ask.id


def serve(queue: FairQueue, tenant: str, prompt_tokens: int, output_tokens: int, **changes: Any) -> None:
    """One request from queue to end."""
    request = push(queue, tenant, "served", prompt_tokens=0, **changes)
    queue.start(request, 0.0)
    queue.charge(request, prompt_tokens, output_tokens)
    queue.end(request)


def counters(queue: FairQueue) -> dict[str, float]:
    queue.check()
    return {tenant.id: tenant.counter for tenant in queue.tenants()}


def test_output_costs_twice_what_input_does_and_weight_divides() -> None:
    queue = FairQueue()
    push(queue, "keeps the level at zero", "x")
    serve(queue, "a", 30, 20)
    serve(queue, "b", 30, 20, weight=7.0)
    assert counters(queue) == {"keeps the level at zero": 0.0, "a": 70.0, "b": 10.0}


def test_the_estimate_is_charged_at_the_start_and_corrected_later() -> None:
    queue = FairQueue()
    request = push(queue, "a", "r1", prompt_tokens=50)
    assert counters(queue) == {"a": 0.0}
    queue.start(request, 0.0)
    assert counters(queue) == {"a": 50.0}
    queue.charge(request, 40, 3)  # 46 in truth: what was charged too much pays for what comes
    assert counters(queue) == {"a": 50.0}
    queue.charge(request, 40, 10)
    assert counters(queue) == {"a": 60.0}
    queue.charge(request, 0, 0)
    assert counters(queue) == {"a": 60.0}


def test_the_lowest_counter_is_next_then_the_earlier_arrival() -> None:
    queue = FairQueue()
    r1 = push(queue, "a", "a1")
    push(queue, "a", "a2")
    push(queue, "b", "b1")
    push(queue, "c", "c1")
    assert first(queue) == "a1"
    queue.start(r1, 0.0)
    assert first(queue) == "b1"
    for tenant, cost in (("b", 30), ("c", 20)):
        serve(queue, tenant, cost, 0)
    assert first(queue) == "a2"
    queue.charge(r1, 25, 0)
    assert first(queue) == "c1"


def test_a_newcomer_starts_at_the_lowest_counter_of_those_that_are_here() -> None:
    queue = FairQueue()
    for tenant in "ab":
        push(queue, tenant, f"{tenant}1")
    serve(queue, "a", 100, 0)
    serve(queue, "b", 300, 0)
    push(queue, "new", "n1")
    assert counters(queue) == {"a": 100.0, "b": 300.0, "new": 100.0}


def test_being_away_earns_no_credit_and_costs_none() -> None:
    queue = FairQueue()
    serve(queue, "little", 10, 0)
    serve(queue, "much", 500, 0)
    assert queue.counter("much") == 510.0  # lifted to the level when it came
    assert counters(queue) == {}, "who owes nothing is forgotten"
    push(queue, "little", "l1")
    push(queue, "much", "m1")
    assert counters(queue) == {"little": 510.0, "much": 510.0}


def test_a_running_request_keeps_its_tenant_here() -> None:
    queue = FairQueue()
    running = push(queue, "a", "a1", prompt_tokens=40)
    queue.start(running, 0.0)
    push(queue, "b", "b1")
    assert counters(queue) == {"a": 40.0, "b": 40.0}
    serve(queue, "b", 60, 0)
    push(queue, "c", "c1")
    assert counters(queue)["c"] == 40.0
    queue.end(running)
    push(queue, "d", "d1")
    assert counters(queue)["d"] == 40.0


def test_within_a_tenant_the_order_is_arrival_among_open_lanes() -> None:
    queue = FairQueue()
    queue.gate("open", True)
    for id_, version in [("1", "shut"), ("2", "open"), ("3", None), ("4", "open")]:
        push(queue, "a", id_, version=version)
    order = []
    while (request := queue.first()) is not None:
        order.append(request.ask.id)
        queue.remove(request)
        queue.check()
        if request.ask.id == "3":
            queue.gate("shut", True)
            queue.gate("open", False)
    assert order == ["2", "3", "1"]
    assert [r.ask.id for r in queue.waiting("open")] == ["4"]
    assert not queue.waits("shut")
    assert queue.queued("a") == 1


def test_what_waits_for_a_version_is_listed_by_arrival_across_tenants() -> None:
    queue = FairQueue()
    for n, tenant in enumerate("abab"):
        push(queue, tenant, str(n), version="v")
    assert [r.ask.id for r in queue.waiting("v")] == ["0", "1", "2", "3"]


def test_the_first_acceptable_request_of_several_tenants() -> None:
    queue = FairQueue()
    for tenant, sequences in [("a", 4), ("b", 3), ("c", 1), ("d", 2)]:
        push(queue, tenant, tenant, sequences=sequences)
    found = queue.first(lambda request: request.ask.sequences <= 2)
    assert found is not None
    assert found.ask.id == "c"
    assert queue.first(lambda request: False) is None
    assert first(queue) == "a"


def test_a_tenant_at_its_own_limit_is_passed_over() -> None:
    queue = FairQueue()
    request = push(queue, "a", "a1", max_running=1)
    push(queue, "a", "a2", max_running=1)
    push(queue, "b", "b1", now=1.0)
    queue.start(request, 1.0)
    serve(queue, "b", 1000, 0)
    assert first(queue) == "b1"
    queue.end(request)
    assert first(queue) == "a2"


@pytest.mark.parametrize(
    ("queued", "runs", "seconds", "expected"),
    [
        (10, 0, 0.0, 1.0),  # a burst into an empty server
        (10, 0, 30.0, 30.0),  # nothing has run yet: as long again
        (10, 20, 10.0, 5.0),  # two a second
        (10, 100, 2.0, 1.0),  # never sooner than a second
        (500, 5, 10.0, 60.0),  # never later than a minute
    ],
)
def test_when_to_retry_follows_the_tenants_own_pace(
    queued: int, runs: int, seconds: float, expected: float
) -> None:
    queue = FairQueue()
    requests = [push(queue, "a", str(n)) for n in range(runs + queued)]
    for n, request in enumerate(requests[:runs], start=1):
        queue.start(request, n * seconds / runs)
        queue.end(request)
    assert queue.retry_after("a", seconds) == pytest.approx(expected, rel=0.1)
    assert queue.retry_after("unknown", seconds) == 1.0


def test_the_pace_is_that_of_the_last_runs() -> None:
    queue = FairQueue()
    requests = [push(queue, "a", str(n)) for n in range(RECENT_RUNS + 21)]
    queue.start(requests[0], 50.0)
    for n, request in enumerate(requests[1 : RECENT_RUNS + 1], start=1):
        queue.start(request, 100.0 + n)
    assert queue.retry_after("a", 100.0 + RECENT_RUNS) == pytest.approx(20.0, rel=0.1)


def test_the_pace_of_an_earlier_backlog_says_nothing_about_this_one() -> None:
    queue = FairQueue()
    for _ in range(RECENT_RUNS):
        serve(queue, "a", 1, 1)
    for n in range(10):
        push(queue, "a", str(n), now=1000.0)
    assert queue.retry_after("a", 1000.0) == 1.0


def test_a_debt_is_remembered_until_others_have_had_as_much() -> None:
    queue = FairQueue()
    push(queue, "here", "h1")
    serve(queue, "debtor", 100, 0)
    assert counters(queue) == {"here": 0.0, "debtor": 100.0}
    serve(queue, "here", 150, 0)
    serve(queue, "other", 1, 0)
    assert "debtor" not in counters(queue)
    push(queue, "debtor", "d1")
    assert queue.counter("debtor") == 150.0


def test_memory_is_bounded_whoever_comes() -> None:
    """A tenant that never gets on holds the level down, so that everybody else leaves with a debt."""
    queue = FairQueue()
    push(queue, "stuck", "s1")
    for number in range(3 * REMEMBERED):
        serve(queue, f"t{number}", 10 + number, 0)
    queue.check()
    assert len(list(queue.tenants())) <= REMEMBERED + 1
    assert queue.counter(f"t{3 * REMEMBERED - 1}") == 10 + 3 * REMEMBERED - 1, "the largest debts are kept"


# --- other replicas ----------------------------------------------------------------------------------


def test_what_is_served_elsewhere_counts_while_the_tenant_is_here() -> None:
    queue = FairQueue()
    push(queue, "b", "b1")
    push(queue, "a", "a1", elsewhere=5_000.0)  # before it came: no debt
    assert counters(queue) == {"a": 0.0, "b": 0.0}
    push(queue, "a", "a2", elsewhere=5_100.0)
    assert counters(queue) == {"a": 100.0, "b": 0.0}
    push(queue, "a", "a3", elsewhere=5_090.0)  # another gateway, with an older report
    push(queue, "a", "a4", elsewhere=5_100.0)
    assert counters(queue) == {"a": 100.0, "b": 0.0}
    assert first(queue) == "b1"


def test_a_replica_that_has_gone_takes_what_it_served_along() -> None:
    queue = FairQueue()
    push(queue, "a", "a1", elsewhere=5_000.0)
    push(queue, "a", "a2", elsewhere=100.0)
    assert counters(queue) == {"a": 0.0}
    push(queue, "a", "a3", elsewhere=150.0)
    assert counters(queue) == {"a": 50.0}


def test_a_debt_from_elsewhere_is_bounded() -> None:
    queue = FairQueue()
    push(queue, "b", "b1")
    push(queue, "a", "a1")
    for hour in range(1, 4):
        push(queue, "a", f"again {hour}", elsewhere=hour * 1e6)
    assert counters(queue) == {"a": ELSEWHERE_MOST, "b": 0.0}


def test_what_was_served_here_leaves_out_what_was_given() -> None:
    queue = FairQueue()
    push(queue, "x", "x1", prompt_tokens=0)
    serve(queue, "x", 300, 0)
    r1 = push(queue, "a", "a1", prompt_tokens=0)
    push(queue, "a", "a2", elsewhere=40.0)
    queue.start(r1, 0.0)
    queue.charge(r1, 7, 0)
    assert counters(queue) == {"x": 300.0, "a": 347.0}
    assert queue.served() == {"x": 300.0, "a": 7.0}
