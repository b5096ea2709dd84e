"""The replicas that a gateway knows, how they are, and the connections to them.

Rows of the database say which there are; what each says of itself every second says how it is. One that says
nothing for ``stall`` seconds counts as hung: it gets nothing more, and what it had goes on elsewhere. Seconds
in which this process could not listen itself do not count (``adapters.awake``).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp

from adapters.awake import AwakeClock
from adapters.errors import AdapterError
from adapters.model import Tier, Version
from adapters.store.replicas import Replicas
from server.errors import ServerError, Unavailable
from server.fleet.facts import Facts, common, facts_of
from server.fleet.lines import CONNECT_TIMEOUT_S, KEEP_ALIVE_S, Line, Lines, Lost
from server.fleet.placement import Move, Placement, Rules
from server.fleet.reports import Report
from server.fleet.wire import OPEN, PREFIX, as_json, error_of
from server.logs import REQUEST
from server.metrics import Metrics

logger = logging.getLogger(__name__)

# Replicas announce themselves every 2 s. While none is ready a new one is looked for more often: a look by
# SQL costs as much as twenty tokens of a stream.
DISCOVER_EVERY_S, MISSED_EVERY_S = 2.0, 0.5
# At most; several times before one that says nothing counts as hung.
ASK_EVERY_S, ASKED_BEFORE_HUNG = 1.0, 5
TICKS_IN_STALL = 20  # how finely the own pauses are told from a replica's silence
# How often adapters are loaded where nobody waits for them yet, and for how long such a load may look for
# room.
MOVE_EVERY_S, MOVE_TIMEOUT_S = 0.2, 10.0
VERSIONS_REMEMBERED = 16_384
CALL_TIMEOUT_S = 150.0  # of what needs the engine: probes wait for their turn


class Unreachable(Exception):
    """A replica could not be asked, or did not answer as a replica does."""


class Replaced(Unreachable):
    """Another process answers where a replica was: that one has ended."""


class Moves(Protocol):
    """What runs at a replica; see ``server.fleet.remote.RemoteCall``."""

    def lose(self) -> None: ...


@dataclass(slots=True, eq=False)
class Known:
    """A replica. ``heard`` is when it last answered; ``said`` what, and ``served`` what each tenant that has
    requests there has been charged for; ``queued`` and ``running`` count those, by tenant.
    """

    id: str
    url: str
    heard: float
    facts: Facts | None = None
    said: Mapping[str, Any] = field(default_factory=dict)
    served: Mapping[str, float] = field(default_factory=dict)
    queued: Mapping[str, int] = field(default_factory=dict)
    running: Mapping[str, int] = field(default_factory=dict)
    backlog: float = 0.0
    lost: bool = False
    calls: set[Moves] = field(default_factory=set)
    asked: set[asyncio.Timeout] = field(default_factory=set)  # who waits for an answer of its own
    watching: asyncio.Task[None] | None = None


class Directory:
    """``start`` before the first request, ``stop`` after the last."""

    def __init__(self, rows: Replicas, metrics: Metrics, *, key: str, stall: float) -> None:
        # Who has been silent for too long is said here, where pauses of this process are known.
        self.placement = Placement(Rules(stale=math.inf))
        self._rows = rows
        self._metrics = metrics
        self._headers = {"Authorization": f"Bearer {key}"}
        self._stall = stall
        self._clock = AwakeClock(stall / TICKS_IN_STALL)
        self._known: dict[str, Known] = {}
        self._facts: Facts | None = None
        self._session: aiohttp.ClientSession | None = None
        self._lines = Lines(self._headers)
        self._ticking: asyncio.Task[None] | None = None
        self._discovering: asyncio.Task[None] | None = None
        self._moving: asyncio.Task[None] | None = None
        self._moves: set[asyncio.Task[None]] = set()
        self._versions: OrderedDict[str, Version] = OrderedDict()  # the longest unused first

    async def start(self) -> None:
        """Knows every replica that answers within a moment when it returns."""
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=self._headers, read_bufsize=1 << 18
        )
        self._ticking = asyncio.create_task(self._clock.run(), name="loraplex-awake")
        with suppress(Exception):  # the database is asked again
            await self._discover()
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                while self._known and not any(one.said for one in self._known.values()):
                    await asyncio.sleep(0.02)
        self._discovering = asyncio.create_task(self._discover_forever(), name="loraplex-discover")
        self._moving = asyncio.create_task(self._move_forever(), name="loraplex-move")

    async def stop(self) -> None:
        """Closes every connection."""
        tasks = [one.watching for one in self._known.values() if one.watching is not None]
        own = (self._ticking, self._discovering, self._moving)
        tasks += [task for task in own if task is not None]
        tasks += self._moves
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
        self._lines.close()

    # --- what is known -------------------------------------------------------------------------------

    @property
    def facts(self) -> Facts:
        """What the ready replicas have in common, and the last ones where none is.

        Unavailable (``no_replica``) until one was heard of.
        """
        if self._facts is None:
            raise self.nobody()
        return self._facts

    def nobody(self) -> Unavailable:
        """The refusal of a request that no replica can take."""
        return Unavailable(
            "No replica can answer now; try again in a moment.", code="no_replica", retry_after=5
        )

    async def check(self) -> None:
        """Unavailable unless a replica is ready."""
        if not self.placement.ready(self._now()):
            raise self.nobody()

    def all(self) -> list[Known]:
        """All replicas by id, lost ones too."""
        return sorted(self._known.values(), key=lambda one: one.id)

    def ready(self) -> list[Known]:
        """The replicas that may be sent requests."""
        return [self._known[id_] for id_ in self.placement.ready(self._now()) if id_ in self._known]

    def is_lost(self, replica: Known) -> bool:
        """Whether it was silent, or could not be reached, when it was last asked."""
        return replica.lost

    def tier_of(self, key: str) -> Tier:
        """The fastest tier that a version is in at any replica."""
        tier = Tier.DISK
        for one in self._known.values():
            if not one.lost and key in one.said.get("in_slots", ()):
                return Tier.GPU
            if not one.lost and key in one.said.get("in_host", ()):
                tier = Tier.HOST
        return tier

    def choose(self, version: Version | None, tried: set[str], like: str | None = None) -> Known | None:
        """The best replica for ``version`` beside those in ``tried``; of the kind of ``like``."""
        key = version.key if version is not None else None
        for id_ in self.placement.candidates(key, self._now(), like=like):
            if id_ not in tried and id_ in self._known:
                return self._known[id_]
        return None

    def choose_for_upload(self, tenant: str, name: str) -> Known | None:
        """Where a new version is tried, and stays in memory: spread as adapters are, where there is room."""
        for id_ in self.placement.candidates(f"{tenant}/{name}", self._now()):
            if id_ in self._known:
                return self._known[id_]
        return None

    def uploaded(self, replica: Known, key: str) -> None:
        """It was tried at ``replica``, and is in memory there."""
        self.placement.loaded(self._now(), key, replica.id)

    def sent(self, replica: Known, version: Version | None, call: Moves) -> None:
        """``call`` is now at ``replica``; tell ``ended`` of it."""
        key = version.key if version is not None else None
        self._metrics.placed(self._tier_at(replica, key))
        if version is not None:
            self._versions[version.key] = version
            self._versions.move_to_end(version.key)
            if len(self._versions) > VERSIONS_REMEMBERED:
                self._versions.popitem(last=False)
        self.placement.sent(self._now(), key, replica.id)
        replica.calls.add(call)

    def ended(self, replica: Known, version: Version | None, call: Moves) -> None:
        """``call`` has left ``replica``, in any way."""
        replica.calls.discard(call)
        self.placement.ended(version.key if version is not None else None, replica.id)

    def served_elsewhere(self, tenant: str, replica: Known) -> float:
        """What all others have served ``tenant``; see ``server.scheduling.fair_queue``."""
        others = (one for one in self._known.values() if one is not replica and not one.lost)
        return sum(one.served.get(tenant, 0.0) for one in others)

    @staticmethod
    def _tier_at(replica: Known, key: str | None) -> Tier:
        if key is None or key in replica.said.get("in_slots", ()):
            return Tier.GPU
        return Tier.HOST if key in replica.said.get("in_host", ()) else Tier.DISK

    # --- asking --------------------------------------------------------------------------------------

    async def order(self, replica: Known, body: bytes) -> Line:
        """Sends an order; its frames come on what is returned, which ``done`` takes back.

        Raises as ``stream``.
        """
        try:
            async with self.while_heard(replica):
                line = await self._lines.order(replica.url, OPEN, body, _traced())
                if line.status == 200:
                    return line
                try:
                    told = json.loads(await line.refusal())
                finally:
                    self._lines.release(line)
        except (Lost, OSError, ValueError) as exc:
            raise Unreachable(f"{type(exc).__name__}: {exc}") from exc
        raise _refusal(line.status, told)

    def done(self, line: Line) -> None:
        """Whatever ``order`` was answered has been read."""
        self._lines.release(line)

    async def stream(
        self, replica: Known, path: str, body: bytes | AsyncIterator[bytes]
    ) -> aiohttp.ClientResponse:
        """The answer's head; the body is read by the caller. Unreachable where there is none.

        What is refused with a status and an error is raised.
        """
        assert self._session is not None
        try:
            async with self.while_heard(replica):
                response = await self._session.post(replica.url + path, data=body, headers=_traced())
                if response.status == 200:
                    return response
                told = await response.json(content_type=None)
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            raise Unreachable(f"{type(exc).__name__}: {exc}") from exc
        raise _refusal(response.status, told)

    @asynccontextmanager
    async def while_heard(self, replica: Known) -> AsyncIterator[None]:
        """Unreachable as soon as ``replica`` is silent: the kernel takes connections for one that is hung."""
        if replica.lost:
            raise Unreachable("it was not heard of lately")
        limit = asyncio.timeout(None)
        replica.asked.add(limit)
        try:
            async with limit:
                yield
        except TimeoutError as exc:
            if limit.expired():
                raise Unreachable("it is silent") from exc
            raise
        finally:
            replica.asked.discard(limit)

    async def post(self, replica: Known, path: str, sent: Any) -> dict[str, Any]:
        """The JSON that ``replica`` answers. Raises its errors, and Unavailable where it cannot be asked."""
        try:
            return await self._told(replica, path, json.dumps(sent).encode())
        except Unreachable as exc:
            raise _no_answer() from exc

    async def ask(self, path: str, sent: Any, version: Version | None = None) -> dict[str, Any]:
        """As ``post``, of the best replica for ``version``, or the next one that answers. For what may be
        asked twice. Unavailable (``no_replica``).
        """
        body, tried = json.dumps(sent).encode(), set[str]()
        while (replica := self.choose(version, tried)) is not None:
            try:
                return await self._told(replica, path, body)
            except Unreachable as exc:
                logger.warning("replica %s does not answer: %s", replica.id, exc)
                tried.add(replica.id)
        raise _no_answer() if tried else self.nobody()

    async def _told(self, replica: Known, path: str, body: bytes) -> dict[str, Any]:
        """The JSON that ``replica`` answers. Raises its errors and Unreachable."""
        try:
            async with self.while_heard(replica), asyncio.timeout(CALL_TIMEOUT_S):
                response = await self.stream(replica, f"{PREFIX}/{path}", body)
                answer: dict[str, Any] = await response.json(content_type=None)
            return answer
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as exc:
            raise Unreachable(f"{type(exc).__name__}: {exc}") from exc

    # --- loads without a request ---------------------------------------------------------------------

    async def _move_forever(self) -> None:
        while True:
            await asyncio.sleep(MOVE_EVERY_S)
            for move in self.placement.moves(self._now()):
                if move.version in self._versions:
                    task = asyncio.create_task(self._move(move), name="loraplex-move")
                    self._moves.add(task)
                    task.add_done_callback(self._moves.discard)

    async def _move(self, move: Move) -> None:
        """Has a version loaded where more of its requests are to go. What fails is tried again, or not
        needed.
        """
        replica, version = self._known.get(move.replica), self._versions[move.version]
        try:
            if replica is not None:
                asked = {"version": as_json(version), "slot": True, "timeout": MOVE_TIMEOUT_S}
                await self.post(replica, "warm", asked)
                self._metrics.moved_adapter()
                self.placement.loaded(self._now(), move.version, move.replica)
        except (ServerError, AdapterError) as exc:
            logger.info("%s is not loaded at replica %s: %s", move.version, move.replica, exc)

    # --- watching ------------------------------------------------------------------------------------

    async def _discover_forever(self) -> None:
        while True:
            try:
                await self._discover()
            except Exception as exc:  # the database may be away for a while; what is known stays known
                logger.warning("the replicas cannot be read: %s", exc)
            await asyncio.sleep(DISCOVER_EVERY_S if self.ready() else MISSED_EVERY_S)

    async def _discover(self) -> None:
        rows = {row.id: row for row in await self._rows.all()}
        for id_, row in rows.items():
            if id_ not in self._known:
                one = self._known[id_] = Known(id_, row.url, self._now())
                one.watching = asyncio.create_task(self._watch(one), name=f"loraplex-watch-{id_}")
        for id_ in self._known.keys() - rows.keys():
            one = self._known[id_]
            if not one.calls:
                assert one.watching is not None
                one.watching.cancel()
                self.placement.forget(id_)
                del self._known[id_]
                self._compare()

    async def _watch(self, one: Known) -> None:
        every = min(ASK_EVERY_S, self._stall / ASKED_BEFORE_HUNG)
        while True:
            asked = self._now()
            # It ends when the replica counts as silent, whenever it was asked.
            within = max(0.1, min(self._stall, one.heard + self._stall + 0.05 - asked))
            within = self._stall if one.lost else within
            try:
                await self._hear(one, within)
            except Exception as exc:  # whatever it is, it is no answer
                gone = isinstance(exc, aiohttp.ClientConnectorError | Replaced)
                if not one.lost and (gone or self._is_silent(one)):
                    self._lose(one, exc)
            await asyncio.sleep(max(0.1, asked + every - self._now()))

    def _is_silent(self, one: Known) -> bool:
        return self._now() - one.heard > self._stall

    async def _hear(self, one: Known, within: float) -> None:
        assert self._session is not None
        timeout = aiohttp.ClientTimeout(total=within)
        async with self._session.get(f"{one.url}{PREFIX}/state", timeout=timeout) as response:
            if response.status != 200:
                raise Unreachable(f"status {response.status}")
            said = await response.json(content_type=None)
        if said.get("id", one.id) != one.id:  # an older replica does not say
            raise Replaced(f"{said['id']} answers there")
        if one.facts is None:
            one.facts = facts_of(said["facts"])
        report = Report.of(one.id, said["report"], one.facts.capacity.host_slots, said.get("backlog", 0.0))
        if one.lost:
            logger.info("replica %s is back", one.id)
        changed = one.lost or one.said.get("state") != report.state
        one.heard, one.lost, one.said = self._now(), False, said["report"]
        one.served, one.backlog = said.get("served", {}), report.backlog
        one.queued, one.running = said.get("queued", {}), said.get("running", {})
        self.placement.beat(self._now(), report)
        if changed:
            self._compare()

    def _lose(self, one: Known, why: Exception) -> None:
        one.lost = True
        logger.warning("replica %s at %s is lost: %s", one.id, one.url, type(why).__name__)
        self.placement.lost(one.id)
        self._compare()
        for call in list(one.calls):
            call.lose()
        for limit in one.asked:
            limit.reschedule(0.0)

    def _compare(self) -> None:
        """``facts`` anew, since a replica came, went or has another state."""
        there = self.ready() or [one for one in self.all() if not one.lost]
        if told := [one.facts for one in there if one.facts is not None]:
            self._facts = common(told)

    def _now(self) -> float:
        return self._clock.now()


def _traced() -> dict[str, str]:
    """Headers by which what a replica logs and traces is found by the trace of this request."""
    ids = REQUEST.get()
    return {"traceparent": ids.traceparent} if ids is not None and ids.traceparent else {}


def _refusal(status: int, told: Any) -> Exception:
    """What ``told``, the JSON of an answer with another status than 200, is to be raised as."""
    if "loraplex_error" in told:
        return error_of(told["loraplex_error"])
    return Unreachable(f"it answers with status {status}: {str(told)[:200]}")


def _no_answer() -> Unavailable:
    return Unavailable("The replica did not answer; try again.", code="replica_lost", retry_after=1)


def cannot_go_on() -> Unavailable:
    """The end of an answer that no other replica can continue."""
    return Unavailable(
        "The replica that answered is gone, and the answer cannot go on; send the request again.",
        code="replica_lost",
        retry_after=1,
    )
