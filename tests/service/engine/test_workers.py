"""What several workers of one engine report, put together: a load is whole when all of them have it."""

from __future__ import annotations

from typing import Any

import pytest

from server.engine.calls import PageOp, PageResult, StageResult
from server.engine.paging import Paging


class Workers:
    """Answers ``collective_rpc`` with the next of ``reports``, each a report of every worker."""

    def __init__(self, *reports: list[dict[str, Any]]) -> None:
        self.reports = list(reports)
        self.asked: list[tuple[str, tuple[Any, ...]]] = []

    async def collective_rpc(
        self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        self.asked.append((method, args))
        return self.reports.pop(0)


async def engine_on(workers: Workers, number: int) -> Paging:
    """What an engine asks its workers through, opened on so many of them."""
    opened = [{"modules": {}} for _ in range(number)]
    workers.reports.insert(0, opened)
    engine = Paging(workers, {}, {"shards": True})
    assert await engine.open(2, 4) == opened
    return engine


def staged(*entries: tuple[int, str | None, float, int]) -> dict[str, Any]:
    return {"results": [], "staged": list(entries)}


async def test_a_load_takes_what_it_takes_on_every_worker_and_the_slowest_ones_time() -> None:
    workers = Workers(
        [staged((1, None, 0.5, 100), (2, None, 0.1, 7)), staged((1, None, 0.2, 60))],
        [staged(), staged((2, None, 0.3, 9))],
    )
    engine = await engine_on(workers, 2)
    assert (await engine.page([])).staged == (StageResult(1, None, 0.5, 160),)
    assert (await engine.page([])).staged == (StageResult(2, None, 0.3, 16),)


@pytest.mark.parametrize("failing", [0, 1])
async def test_a_load_that_one_worker_cannot_read_has_failed(failing: int) -> None:
    reports = [staged((1, None, 0.5, 100)), staged((1, None, 0.5, 100))]
    reports[failing] = staged((1, "no such file", 0.1, 0))
    engine = await engine_on(Workers(reports), 2)
    (result,) = (await engine.page([])).staged
    assert (result.load_id, result.error) == (1, "no such file")


async def test_what_one_worker_could_not_read_leaves_the_memory_of_the_others() -> None:
    """The plan gave it up, and no worker but one ever had it: nobody else would ask for its room."""
    half = [staged((1, None, 0.5, 100)), staged((1, "no such file", 0.1, 0))]
    after = {"results": [(None, 0.1), ("no slot", 0.2)], "staged": []}
    workers = Workers(half, [after, after], [staged(), staged()])
    engine = await engine_on(workers, 2)
    await engine.page([])
    report = await engine.page([PageOp("deactivate", 9)])
    assert workers.asked[-1][1][0] == [("evict", 1, "", ""), ("deactivate", 9, "", "")]
    assert report.results == (PageResult("no slot", 0.2),)
    await engine.page([])
    assert workers.asked[-1][1][0] == [], "once"


async def test_an_operation_has_failed_where_one_worker_could_not_do_it() -> None:
    workers = Workers(
        [
            {"results": [(None, 0.1), (None, 0.3)], "staged": []},
            {"results": [("no slot", 0.2), (None, 0.1)], "staged": []},
        ]
    )
    ops = [PageOp("deactivate", 1), PageOp("deactivate", 2)]
    assert (await (await engine_on(workers, 2)).page(ops)).results == (
        PageResult("no slot", 0.2),
        PageResult(None, 0.3),
    )


async def test_what_is_in_memory_is_what_all_workers_hold() -> None:
    reports = [
        {"host": [1, 2], "slots": [1, None], "staging": [3], "in_step_loads": 0},
        {"host": [1], "slots": [None, 1], "staging": [], "in_step_loads": 2},
    ]
    report = await (await engine_on(Workers(reports), 2)).report()
    assert (report.host, report.slots, report.staging) == (frozenset({1}), (1, None), frozenset({3}))
    assert report.in_step_loads == 2
