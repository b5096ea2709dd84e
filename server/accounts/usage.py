"""What was used: a row for every request that the engine took, written soon after it ended.

Rows wait in memory for ``FLUSH_INTERVAL_S`` and are then written together. A SIGKILL loses at most the last
second, as long as a write takes less than a third of one: a row may wait for the pause, for the write before
its own, and for its own. While the database cannot be written to, rows beyond ``MAX_WAITING`` are added up by
hour and origin: what is lost then is which request it was, never a token.

Rows older than ``keep_days`` are added up by day in the same way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, Select, delete, func, insert, null, select, update

from adapters.database.database import Database
from adapters.database.rows import AdminKeyRow, KeyRow, UsageRow, matching, now
from adapters.errors import AdapterError
from adapters.tasks import uninterruptible
from server.accounts.terms import COST_UNIT
from server.errors import Unprocessable
from server.metrics import Outcome

logger = logging.getLogger(__name__)

FLUSH_INTERVAL_S = 0.25
COMPLAIN_INTERVAL_S = 30.0  # between lines of the log while nothing can be written
MAX_WAITING = 10_000
# Refused requests a second that are recorded: a client in a loop must not fill the disk.
MAX_REFUSED = 20
TOUCH_INTERVAL_S = 60.0
ROLL_UP_INTERVAL_S = 3600.0
MAX_GROUPS = 10_000

Group = Literal["hour", "day", "tenant", "adapter", "version", "key", "endpoint", "outcome"]
GROUPS: tuple[Group, ...] = get_args(Group)


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


class UsageWriter:
    """Takes records and keys' times of use on the event loop, and writes them in the background.

    Single records are kept for ``keep_days``, which may be changed, then added up by day, by whoever
    ``rolls_up``.
    """

    def __init__(self, database: Database, *, keep_days: int, rolls_up: bool = True) -> None:
        self._database = database
        self._rolls_up = rolls_up
        self.keep_days = keep_days
        self._waiting: list[Usage] = []
        self._used: dict[str, datetime] = {}
        self._refused = 0, 0  # in which second how many
        self._writing = asyncio.Lock()
        self._moving = asyncio.Lock()  # held while records are in both, memory and database, or in neither
        self._write: asyncio.Task[None] | None = None
        self._recorded = asyncio.Event()  # not set while nothing waits
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._complained = 0.0  # when the log last said that nothing can be written; 0 if all can

    def start(self) -> None:
        """Starts to write in the background; ``stop`` ends it."""
        work = {
            "loraplex-usage": self._flush_forever(),
            "loraplex-keys-used": self._repeat(self.write_used, TOUCH_INTERVAL_S),
        }
        if self._rolls_up:
            work["loraplex-roll-up"] = self._repeat(self.roll_up, ROLL_UP_INTERVAL_S)
        self._tasks = [asyncio.create_task(task, name=name) for name, task in work.items()]

    async def stop(self) -> None:
        """Everything is on disk when it returns; raises what kept it from getting there.

        Also where it is cancelled, and its tasks before it: with an event loop that ends all are.
        """
        await uninterruptible(self._stop())

    async def _stop(self) -> None:
        self._stopping.set()
        self._recorded.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.flush()
        await self.write_used()

    def record(self, record: Usage) -> None:
        """Takes a record; it is written within a second."""
        self._waiting.append(record)
        self._recorded.set()
        if len(self._waiting) > MAX_WAITING:
            self._waiting = added_up(self._waiting)

    def refused(self, record: Usage) -> None:
        """Takes the record of a request that was refused; no more than ``MAX_REFUSED`` a second."""
        second = int(record.at.timestamp())
        if self._refused[0] != second:
            self._refused = second, 0
        if self._refused[1] < MAX_REFUSED and len(self._waiting) < MAX_WAITING:
            self._refused = second, self._refused[1] + 1
            self.record(replace(record, requests=0))

    def used(self, key: str) -> None:
        """Notes that the key with this id is used now."""
        self._used[key] = now()

    async def flush(self) -> None:
        """Writes all that was recorded before the call. What fails stays, and its error comes through.

        Goes on if the caller is cancelled: whether a commit that was given up took place is not to be known.
        """
        self._write = asyncio.ensure_future(self._flush())
        await asyncio.shield(self._write)

    async def _flush(self) -> None:
        async with self._writing:
            if not self._waiting:
                return
            batch: list[Usage] = []
            written = False
            moving = AsyncExitStack()
            try:
                async with self._database.append() as session:
                    await session.connection()  # what is recorded until it has begun is written too
                    await moving.enter_async_context(self._moving)
                    batch, self._waiting = self._waiting, []
                    await session.execute(insert(UsageRow), [record.as_row() for record in batch])
                written = True
            finally:
                if not written:
                    self._waiting = added_up([*batch, *self._waiting])
                await moving.aclose()

    async def spent(self, tenant: str, start: datetime, end: datetime) -> tuple[int, int]:
        """As the function of this name, with what has not been written yet, or cannot be at the moment."""
        async with self._moving:
            tokens, cost = await spent(self._database, tenant, start, end)
            waiting = [one for one in self._waiting if one.tenant == tenant and start <= one.at < end]
        whole = [one for one in waiting if one.requests]
        return (
            tokens + sum(one.prompt_tokens + one.output_tokens for one in whole),
            cost + sum(one.cost for one in whole),
        )

    async def _flush_forever(self) -> None:
        """Writes records ``FLUSH_INTERVAL_S`` after the first of them came, so that one write has many."""
        clock = asyncio.get_running_loop().time
        took = 0.0
        while not self._stopping.is_set():
            await self._recorded.wait()
            # Rows have waited while those before them were written, which is long in a busy process.
            await self._pause(FLUSH_INTERVAL_S - took)
            began = clock()
            try:
                await self.flush()
                if self._complained:
                    logger.warning("usage is written again")
                    self._complained = 0.0
            except AdapterError as error:  # a disk or a database, which may be away for long
                if not self._complained or clock() - self._complained > COMPLAIN_INTERVAL_S:
                    logger.error("usage could not be written; %d records wait: %s", len(self._waiting), error)
                    self._complained = clock()
            except Exception:
                logger.exception("usage could not be written; %d records wait", len(self._waiting))
            took = clock() - began
            if not self._waiting:
                self._recorded.clear()

    async def _repeat(self, step: Callable[[], Awaitable[None]], seconds: float) -> None:
        """Takes ``step`` now and so many seconds after each, until the writer stops; logs what it raises."""
        while not self._stopping.is_set():
            try:
                await step()
            except AdapterError as error:
                logger.error("%s failed: %s", step.__name__, error)
            except Exception:
                logger.exception("%s failed", step.__name__)
            await self._pause(seconds)

    async def _pause(self, seconds: float) -> None:
        """Waits so long, or until the writer stops."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, seconds)):
                await self._stopping.wait()

    async def write_used(self) -> None:
        """Writes when which keys were last used."""
        used, self._used = self._used, {}
        if not used:
            return
        async with self._database.append() as session:
            for key, at in used.items():
                for table in (KeyRow, AdminKeyRow):
                    await session.execute(update(table).where(table.id == key).values(last_used_at=at))

    async def roll_up(self) -> None:
        """Adds up the days that are over; in a fleet one process does it for all."""
        while await roll_up(self._database, now() - timedelta(days=self.keep_days)):
            pass


