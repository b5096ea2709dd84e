"""How long requests took, by percentile: over single requests, so not over days that were added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, case, func, select

from adapters.database.database import Database
from adapters.database.rows import UsageRow, matching
from server.accounts.usage import Question, group_column

PERCENTS = (50, 95, 99)
TIMES = ("queue_seconds", "first_token_seconds", "seconds")


async def percentiles(database: Database, question: Question) -> dict[tuple[Any, ...], dict[str, float]]:
    """By the values of the question's groups: ``seconds_p95`` and so on, each one that a request had."""
    groups = [group_column(name).label(f"by_{name}") for name in question.by]
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    async with database.read() as session:
        for name in TIMES:
            for row in await session.execute(_ranked(question, groups, getattr(UsageRow, name))):
                *key, p50, p95, p99 = row
                values = zip(PERCENTS, (p50, p95, p99), strict=True)
                sums = found.setdefault(tuple(key), {})
                sums |= {f"{name}_p{percent}": round(float(value), 6) for percent, value in values}
    return found


def _ranked(question: Question, groups: Sequence[ColumnElement[Any]], time: ColumnElement[float]) -> Any:
    """The nearest rank: the smallest value that so many percent do not exceed."""
    place = func.row_number().over(partition_by=list(groups), order_by=time).label("place")
    count = func.count().over(partition_by=list(groups)).label("many")
    single = select(*groups, time.label("time"), place, count).where(
        UsageRow.request_id.is_not(None), UsageRow.requests > 0
    )
    if time.key == "first_token_seconds":
        single = single.where(UsageRow.output_tokens > 0)
    rows = matching(single, UsageRow, question, "tenant", "adapter", "key").subquery()
    by = [rows.c[group.name] for group in groups]
    at = [
        func.max(case((rows.c.place == (rows.c.many * percent + 99) // 100, rows.c.time)))
        for percent in PERCENTS
    ]
    return select(*by, *at).select_from(rows).group_by(*by).having(func.count() > 0)
