"""A record of what a request used, and how several are added up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from server.metrics import Outcome


@dataclass(frozen=True, slots=True)
class Usage:
    """What one request used, or several together (then ``request_id`` is None). Times are in seconds.

    ``key`` is None for a gateway's request, ``adapter`` and ``version`` for one to the base model.
    ``load_seconds`` are those of ``queue_seconds`` in which its adapter was loaded. ``code`` is the error
    that it ended with. ``requests`` is 0 for one that was refused. ``finish`` is why the answer ended
    (``stop``, ``length`` …), ``numbered`` whether the request named its version.
    """

    at: datetime
    tenant: str
    key: str | None
    adapter: str | None
    version: int | None
    endpoint: str
    outcome: Outcome
    request_id: str | None
    requests: int = 1
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    queue_seconds: float = 0.0
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    cost: int = 0
    load_seconds: float = 0.0
    client_request_id: str | None = None
    code: str | None = None
    finish: str | None = None
    numbered: bool = False

    @property
    def hour(self) -> int:
        """Hours since 1970."""
        return int(self.at.timestamp()) // 3600

    def as_row(self) -> dict[str, Any]:
        return {"hour": self.hour} | {name: getattr(self, name) for name in self.__slots__}

    def origin(self) -> tuple[Any, ...]:
        """What records are added up by."""
        return self.hour, *(getattr(self, name) for name in ORIGIN)


ORIGIN = ("tenant", "key", "adapter", "version", "endpoint", "outcome")
SUMS = (
    "requests", "prompt_tokens", "cached_tokens", "output_tokens", "queue_seconds", "first_token_seconds",
    "seconds", "cost", "load_seconds",
)  # fmt: skip


def added_up(records: Iterable[Usage]) -> list[Usage]:
    """One record for all of the same hour and origin; the sums stay what they were.

    Refused requests, which add nothing, are left out.
    """
    totals: dict[tuple[Any, ...], Usage] = {}
    for record in records:
        if not record.requests:
            continue
        total = totals.get(record.origin())
        if total is not None:
            sums = {name: getattr(total, name) + getattr(record, name) for name in SUMS}
            of_one: dict[str, Any] = dict.fromkeys(("request_id", "client_request_id", "code", "finish"))
            record = replace(total, numbered=False, **of_one, **sums)
        totals[record.origin()] = record
    return list(totals.values())