async def roll_up(database: Database, before: datetime) -> bool:
    """Adds up the oldest day that ended at ``before`` or earlier; False when there is none left.

    A total has the time of its first row, so that it belongs to no tenant that is younger.
    """
    single = UsageRow.request_id.is_not(None)
    last = before.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    async with database.append() as session:
        oldest = await session.scalar(select(func.min(UsageRow.hour)).where(single, UsageRow.at < last))
        if oldest is None:
            return False
        day = (UsageRow.hour >= oldest // 24 * 24, UsageRow.hour < (oldest // 24 + 1) * 24)
        origin = [getattr(UsageRow, name) for name in ORIGIN]
        sums = [func.sum(getattr(UsageRow, name)) for name in SUMS]
        total = select(func.min(UsageRow.at), func.min(UsageRow.hour), *origin, null(), *sums)
        whole = (*day, UsageRow.requests > 0)
        # Its rows have ids beyond these, and must not be deleted with them.
        newest = await session.scalar(select(func.max(UsageRow.id)).where(*day))
        names = ["at", "hour", *ORIGIN, "request_id", *SUMS]
        await session.execute(
            insert(UsageRow).from_select(names, total.where(*whole).group_by(*origin), include_defaults=False)
        )
        await session.execute(delete(UsageRow).where(*day, UsageRow.id <= newest))
    return True


@dataclass(frozen=True, slots=True)
class Question:
    """Whose usage, of what time (``start`` <= at < ``end``), and by what it is to be added up."""

    tenant: str | None = None
    adapter: str | None = None
    key: str | None = None
    start: datetime | None = None
    end: datetime | None = None
    by: Sequence[Group] = ()


async def usage(database: Database, question: Question) -> list[dict[str, Any]]:
    """The sums, one dictionary for each group, in the groups' order. Hours and days by their beginning.

    What was rolled up counts whole where its first row does. Unprocessable for more than ``MAX_GROUPS``.
    """
    groups = [group_column(name).label(f"by_{name}") for name in question.by]
    sums = [func.coalesce(func.sum(getattr(UsageRow, name)), 0).label(name) for name in SUMS]
    query = _asked(select(*groups, *sums), question).limit(MAX_GROUPS + 1)
    if groups:
        query = query.group_by(*groups)
    async with database.read() as session:
        found = (await session.execute(query)).mappings().all()
    if len(found) > MAX_GROUPS:
        raise Unprocessable(f"That is more than {MAX_GROUPS} groups; ask for less time, or by less.")
    rows = [
        {name: shown_group(name, row[f"by_{name}"]) for name in question.by} | _totals(row) for row in found
    ]
    return sorted(rows, key=lambda row: [(row[name] is not None, row[name]) for name in question.by])


async def spent(database: Database, tenant: str, start: datetime, end: datetime) -> tuple[int, int]:
    """(prompt and output tokens, cost) of the tenant's requests that ended in that time."""
    tokens = func.sum(UsageRow.prompt_tokens + UsageRow.output_tokens)
    query: Select[*tuple[Any, ...]] = select(
        func.coalesce(tokens, 0), func.coalesce(func.sum(UsageRow.cost), 0)
    )
    async with database.read() as session:
        row = (await session.execute(_asked(query, Question(tenant=tenant, start=start, end=end)))).one()
    return int(row[0]), int(row[1])


def _asked(query: Select[*tuple[Any, ...]], question: Question) -> Select[*tuple[Any, ...]]:
    query = query.where(UsageRow.requests > 0)
    return matching(query, UsageRow, question, "tenant", "adapter", "key")


def group_column(name: Group) -> ColumnElement[Any]:
    """What a group is told apart by; days are counted from 1970."""
    if name == "day":
        return UsageRow.hour // 24
    column: ColumnElement[Any] = getattr(UsageRow, name)
    return column


def shown_group(name: Group, value: Any) -> Any:
    """A group's value for people: hours and days by their beginning."""
    if name in ("hour", "day"):
        return datetime.fromtimestamp(value * (3600 if name == "hour" else 86400), UTC).isoformat()
    return value


def _totals(row: Any) -> dict[str, float]:
    whole = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")
    total: dict[str, float] = {name: int(row[name]) for name in whole}
    total["total_tokens"] = total["prompt_tokens"] + total["output_tokens"]
    total |= {name: round(float(row[name]), 6) for name in SUMS if name.endswith("seconds")}
    return total | {"cost": int(row["cost"]) / COST_UNIT}
