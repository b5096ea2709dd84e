"""Limits and budgets that several processes share through Redis, with the arithmetic of
``server.limits.rate.Meter`` and ``server.limits.budget.Spending``.

    shared = SharedLimits(url); await shared.open()
    hold = await shared.admit(scopes, tokens)    all or none, in one script; raises Exceeded, Overspent,
                                                 Unavailable
    hold.use(tokens, freed); shared.end(hold)    never wait: a task of its own tells Redis

What is used is told once a second and at the end, and counts from when it is told: never less than it was.
A hold that its process stops renewing is given back after ``LEASE`` seconds. While Redis cannot be asked,
nothing is admitted; the task finds out when it is back, and tells it again what is held.

Of a day or a month that Redis knows nothing of, because it has just begun or Redis has lost its data, a
tenant's recorded usage is read once, by whoever is the first to ask. What runs at that moment is not in it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from adapters.database.rows import now as wall_now
from server.accounts.terms import PERIODS, Budgets, KeyLimits, Period, Unit
from server.errors import Unavailable
from server.limits.budget import Amount, Passed, Spending, began, ends
from server.limits.rate import Excess, Left

logger = logging.getLogger(__name__)

LEASE = 15.0
EVERY = 1.0
# Seconds that one question to Redis may take; on a machine that is full, hundreds at once take more than one.
PATIENCE = 3.0
CONNECTIONS = 32
# How long a day or a month is kept after its end, for what its last requests still tell.
KEPT = timedelta(days=1)
# Meters of which the last answer is kept, for headers.
REMEMBERED = 10_000

_FAILURES = (RedisError, OSError, TimeoutError)
_SCRIPT = Path(__file__).with_name("redis.lua").read_text()


@dataclass(frozen=True, slots=True)
class Scope:
    """``name`` is a tenant, or a tenant and its key; ``whose`` is what an error calls it."""

    name: str
    whose: str
    limits: KeyLimits


class Exceeded(Exception):
    def __init__(self, excess: Excess, whose: str) -> None:
        super().__init__(excess.limit)
        self.excess = excess
        self.whose = whose


@dataclass(frozen=True, slots=True)
class Purse:
    """A tenant's budgets. ``name`` is nobody else's, not even a later tenant's of the same id.

    ``spending`` is kept equal to what Redis says; ``recorded`` reads (tokens, cost) since a time from usage.
    """

    name: str
    budgets: Budgets
    spending: Spending
    recorded: Callable[[datetime], Awaitable[tuple[int, int]]]


class Overspent(Exception):
    def __init__(self, passed: Passed) -> None:
        super().__init__(passed.period)
        self.passed = passed


@dataclass(slots=True)
class Hold:
    """One request's place. ``used`` are tokens not yet told, ``reserved`` those that it may still use.

    ``used_cost`` and ``reserved_cost`` are the same in money, for a purse.
    """

    id: str
    scopes: Sequence[Scope]
    reserved: int
    used: int = 0
    ended: bool = False
    purse: Purse | None = None
    reserved_cost: int = 0
    used_cost: int = 0

    def use(self, tokens: int, freed: int, cost: int = 0, freed_cost: int = 0) -> None:
        self.used += tokens
        self.reserved -= freed
        self.used_cost += cost
        self.reserved_cost -= freed_cost


class SharedLimits:
    """``clock`` stands in for Redis's own, in tests. Raises ValueError for what is no Redis URL.

    Days and months are those of ``wall``, which is to be about the same in all processes.
    """

    def __init__(
        self,
        url: str,
        *,
        clock: Callable[[], float] | None = None,
        wall: Callable[[], datetime] = wall_now,
        lease: float = LEASE,
    ) -> None:
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                timeout=PATIENCE,
                socket_timeout=PATIENCE,
                socket_connect_timeout=PATIENCE,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError:
            raise ValueError("LORAPLEX_LIMITS_REDIS_URL must be redis://…, rediss://… or unix://…") from None
        self._redis = Redis.from_pool(pool)
        self._script = self._redis.register_script(_SCRIPT)
        self._clock = clock
        self._wall = wall
        self._lease = lease
        self._holds: dict[str, Hold] = {}
        self._left: dict[str, dict[str, Left]] = {}
        self._up = False
        self._ended: set[str] = set()
        self._telling = asyncio.Lock()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """OSError if Redis does not answer."""
        try:
            await self.check()
        except _FAILURES as exc:
            await self._redis.aclose()
            raise OSError(f"LORAPLEX_LIMITS_REDIS_URL: Redis does not answer ({type(exc).__name__})") from exc
        self._up = True
        self._task = asyncio.create_task(self._tell_always(), name="loraplex-shared-limits")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            try:
                await self._tell()
            except _FAILURES as exc:
                logger.warning("limits that were held are free in %s s: %s", self._lease, type(exc).__name__)
        await self._redis.aclose()

    async def check(self) -> None:
        async with asyncio.timeout(PATIENCE):
            await self._redis.ping()

    async def admit(
        self, scopes: Sequence[Scope], tokens: int, purse: Purse | None = None, cost: int = 0
    ) -> Hold:
        """Exceeded, Overspent, or Unavailable (``limits_unavailable``), without anything being reserved."""
        if not self._up:
            raise _unavailable()
        hold = Hold(secrets.token_hex(12), scopes, tokens, purse=purse, reserved_cost=cost)
        try:
            if self._ended:
                # Whoever asks right after an answer has its place back. Not cut short, lest it is told twice.
                await asyncio.shield(asyncio.ensure_future(self._tell(only_ended=True)))
            found = await self._run("admit", hold)
        except _FAILURES as exc:
            self._lost(exc)
            self._forget(hold)
            raise _unavailable() from exc
        except asyncio.CancelledError:
            self._forget(hold)
            raise
        if found:
            raise _refused(hold, found)
        self._holds[hold.id] = hold
        return hold

    async def more(self, hold: Hold, tokens: int, cost: int = 0) -> None:
        """Reserves so many more for ``hold``; raises as ``admit``. Waits its turn to tell Redis."""
        if not self._up:
            raise _unavailable()
        async with self._telling:
            used, used_cost = hold.used, hold.used_cost
            wanted = Hold(
                hold.id,
                hold.scopes,
                hold.reserved + tokens,
                used,
                purse=hold.purse,
                reserved_cost=hold.reserved_cost + cost,
                used_cost=used_cost,
            )
            try:
                found = await self._run("more", wanted)
            except _FAILURES as exc:
                self._lost(exc)
                raise _unavailable() from exc
            if found:
                raise _refused(hold, found)
            hold.use(-used, -tokens, -used_cost, -cost)
            if hold.ended:
                self._forget(hold)

    async def look(self, purse: Purse) -> None:
        """Brings ``purse.spending`` up to date; raises Unavailable as ``admit`` does."""
        if not self._up:
            raise _unavailable()
        try:
            await self._run("look", Hold("", (), 0, purse=purse))
        except _FAILURES as exc:
            self._lost(exc)
            raise _unavailable() from exc

    def end(self, hold: Hold) -> None:
        if hold.id not in self._holds:
            return  # told already
        hold.ended = True
        self._ended.add(hold.id)
        self._wake.set()

    def left(self, scope: Scope) -> dict[str, Left]:
        """As Redis last said it to this process, which for a request is when it was admitted or later."""
        return self._left.get(scope.name, {})

    def _forget(self, hold: Hold) -> None:
        """Redis may have reserved it nevertheless."""
        hold.reserved = hold.reserved_cost = 0
        self._holds[hold.id] = hold
        self.end(hold)

    async def _run(self, what: str, hold: Hold) -> list[bytes]:
        """Why not, or nothing."""
        keys: list[str] = []
        args: list[str | float] = [what, self._clock() if self._clock else 0, self._lease, hold.id]
        args += [hold.reserved, hold.used, hold.reserved_cost, hold.used_cost, len(hold.scopes)]
        for scope in hold.scopes:
            limits = scope.limits
            keys += [f"loraplex:{scope.name}:{part}" for part in ("requests", "tokens", "leases", "reserved")]
            args += [
                limits.requests_at_once or 0,
                limits.requests_per_minute or 0,
                limits.tokens_per_minute or 0,
            ]
        if hold.purse is None:
            return await self._ask(hold, keys, args)
        now = self._wall()
        found = await self._ask(hold, *_with_purse(keys, args, hold.purse, now, None))
        if found == [b"unknown"]:
            recorded = {period: await hold.purse.recorded(began(period, now)) for period in PERIODS}
            found = await self._ask(hold, *_with_purse(keys, args, hold.purse, now, recorded))
        return found

    async def _ask(self, hold: Hold, keys: list[str], args: list[str | float]) -> list[bytes]:
        async with asyncio.timeout(PATIENCE):
            refusal, states, spent = await self._script(keys=keys, args=args)
        for scope, state in zip(hold.scopes, states, strict=False):
            self._remember(scope, [float(number) for number in state])
        if spent and hold.purse is not None:
            amounts = [int(number) for number in spent]
            day, month, reserved = (Amount(*amounts[i : i + 2]) for i in (0, 2, 4))
            hold.purse.spending.learn(self._wall(), {"day": day, "month": month}, reserved)
        return cast("list[bytes]", refusal)

    def _remember(self, scope: Scope, state: list[float]) -> None:
        found = {}
        if (rate := scope.limits.requests_per_minute) is not None:
            found["requests"] = Left(rate, max(0, rate - int(state[0])), state[1])
        if (most := scope.limits.tokens_per_minute) is not None:
            found["tokens"] = Left(most, max(0, most - int(state[2])), state[3])
        self._left.pop(scope.name, None)
        self._left[scope.name] = found
        if len(self._left) > REMEMBERED:
            self._left.pop(next(iter(self._left)))

    async def _tell_always(self) -> None:
        while True:
            try:
                async with asyncio.timeout(EVERY):
                    await self._wake.wait()
                only_ended = self._up
            except TimeoutError:
                only_ended = False
            self._wake.clear()
            try:
                if not self._up:  # of many connections that broke together each would break a request
                    await self._redis.connection_pool.disconnect(inuse_connections=False)
                await self._tell(only_ended=only_ended)
                if not self._up:
                    await self.check()
                    self._up = True
                    logger.warning("Redis answers again: requests with limits are admitted")
            except Exception as exc:  # a defect, too, must not end what gives places back
                self._lost(exc)
                await asyncio.sleep(EVERY)

    async def _tell(self, *, only_ended: bool = False) -> None:
        """Told twice where an answer is lost: what is used then counts twice, never too little."""
        async with self._telling:
            holds = [self._holds[id_] for id_ in (list(self._ended) if only_ended else list(self._holds))]
            for start in range(0, len(holds), CONNECTIONS // 2):
                some = holds[start : start + CONNECTIONS // 2]
                for result in await asyncio.gather(*map(self._tell_one, some), return_exceptions=True):
                    if isinstance(result, BaseException):
                        raise result

    async def _tell_one(self, hold: Hold) -> None:
        used, used_cost, ended = hold.used, hold.used_cost, hold.ended
        await self._run("end" if ended else "renew", hold)
        hold.use(-used, 0, -used_cost)
        if ended:
            del self._holds[hold.id]
            self._ended.discard(hold.id)

    def _lost(self, exc: BaseException) -> None:
        if self._up:
            unexpected = None if isinstance(exc, _FAILURES) else exc
            logger.error("Redis does not answer, requests with limits get 503: %r", exc, exc_info=unexpected)
        self._up = False


def _with_purse(
    keys: list[str],
    args: list[str | float],
    purse: Purse,
    now: datetime,
    recorded: dict[Period, tuple[int, int]] | None,
) -> tuple[list[str], list[str | float]]:
    keys = keys + [f"loraplex:{purse.name}:budget:{part}" for part in ("leases", "tokens", "cost")]
    args = list(args)
    for period in PERIODS:
        budget = getattr(purse.budgets, period)
        keys.append(f"loraplex:{purse.name}:budget:{period}:{began(period, now):%Y-%m-%d}")
        for unit in ("tokens", "cost"):
            limit = None if budget is None else budget.limit(unit, soft=False)
            args.append(-1 if limit is None else limit)
        args += recorded[period] if recorded is not None else (-1, -1)
        args.append(int((ends(period, now) + KEPT - now).total_seconds()))
    return keys, args


def _refused(hold: Hold, found: list[bytes]) -> Exceeded | Overspent:
    if found[0] == b"budget":
        period, unit = (found[i].decode() for i in (1, 2))
        return Overspent(Passed(cast("Period", period), cast("Unit", unit), int(found[3]), int(found[4])))
    index, limit, allowed, asked, wait, never = found
    excess = Excess(limit.decode(), int(allowed), int(asked), float(wait), never == b"1")
    return Exceeded(excess, hold.scopes[int(index)].whose)


def _unavailable() -> Unavailable:
    return Unavailable(
        "Your limits cannot be looked up at the moment. Try again shortly.",
        code="limits_unavailable",
        retry_after=2.0,
    )
