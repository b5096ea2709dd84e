"""Rows by time, a page at a time: each page begins behind the row that ended the one before."""

from __future__ import annotations

from typing import Any, TypeVar

from sqlalchemy import Select, and_, or_

Q = TypeVar("Q", bound=Select[Any])


def by_time(query: Q, rows: Any, last: Any = None, *, oldest: bool = False) -> Q:
    """``query`` newest first, or ``oldest``; with ``last``, a row, only what comes behind it.

    ``rows`` is what the table's rows are made as; they have ``created_at`` and ``id``.
    """
    at, id_ = rows.created_at, rows.id
    query = query.order_by(*((at, id_) if oldest else (at.desc(), id_.desc())))
    if last is None:
        return query
    beyond = at > last.created_at if oldest else at < last.created_at
    tie = id_ > last.id if oldest else id_ < last.id
    return query.where(or_(beyond, and_(at == last.created_at, tie)))
