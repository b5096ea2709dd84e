"""What was used: a row for every request that the engine took, written soon after it ended.

Rows wait in memory for ``FLUSH_INTERVAL_S`` and are then written together, in turns. Until then they are in
a journal too, from ``JOURNAL_INTERVAL_S`` after they came; the next process writes what one that was killed
left there. Where there is none, or its disk fails, a SIGKILL loses at most the last second, as long as a
write takes less than a third of one: a row may wait for the pause, for the write before its own, and for its
own. While the database cannot be written to, rows beyond ``MAX_WAITING`` are added up by hour and origin:
what is lost then is which request it was, never a token.

Rows older than ``keep_days`` are added up by day in the same way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, Select, delete, func, insert, null, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from adapters.database.database import Database
from adapters.database.rows import AdminKeyRow, KeyRow, UsageRow, matching, now
from adapters.errors import AdapterError, cause_of
from adapters.tasks import run_in_thread, uninterruptible
from server.accounts import usage_marks as marks
from server.accounts.terms import COST_UNIT
from server.accounts.usage_journal import FOLDER, Journal, Left, left_behind, set_aside
from server.accounts.usage_records import ORIGIN
from server.accounts.usage_records import SUMS as SUMS
from server.accounts.usage_records import Usage as Usage
from server.accounts.usage_records import added_up as added_up
from server.errors import Unprocessable

logger = logging.getLogger(__name__)

FLUSH_INTERVAL_S = 0.25
JOURNAL_INTERVAL_S = 0.05
JOURNAL_AGAIN_S = 5.0  # after its disk failed
JOURNAL_BYTES = 256 << 10  # below it a journal is not written anew
ADOPT_AGAIN_S = 60.0  # where the database did not take what an earlier process left
MARK_AGAIN_S = 86400.0
ROWS_AT_ONCE = 1000  # a statement: PostgreSQL has ``DATABASE_TIMEOUT`` for each
COMPLAIN_INTERVAL_S = 30.0  # between lines of the log while nothing can be written
MAX_WAITING = 10_000
# Refused requests a second that are recorded: a client in a loop must not fill the disk.
MAX_REFUSED = 20
TOUCH_INTERVAL_S = 60.0
ROLL_UP_INTERVAL_S = 3600.0
MAX_GROUPS = 10_000

Group = Literal["hour", "day", "tenant", "adapter", "version", "key", "endpoint", "outcome"]
GROUPS: tuple[Group, ...] = get_args(Group)


@dataclass(slots=True)
class _Taken:
    """Records on their way to the database. ``sent``: whether their commit was made is not known."""

    turn: int
    records: list[Usage]
    sent: bool = False


class UsageWriter:
    """Takes records and keys' times of use on the event loop, and writes them in the background.

    Single records are kept for ``keep_days``, which may be changed, then added up by day, by whoever
    ``rolls_up``. ``data_dir`` is where the journal lies; without it there is none.
    """

    def __init__(
        self, database: Database, data_dir: Path | None = None, *, keep_days: int, rolls_up: bool = True
    ) -> None:
        self._database = database
        self._rolls_up = rolls_up
        self.keep_days = keep_days
        self._waiting: list[Usage] = []
        self._taken: _Taken | None = None
        self._turn = 1  # in which what waits will be written
        self._folder = Path() if data_dir is None else data_dir / FOLDER
        self._journal = Journal(self._folder)
        self._journals = data_dir is not None
        self._leaves = False  # whether something of an earlier process is still to be written
        self._marked = False  # whether ``meta`` has the row of the journal
        self._unwritten: list[tuple[int, Usage]] = []  # to the journal
        self._most = JOURNAL_BYTES  # a journal that is larger is written anew
        self._used: dict[str, datetime] = {}
        self._refused = 0, 0  # in which second how many
        self._writing = asyncio.Lock()
        self._moving = asyncio.Lock()  # held while records are in both, memory and database, or in neither
        self._write: asyncio.Task[None] | None = None
        self._recorded = asyncio.Event()  # not set while nothing waits
        self._noted = asyncio.Event()  # the same, for the journal
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
        if self._journals:
            work["loraplex-usage-journal"] = self._journal_forever()
            work["loraplex-usage-mark"] = self._repeat(self.renew_mark, MARK_AGAIN_S)
        if self._leaves:
            work["loraplex-usage-left"] = self._adopt_later()
        self._tasks = [asyncio.create_task(task, name=name) for name, task in work.items()]

    async def stop(self) -> None:
        """Everything is on disk when it returns; raises what kept it from getting there.

        Also where it is cancelled, and its tasks before it: with an event loop that ends all are.
        """
        await uninterruptible(self._stop())

    async def _stop(self) -> None:
        self._stopping.set()
        self._recorded.set()
        self._noted.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._keep()  # should the database be away, the next process writes it
        try:
            await self.flush()
            await self.write_used()
            await self._end_journal()
        finally:
            self._journal.close()

    async def _end_journal(self) -> None:
        """All of it is written. While the file is there its mark is needed, or it would be written again."""
        try:
            await asyncio.to_thread(self._journal.remove)
        except OSError as error:
            logger.warning("the journal of usage stays until the next start: %s", error)
            return
        if self._marked:
            await marks.forget(self._database, self._journal.id)

    def record(self, record: Usage) -> None:
        """Takes a record; it is written within a second."""
        self._waiting.append(record)
        if self._journals:
            self._unwritten.append((self._turn, record))
            self._noted.set()
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
            if not self._waiting and self._taken is None:
                return
            moving = AsyncExitStack()
            try:
                async with self._database.append() as session:
                    await session.connection()  # what is recorded until it has begun is written too
                    await moving.enter_async_context(self._moving)
                    if (
                        self._taken is not None
                        and await marks.written(session, self._journal.id) >= self._taken.turn
                    ):
                        self._taken = None  # its commit was made
                    taken = self._take()
                    if taken.records:
                        await _insert(session, taken.records)
                        await marks.mark(session, self._journal.id, taken.turn)
                    taken.sent = self._marked = True
                self._taken = None
                self._unwritten = [one for one in self._unwritten if one[0] > taken.turn]
            finally:
                if self._taken is not None and not self._taken.sent:
                    self._waiting = added_up([*self._taken.records, *self._waiting])
                    self._taken = None
                await moving.aclose()

    def _take(self) -> _Taken:
        """All that is not in the database is on its way there."""
        before = [] if self._taken is None else self._taken.records
        records = [*before, *self._waiting]
        if len(records) > MAX_WAITING:  # commits fail, or are not answered, one after another
            records = added_up(records)
        self._taken = _Taken(self._turn, records)
        self._waiting, self._turn = [], self._turn + 1
        return self._taken

    @property
    def _count(self) -> int:
        """How many records wait."""
        return len(self._waiting) + (len(self._taken.records) if self._taken else 0)

    def set_aside(self) -> int:
        """How many files of usage wait for an operator; reads a folder."""
        return set_aside(self._folder) if self._journals else 0

    async def adopt(self) -> None:
        """Writes what earlier processes on the data folder recorded and did not; logs what it cannot.

        What the database does not take now is tried again after ``start``.
        """
        self._leaves = False
        if not self._journals:
            return
        for left in left_behind(self._folder):
            try:
                await self._adopt(left)
            except (AdapterError, OSError) as error:
                self._leaves |= isinstance(error, AdapterError)
                logger.error(
                    "usage that an earlier process left cannot be written: %s (%s)", error, cause_of(error)
                )
            except Exception:  # of one row; a start must not end for it
                logger.exception("usage that an earlier process left cannot be written; it stays in its file")
            finally:
                left.close()

    async def _adopt(self, left: Left) -> None:
        lines = await asyncio.to_thread(left.lines)
        async with self._database.append() as session:
            written = await marks.written(session, left.id)
            unknown = not written and marks.outlived(left.changed)
            lost = [] if unknown else [record for turn, record in lines if turn > written]
            if lost:
                await _insert(session, lost)
                await marks.mark(session, left.id, max(turn for turn, _ in lines))
        if lost:
            logger.warning("wrote %d records of usage that an earlier process had no time for", len(lost))
        if unknown:
            aside = await asyncio.to_thread(left.set_aside)
            logger.error(
                "%s is usage of a process that ended more than %d days ago; whether it is in the database is"
                " not known any more, so it is not written", aside, marks.MARK_DAYS,
            )  # fmt: skip
        else:
            await asyncio.to_thread(left.remove)
        await marks.forget(self._database, left.id)

    async def _adopt_later(self) -> None:
        while self._leaves:
            await self._pause(ADOPT_AGAIN_S)
            if self._stopping.is_set():
                return
            await self.adopt()

    async def renew_mark(self) -> None:
        """Else that of a process without usage for months would be taken for a lost one's."""
        if self._marked:
            await marks.renew(self._database, self._journal.id)

    async def _journal_forever(self) -> None:
        """Keeps in the journal what is not in the database yet."""
        complained = False
        while not self._stopping.is_set():
            await self._noted.wait()
            well = await self._keep()
            if not well and not complained:
                logger.error("usage cannot be kept in %s until it is written", self._folder)
            complained = not well
            await self._pause(JOURNAL_INTERVAL_S if well else JOURNAL_AGAIN_S)

    async def _keep(self) -> bool:
        """False where the disk fails; then all of it is due again."""
        self._noted.clear()
        anew = self._journal.size > self._most
        records = self._unwritten
        if anew:
            taken = self._taken or _Taken(0, [])
            records = [(taken.turn, record) for record in taken.records]
            records += [(self._turn, record) for record in self._waiting]
        self._unwritten = []
        if not records and not anew:
            return True
        try:
            await run_in_thread(self._journal.rewrite if anew else self._journal.append, records)
        except Exception as error:
            if isinstance(error, OSError):  # said once, by whoever called
                logger.debug("the journal of usage: %s", error)
            else:
                logger.exception("the journal of usage fails")
            self._most = -1  # the next time
            self._noted.set()
            return False
        if anew:
            self._most = max(JOURNAL_BYTES, 4 * self._journal.size)
        return True

    async def spent(self, tenant: str, start: datetime, end: datetime) -> tuple[int, int]:
        """As the function of this name, with what has not been written yet, or cannot be at the moment."""
        async with self._moving:
            tokens, cost = await spent(self._database, tenant, start, end)
            mine = [*self._taken.records, *self._waiting] if self._taken else self._waiting
            waiting = [one for one in mine if one.tenant == tenant and start <= one.at < end]
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
                    logger.error(
                        "usage could not be written; %d records wait: %s (%s)",
                        self._count,
                        error,
                        cause_of(error),
                    )
                    self._complained = clock()
            except Exception:
                logger.exception("usage could not be written; %d records wait", self._count)
            took = clock() - began
            if not self._waiting and self._taken is None:
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
        await marks.forget_old(self._database)


async def _insert(session: AsyncSession, records: Sequence[Usage]) -> None:
    for first in range(0, len(records), ROWS_AT_ONCE):
        rows = [record.as_row() for record in records[first : first + ROWS_AT_ONCE]]
        await session.execute(insert(UsageRow), rows)


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


# What each row of ``usage`` has beside its groups.
TOTALS = tuple(_totals(dict.fromkeys(SUMS, 0)))
