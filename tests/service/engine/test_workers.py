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


def sliced(
    filling: int, *activated: tuple[int, str | None, float], staged: tuple[Any, ...] = (), results: int = 0
) -> dict[str, Any]:
    return {
        "results": [(None, 0.01)] * results,
        "staged": list(staged),
        "activated": list(activated),
        "filling": filling,
    }


async def test_a_slot_is_full_once_every_worker_has_filled_it_slice_by_slice() -> None:
    workers = Workers(
        [sliced(0, results=1)] * 2,
        [sliced(1, results=1), sliced(1, staged=((2, None, 0.1, 7),), results=1)],
        [sliced(0, (1, None, 0.2)), sliced(1)],
        [sliced(0, staged=((2, None, 0.3, 9),)), sliced(0, (1, None, 0.4))],
    )
    engine = await engine_on(workers, 2)
    await engine.page([PageOp("stage", 1, "t/a@b", "/a")])
    report = await engine.page([PageOp("activate", 1)])
    assert report.results == (PageResult(None, 0.4),)
    assert report.staged == (StageResult(2, None, 0.3, 16),), "what was read meanwhile is not lost"
    assert [args for _, args in workers.asked[2:]] == [([("activate", 1, "", "")],), ([],), ([],)]


@pytest.mark.parametrize("failing", [0, 1])
async def test_a_slot_that_one_worker_could_not_fill_is_not_active(failing: int) -> None:
    ends: list[str | None] = [None, None]
    ends[failing] = "ValueError: it does not fit"
    workers = Workers(
        [sliced(1, results=1), sliced(1, results=1)], [sliced(0, (1, end, 0.2)) for end in ends]
    )
    report = await (await engine_on(workers, 2)).page([PageOp("activate", 1)])
    assert report.results == (PageResult("ValueError: it does not fit", 0.2),)


async def test_loads_are_asked_for_unless_every_worker_tells_of_them() -> None:
    for told in ([True, True], [True, False], [False, False]):
        paging = Paging(Workers([{"modules": {}, "notices": one} for one in told]), {}, {})
        await paging.open(2, 4)
        assert paging.is_told == all(told)
