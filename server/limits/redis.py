"""Limits and budgets that several processes count together in Redis, by one script (``redis.lua``).

The script does the arithmetic of ``rate.RateMeter`` and ``budget.Spending``; the tests compare them.
Reserving waits for Redis. What is used is only noted here, and a task of the ledger's own reports it: once a
second, and at the end of each request. It counts from the report on, so a window never holds less than was
used.

A request whose process has not renewed it for ``LEASE_S`` seconds is taken for dead, and what it had reserved
is free. While Redis does not answer, nothing with limits is admitted; the task notices when Redis is back and
reports again what is reserved.

Redis may know nothing of a day or a month, because it has just begun or because Redis has lost its data. Then
the first request that asks reads the tenant's recorded usage. Requests that run at that moment are not in it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from adapters.awake import AwakeTimeout
from adapters.database.rows import now as wall_now
from server.accounts.terms import PERIODS, UNITS, Budget, Period, Unit
from server.limits.budget import Amount, BudgetExceeded, Spending, period_end, period_start
from server.limits.errors import limits_unavailable
from server.limits.ledger import PLACES, SWEEP_EVERY, Entry, Refused, Scope, TenantBudget
from server.limits.line import FAR_S, Waits
from server.limits.rate import GRAIN_S, WINDOW_S, LimitExceeded, Remaining

logger = logging.getLogger(__name__)

LEASE_S = 15.0
REPORT_INTERVAL_S = 1.0
RETRY_S = 0.2  # between two attempts while Redis does not answer
# One question to Redis may take so long; on a machine that is full, hundreds at once take more than a second.
TIMEOUT_S = 3.0
# The client's own, which knows nothing of a process that stood still: for what is not within ``TIMEOUT_S``.
_SOCKET_TIMEOUT_S = 4 * TIMEOUT_S
CONNECTIONS = 32
# How long a day or a month is kept after its end, for what its last requests still report.
KEEP_PERIOD = timedelta(days=1)
# Scopes of which the last answer is kept, for headers.
REMEMBERED_SCOPES = 10_000

_FAILURES = (RedisError, OSError, TimeoutError)
_NO_BUDGET = TenantBudget.none("none")
_SCRIPT = Path(__file__).with_name("redis.lua").read_text()


class RedisLedger:
    """A ``Ledger`` for all processes with this ``url``. ValueError if that is no URL of a Redis.

    ``clock`` replaces Redis's own clock, in tests. Days and months are those of ``wall``, which all processes
    should agree on. ``lease`` is in seconds. ``outage`` says in the log what happens without Redis.
    """

    def __init__(
        self,
        url: str,
        *,
        clock: Callable[[], float] | None = None,
        wall: Callable[[], datetime] = wall_now,
        lease: float = LEASE_S,
        outage: str = "requests with limits get 503",
    ) -> None:
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                timeout=_SOCKET_TIMEOUT_S,
                socket_timeout=_SOCKET_TIMEOUT_S,
                socket_connect_timeout=_SOCKET_TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError:
            raise ValueError("LORAPLEX_LIMITS_REDIS_URL must be redis://…, rediss://… or unix://…") from None
        self._redis = Redis.from_pool(pool)
        self._script = self._redis.register_script(_SCRIPT)
        self._clock = clock
        self._wall = wall
        self._lease = lease
        self._outage = outage
        self._entries: dict[str, Entry] = {}
        self._closed: set[str] = set()  # entries whose end Redis does not know yet
        self._remaining: dict[str, dict[str, Remaining]] = {}
        self._spending: dict[str, Spending] = {}
        self._reading: dict[tuple[str, datetime], asyncio.Future[Amount]] = {}
        self._reservations = 0
        self._up = False
        self._reporting = asyncio.Lock()
        self._report_now = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Starts reporting. OSError if Redis does not answer."""
        try:
            await self.check()
        except _FAILURES as exc:
            await self._redis.aclose()
            raise OSError(f"LORAPLEX_LIMITS_REDIS_URL: Redis does not answer ({type(exc).__name__})") from exc
        self._up = True
        self._task = asyncio.create_task(self._report_forever(), name="loraplex-redis-ledger")

    async def stop(self) -> None:
        """Reports for the last time, if Redis answers, and closes the connections."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            try:
                await self._report()
            except _FAILURES as exc:
                logger.warning("limits that were held are free in %s s: %s", self._lease, type(exc).__name__)
        await self._redis.aclose()

    async def check(self) -> None:
        """Raises what keeps Redis from answering."""
        async with AwakeTimeout(TIMEOUT_S):
            await self._redis.ping()

    @property
    def up(self) -> bool:
        """Whether Redis answered when it was asked last."""
        return self._up

    def owe(self, scopes: Sequence[Scope], budget: TenantBudget) -> Entry:
        """An entry that Redis never admitted and that has ended; what it uses is reported with ``close``."""
        entry = Entry(scopes, budget, Amount(), closed=True, id=secrets.token_hex(12))
        self._entries[entry.id] = entry
        self._closed.add(entry.id)
        return entry

    def owes(self, entry: Entry) -> bool:
        """Whether a report of ``entry`` is still to come."""
        return entry.id in self._entries

    async def refresh(self, budget: TenantBudget) -> None:
        """See ``Ledger.refresh``; asks Redis each time."""
        if budget.budgets is None:
            return
        try:
            self._check_up()
            await self._run("refresh", Entry((), budget, Amount()))
        except _FAILURES as exc:
            self._lost(exc)
            raise limits_unavailable() from exc

    async def reserve(
        self, scopes: Sequence[Scope], budget: TenantBudget, amount: Amount, waits: Waits | None = None
    ) -> Entry:
        """See ``Ledger.reserve``. Does not ask Redis where nothing has to be counted."""
        entry = Entry(scopes, budget, amount, id=waits.id if waits is not None else secrets.token_hex(12))
        if not scopes and budget.budgets is None:
            return entry
        self._check_up()
        try:
            if self._closed:
                # Who asks right after an answer has its place back. Not cut short, or it would count twice.
                await asyncio.shield(asyncio.ensure_future(self._report(only_closed=True)))
            refusal = await self._run("reserve", entry, waits)
        except _FAILURES as exc:
            self._lost(exc)
            self._abandon(entry)
            raise limits_unavailable() from exc
        except asyncio.CancelledError:
            self._abandon(entry)
            raise
        if refusal:
            raise _refused(entry, refusal)
        self._entries[entry.id] = entry
        self._reservations += 1
        if self._reservations % SWEEP_EVERY == 0:
            self.sweep()
        return entry

    def leave(self, scope: Scope, waits: Waits) -> None:
        """See ``Ledger.leave``; reported at once, and not without Redis: what it holds of a line expires."""
        if self._up and waits.id not in self._entries:
            self._abandon(Entry([scope], _NO_BUDGET, Amount(), id=waits.id))

    async def change(self, entry: Entry, more: Amount, whole: int) -> None:
        """See ``Ledger.change``. What is given back only is reported later."""
        if more.tokens <= 0 and more.cost <= 0:
            self.use(entry, Amount(), -more)
        elif entry.scopes or entry.budget.budgets is not None:
            await self._reserve_more(entry, more)
        else:
            entry.reserved += more

    async def _reserve_more(self, entry: Entry, more: Amount) -> None:
        self._check_up()
        async with self._reporting:  # what is used may not be reported by two at once
            used = entry.used
            wanted = Entry(entry.scopes, entry.budget, entry.reserved + more, used, id=entry.id)
            try:
                refusal = await self._run("change", wanted)
            except _FAILURES as exc:
                self._lost(exc)
                raise limits_unavailable() from exc
            if refusal:
                raise _refused(entry, refusal)
            entry.used -= used
            entry.reserved += more
            if entry.closed:
                self._abandon(entry)

    def use(self, entry: Entry, used: Amount, freed: Amount) -> None:
        """See ``Ledger.use``; reported within a second."""
        entry.used += used
        entry.reserved -= freed
        if entry.budget.budgets is not None:
            spending = self.spending(entry.budget)
            spending.reserved -= freed
            spending.add(used, self._wall())

    def close(self, entry: Entry) -> None:
        """See ``Ledger.close``; reported at once."""
        entry.closed = True
        if entry.id in self._entries:
            self._closed.add(entry.id)
            self._report_now.set()

    def remaining(self, scope: Scope) -> dict[str, Remaining]:
        """What Redis said last to this process: for a request, when it was admitted or later."""
        return self._remaining.get(scope.name, {})

    def spending(self, budget: TenantBudget) -> Spending:
        """What Redis said last, and what this process counted since then."""
        return self._spending.setdefault(budget.name, Spending())

    def sweep(self) -> None:
        """Forgets what Redis said of months that are over."""
        now = self._wall()
        self._spending = {name: kept for name, kept in self._spending.items() if not kept.outdated(now)}

    def _abandon(self, entry: Entry) -> None:
        """Closes an entry that Redis may or may not have reserved."""
        entry.reserved = Amount()
        self._entries[entry.id] = entry
        self.close(entry)

    def _check_up(self) -> None:
        if not self._up:
            raise limits_unavailable()

    async def _run(self, command: str, entry: Entry, waits: Waits | None = None) -> list[bytes]:
        """Why Redis refuses, or nothing. Reads recorded usage where Redis needs it."""
        keys, args = self._arguments(command, entry, waits)
        if entry.budget.budgets is None:
            return await self._ask(entry, keys, args)
        now = self._wall()
        found = await self._ask(entry, *_with_budget(keys, args, entry.budget, now, None))
        if found == [b"unknown"]:
            known = await asyncio.gather(*(self._recorded(entry.budget, period, now) for period in PERIODS))
            recorded = dict(zip(PERIODS, known, strict=True))
            found = await self._ask(entry, *_with_budget(keys, args, entry.budget, now, recorded))
        return found

    async def _recorded(self, budget: TenantBudget, period: Period, now: datetime) -> Amount:
        """What is on record of a period, read once for all who ask meanwhile: after an outage all ask."""
        since = period_start(period, now)
        reading = self._reading.get((budget.name, since))
        if reading is None:
            reading = asyncio.ensure_future(budget.recorded(since, self._wall()))
            self._reading[budget.name, since] = reading
            reading.add_done_callback(partial(self._read, budget.name, since))
        return await asyncio.shield(reading)

    def _read(self, name: str, since: datetime, reading: asyncio.Future[Amount]) -> None:
        del self._reading[name, since]
        if not reading.cancelled():
            reading.exception()  # whoever still waits raises it

    def _arguments(
        self, command: str, entry: Entry, waits: Waits | None
    ) -> tuple[list[str], list[str | float]]:
        """Keys and arguments of the script, without those of the budget."""
        keys: list[str] = []
        args: list[str | float] = [command, self._clock() if self._clock else 0, WINDOW_S, GRAIN_S]
        args += [self._lease, entry.id, entry.reserved.tokens, entry.used.tokens]
        args += [entry.reserved.cost, entry.used.cost, len(entry.scopes)]
        args += [-1, 0, FAR_S] if waits is None else [waits.waited, waits.again, FAR_S]
        for scope in entry.scopes:
            limits = scope.limits
            # Of a place only whether it is taken, and who waits for it.
            counted, first = (-1, "line") if scope.whose == PLACES else (0, "requests")
            keys += [f"loraplex:{scope.name}:{part}" for part in (first, "tokens", "leases", "reserved")]
            args += [
                limits.requests_at_once or 0,
                limits.requests_per_minute or counted,
                limits.tokens_per_minute or 0,
            ]
        return keys, args

    async def _ask(self, entry: Entry, keys: list[str], args: list[str | float]) -> list[bytes]:
        async with AwakeTimeout(TIMEOUT_S):
            refusal, states, spent = await self._script(keys=keys, args=args)
        for scope, state in zip(entry.scopes, states, strict=False):
            self._remember(scope, [float(number) for number in state])
        if spent:
            amounts = [int(number) for number in spent]
            day, month, reserved = (Amount(*amounts[i : i + 2]) for i in (0, 2, 4))
            spending = self.spending(entry.budget)
            spending.set_from_store(self._wall(), {"day": day, "month": month}, reserved)
        return cast("list[bytes]", refusal)

    def _remember(self, scope: Scope, state: list[float]) -> None:
        found = {}
        if (rate := scope.limits.requests_per_minute) is not None:
            found["requests"] = Remaining(rate, max(0, rate - int(state[0])), state[1])
        if (most := scope.limits.tokens_per_minute) is not None:
            found["tokens"] = Remaining(most, max(0, most - int(state[2])), state[3])
        self._remaining.pop(scope.name, None)
        self._remaining[scope.name] = found
        if len(self._remaining) > REMEMBERED_SCOPES:
            self._remaining.pop(next(iter(self._remaining)))

    async def _report_forever(self) -> None:
        while True:
            only_closed = await self._next_report()
            try:
                if not self._up:  # connections that broke together would each break one more request
                    await self._redis.connection_pool.disconnect(inuse_connections=False)
                await self._report(only_closed=only_closed)
                if not self._up:
                    await self.check()
                    self._up = True
                    logger.warning("Redis answers again: it counts limits and budgets")
            except Exception as exc:  # a defect, too, must not end what gives places back
                self._lost(exc)

    async def _next_report(self) -> bool:
        """Waits for the time of the next report; whether it is only of what has ended."""
        if not self._up:
            await asyncio.sleep(RETRY_S)
            self._report_now.clear()
            return False
        try:
            async with asyncio.timeout(REPORT_INTERVAL_S):
                await self._report_now.wait()
            return self._up
        except TimeoutError:
            return False
        finally:
            self._report_now.clear()

    async def _report(self, *, only_closed: bool = False) -> None:
        """Renews what is reserved, and reports what was used and what has ended.

        At least once: where Redis's answer is lost, the next report counts the same use again.
        """
        async with self._reporting:
            entries = [self._entries[id_] for id_ in (list(self._closed if only_closed else self._entries))]
            for start in range(0, len(entries), CONNECTIONS // 2):
                some = entries[start : start + CONNECTIONS // 2]
                for result in await asyncio.gather(*map(self._report_one, some), return_exceptions=True):
                    if isinstance(result, BaseException):
                        raise result

    async def _report_one(self, entry: Entry) -> None:
        used, closed = entry.used, entry.closed
        await self._run("close" if closed else "renew", entry)
        entry.used -= used
        if closed and not entry.used:
            del self._entries[entry.id]
            self._closed.discard(entry.id)

    def _lost(self, exc: BaseException) -> None:
        if self._up:
            unexpected = None if isinstance(exc, _FAILURES) else exc
            logger.error("Redis does not answer, %s: %r", self._outage, exc, exc_info=unexpected)
        self._up = False
        self._report_now.set()  # which finds out whether it was one connection, or Redis


def _with_budget(
    keys: list[str],
    args: list[str | float],
    budget: TenantBudget,
    now: datetime,
    recorded: dict[Period, Amount] | None,
) -> tuple[list[str], list[str | float]]:
    """Keys and arguments with those of the budget; ``recorded`` where Redis does not know what was used."""
    keys = keys + [f"loraplex:{budget.name}:budget:{part}" for part in ("leases", "tokens", "cost")]
    args = list(args)
    for period in PERIODS:
        limits: Budget | None = getattr(budget.budgets, period)
        keys.append(f"loraplex:{budget.name}:budget:{period}:{period_start(period, now):%Y-%m-%d}")
        for unit in UNITS:
            limit = None if limits is None else limits.limit(unit, soft=False)
            args.append(-1 if limit is None else limit)
        known = recorded[period] if recorded is not None else Amount(-1, -1)
        args += (known.tokens, known.cost)
        args.append(int((period_end(period, now) + KEEP_PERIOD - now).total_seconds()))
    return keys, args


def _refused(entry: Entry, answer: list[bytes]) -> Refused:
    """From the script's words."""
    if answer[0] == b"budget":
        period, unit = (answer[i].decode() for i in (1, 2))
        limit, used = int(answer[3]), int(answer[4])
        return Refused(BudgetExceeded(cast("Period", period), cast("Unit", unit), limit, used))
    index, name, allowed, asked, wait, never = answer
    exceeded = LimitExceeded(name.decode(), int(allowed), int(asked), float(wait), never == b"1")
    return Refused(exceeded, entry.scopes[int(index)].whose)
