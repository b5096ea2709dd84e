"""A replica answers: ``server.inference.completion.Answers`` over the wire, and from one replica to the next.

    call = RemoteCall(…)      one order; it is the work of its lease
    await call.begin()        until a replica has a place for it: every refusal that is not the engine's own
    async for text in call.chunks()    the answer; goes on elsewhere where its replica dies, hangs or stops

What a replica has said is handed on as it comes. Where it breaks off, another replica of the same kind is
asked with the tokens so far, and what it says of those is thrown away.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Literal

from cachetools import LRUCache

from adapters.errors import AdapterError
from adapters.model import BaseModel, Version
from server.errors import ServerError, Unavailable
from server.fleet.directory import Directory, Known, Unreachable, cannot_go_on
from server.fleet.lines import Frame, Line, Lost
from server.fleet.places import Place, Places
from server.fleet.wire import Chunk, End, Granted, Kind, WireOrder, as_json, json_of
from server.inference.completion import (
    Completion,
    LeasedStream,
    Order,
    Sink,
    closed_on_failure,
    counted_refusals,
)
from server.inference.dialects.base import Dialect
from server.inference.embeddings import most_places
from server.inference.local import Fields, sequences_and_tokens
from server.metrics import Metrics
from server.scheduling.lease import Lease

logger = logging.getLogger(__name__)

# Replicas that a request may lose before it is given up: it might be what ends them.
MAX_LOSSES = 3
VERSIONS_REMEMBERED = 16_384
# Seconds that an answer which has begun waits for a replica that it can go on at, and one that has not.
PATIENCE_S, FRESH_PATIENCE_S = 15.0, 2.0
LOOK_EVERY_S = 0.1
END_TIMEOUT_S = 5.0
# Refusals that say something about the replica and nothing about the request.
ELSEWHERE = frozenset({"shutting_down", "engine_restarting", "engine_stopped"})
# No client's text: in a JSON string the quote before it would be escaped.
_CREATED = re.compile(r'(?<!\\)"created": ?\d+')


class RemoteAnswers:
    """Also the owner of the leases of what runs elsewhere."""

    def __init__(self, directory: Directory, metrics: Metrics, places: Places) -> None:
        self.directory = directory
        self.metrics = metrics
        self.places = places
        self._taken: dict[str, Place] = {}  # by lease
        self.leases: dict[str, Lease] = {}
        self.versions: LRUCache[str, Version] = LRUCache(maxsize=VERSIONS_REMEMBERED)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def base(self) -> BaseModel:
        return self.directory.facts.base

    @property
    def max_model_len(self) -> int:
        return self.directory.facts.max_model_len

    async def open(self, order: Order) -> Completion:
        """Opens the order at the best replica, and at another one where that fails."""
        tenant = order.tenant
        lease = Lease(self, order.id, tenant.id, order.version, self.now())
        lease.streamed = bool(order.fields.get("stream"))
        lease.background = tenant.background
        with counted_refusals(self.metrics, tenant):
            granted, sequences = await self._reserve(order)
            call = RemoteCall(self, order, lease, granted)
            try:
                self._taken[lease.id] = await self.places.take(tenant, sequences)
                await call.begin()
            except BaseException:
                call.leave()
                order.reservation.withdraw()
                self._give_back(lease)
                raise
        lease.work, lease.account = call, order.reservation
        lease.queued_for = lease.age
        self.metrics.queued(tenant.id, lease.queued_for)
        self.leases[lease.id] = lease
        if order.version is not None:
            self.versions[order.version.key] = order.version
        async with closed_on_failure(lease):
            stream = await LeasedStream.opened(call.chunks(), lease, order.dialect, call)
            if call.body is None and call.parts is None:
                return Completion(order.public_model, lease, stream=stream)
        await lease.close("completed")
        return Completion(order.public_model, lease, body=call.body, parts=call.parts)

    async def tokens(
        self, dialect: Dialect, fields: dict[str, Any], version: Version | None = None
    ) -> dict[str, Any]:
        """Asked of the best replica for the version, which may chat in its own way."""
        sent = as_json(version) if version is not None else None
        question = {"dialect": dialect.name, "fields": fields, "version": sent}
        return await self.directory.ask("tokens", question, version)

    async def _reserve(self, order: Order) -> tuple[Granted | None, int]:
        """What is known here of the request's size, as its replica counts the prompt; and how many sequences
        of it run at once, at most.
        """
        prompt, output = order.prompt_bound, 0
        facts = self.directory.facts
        if order.dialect.pools:
            sequences = most_places(order.fields, facts.max_running)
        else:
            sequences, most = sequences_and_tokens(
                order.fields,
                order.dialect,
                Fields(order.fields, order.dialect),
                most=facts.max_model_len,
                max_running=facts.max_running,
            )
            output = sequences * min(most, max(1, facts.max_model_len - prompt))
        await order.reservation.reserve(prompt, output, elastic=order.elastic)
        if not order.reservation.limits_tokens:
            return None, sequences
        budgets = order.tenant.budgets
        return Granted(prompt, output, budgets is not None and budgets.of_money), sequences

    # --- of leases -----------------------------------------------------------------------------------

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def progressed(self, lease: Lease) -> None:
        """``lease`` has consumed more."""
        if lease.account is not None:
            lease.account.progressed(lease)

    def closed(self, lease: Lease) -> None:
        """``lease`` has ended."""
        self.leases.pop(lease.id, None)
        self._give_back(lease)
        if lease.account is not None:
            lease.account.closed(lease)
        self.metrics.ended(lease.tenant, lease.outcome)

    def _give_back(self, lease: Lease) -> None:
        if (place := self._taken.pop(lease.id, None)) is not None:
            place.give_back()

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Runs ``work`` as a task, and keeps a reference."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class RemoteCall:
    """One order, which is answered by one replica after another until it is whole.

    While its consumer waits for ``chunks``, they go to its ``sink``, where that takes them at once.
    """

    paused = False
    failed = False
    sink: Sink | None = None

    def __init__(self, answers: RemoteAnswers, order: Order, lease: Lease, granted: Granted | None) -> None:
        self.body: dict[str, Any] | None = None
        self.parts: list[bytes] | None = None  # of a long body, as JSON
        self._parts: list[bytes] = []  # those so far
        self._directory = answers.directory
        self._metrics = answers.metrics
        self._order = order
        self._lease = lease
        self._granted = granted
        self._asked = 0, 0, 0
        self._said: list[int] = []
        self._totals = 0, 0, 0  # prompt, cached and output tokens
        self._begun = False  # something of the answer has been handed on
        self._movable = True
        self._created: str | None = None
        self._losses = 0
        self._tried: set[str] = set()
        self._replica: Known | None = None
        self._line: Line | None = None
        self._first: str | None = None  # the replica that it began at
        self._moves = 0
        self._aborted = False

    # --- what its consumer does ----------------------------------------------------------------------

    async def begin(self) -> None:
        """Returns once a replica has a place in its engine for it. Raises what replicas refuse it with."""
        await self._connect()
        while True:
            try:
                kind, payload = await self._next()
            except Lost as exc:
                await self._go_on(exc)
                continue
            if kind is Kind.RUNNING:  # a replica of the release before says nothing of a load
                self._lease.load_seconds = json_of(payload).get("load", 0.0)
                return
            if kind is Kind.END:
                await self._refused(End.decoded(payload).error)
            elif kind is Kind.MOVE and self._can_leave():
                await self._leave_for_another()

    async def chunks(self) -> AsyncIterator[str]:
        """The answer's text as it comes; none where it is a document, then in ``body`` or ``parts``.

        Raises what the replica says, and Unavailable (``replica_lost``) where it cannot go on.
        """
        while True:
            try:
                kind, payload = await self._next()
            except Lost as exc:
                await self._go_on(exc)
                continue
            if kind is Kind.CHUNK:
                text = self._taken(Chunk.decoded(payload))
                while self._line and (more := self._line.take(Kind.CHUNK)):  # what came at once goes at once
                    text += self._taken(Chunk.decoded(more))
                if text:
                    yield text
            elif kind is Kind.END:
                end = End.decoded(payload)
                self._count(end.prompt, end.cached, end.output)
                if end.error is not None:
                    if self._can_leave_after(end.error):
                        await self._leave_for_another()
                        continue
                    if end.tail:
                        yield self._as_before(end.tail)
                    raise end.error
                self.body, self.parts = end.body, self._parts or None
                self._lease.finished([end.finish])
                if end.tail:
                    yield self._as_before(end.tail)
                await self._drained()
                return
            elif kind in (Kind.ASKS, Kind.LARGER):
                await self._settle(json_of(payload), larger=kind is Kind.LARGER)
            elif kind is Kind.BODY:
                self._parts.append(payload)
            elif kind is Kind.MOVE and not self._parts and self._can_leave():
                await self._leave_for_another()

    async def abort(self) -> None:
        """Ends it in the engine, and counts what was produced until then."""
        replica, self._aborted = self._replica, True
        try:
            if replica is not None and self._line is not None and not self._directory.is_lost(replica):
                with suppress(ServerError, AdapterError, TimeoutError):
                    async with asyncio.timeout(END_TIMEOUT_S):
                        told = await self._directory.post(replica, f"calls/{self._order.id}/end", {})
                        self._count(*told["totals"])
        finally:
            self.leave()

    def leave(self) -> None:
        """Gives the connection up: its replica then ends what runs. May be repeated."""
        line, self._line = self._line, None
        if line is not None:
            line.abort()
        replica, self._replica = self._replica, None
        if replica is not None:
            self._directory.ended(replica, self._order.version, self)
        self._parts = []

    def lose(self) -> None:
        """Called when its replica is silent: whoever reads is woken up, and goes on elsewhere."""
        if self._line is not None:
            self._line.abort()

    async def pause(self) -> bool:
        return False

    async def resume(self) -> None:
        """Never paused."""

    async def give_up(self, reason: str) -> None:
        """Never paused."""

    def poll(self) -> None:
        """A replica tells what it produces without being asked."""

    # --- frames --------------------------------------------------------------------------------------

    async def _next(self) -> tuple[Kind, bytes]:
        if self._line is None:
            raise Lost("the connection was closed")
        return await self._line.next(self._pass_on)

    def _pass_on(self, frames: Sequence[Frame]) -> int:
        """See ``server.fleet.lines.Tap``: chunks, if nothing else has come before them."""
        text, taken = "", 0
        if self.sink is None or not self.sink.ready():
            return 0
        for kind, payload in frames:
            if kind is not Kind.CHUNK:
                break
            text += self._taken(Chunk.decoded(payload))
            taken += 1
        if text:
            self.sink.take(text)
        return taken

    def _taken(self, chunk: Chunk) -> str:
        """The part of the text that was not handed on before; empty if all of it was."""
        self._movable = chunk.movable
        if self._begun and self._moves and chunk.total <= len(self._said):
            return ""
        self._said += chunk.ids if chunk.total > len(self._said) else ()
        self._count(chunk.prompt, chunk.cached, chunk.total)
        if not self._begun:
            self._begun = True
            found = _CREATED.search(chunk.text)
            self._created = found[0] if found else None
        return self._as_before(chunk.text)

    def _as_before(self, text: str) -> str:
        """The event with the time of creation that the answer began with, whichever replica it comes from."""
        if not self._moves or self._created is None:
            return text
        return _CREATED.sub(self._created, text)

    def _count(self, prompt: int, cached: int, output: int) -> None:
        self._totals = max(self._totals[0], prompt), cached, max(self._totals[2], output)
        if prompt or output:
            self._lease.progressed("answer", prompt, output, cached)

    async def _drained(self) -> None:
        """The connection goes back to its pool: all that is left of it is its end.

        A replica that hangs just then is left as any other; see ``lose``.
        """
        line = self._line
        if line is not None:
            with suppress(Lost):
                await line.end()
                self._line = None
                self._directory.done(line)
        self.leave()

    async def _settle(self, asked: list[int], *, larger: bool) -> None:
        """Reserves what the replica has counted; where that was more, asks again with more."""
        reservation = self._order.reservation
        prompt, output, sequences = (new - old for new, old in zip(asked, self._asked, strict=True))
        self._asked = asked[0], asked[1], asked[2]
        if prompt or output or sequences:
            reservation.asks(prompt, output, sequences)
        most = await reservation.settle()
        if larger:
            by_cost = self._granted is not None and self._granted.by_cost
            self._granted = Granted(asked[0], asked[1], by_cost, most)
            again = self._replica
            self.leave()
            await self._connect(again)

    # --- from one replica to the next ----------------------------------------------------------------

    async def _connect(self, first: Known | None = None) -> None:
        """Opens the order at ``first`` or the best replica that there is, waiting a little for one.

        After a while also at one that it was at before, which may be well again.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (PATIENCE_S if self._losses or self._begun else FRESH_PATIENCE_S)
        while True:
            replica = first or self._best()
            first = None
            if replica is not None:
                if await self._opened(replica):
                    return
                self._tried.add(replica.id)
                continue
            if loop.time() >= deadline:
                if self._begun:
                    raise cannot_go_on()
                raise self._directory.nobody()
            await asyncio.sleep(LOOK_EVERY_S)
            self._tried.clear()

    def _best(self) -> Known | None:
        """The best replica that was not tried."""
        return self._directory.choose(self._order.version, self._tried, self._like)

    @property
    def _like(self) -> str | None:
        """The replica that it began at, whose kind it needs, once it has begun."""
        return self._first if self._begun else None

    async def _opened(self, replica: Known) -> bool:
        order = self._order
        sent = WireOrder(
            id=order.id,
            tenant=order.tenant,
            dialect=order.dialect.name,
            fields=order.fields,
            version=order.version,
            public_model=order.public_model,
            prompt_bound=order.prompt_bound,
            prompt_tokens=order.prompt_tokens,
            elastic=order.elastic,
            elsewhere=self._directory.served_elsewhere(order.tenant.queue, replica),
            granted=self._granted,
            said=self._said,
            cached=self._totals[1],
            in_parts=True,
        )
        self._directory.sent(replica, order.version, self)
        self._replica = replica
        try:
            self._line = await self._directory.order(replica, sent.encoded())
        except Unreachable as exc:
            logger.warning("replica %s does not take a request: %s", replica.id, exc)
            self.leave()
            return False
        except BaseException:
            self.leave()
            raise
        if not self._begun:
            self._first = replica.id
        return True

    async def _go_on(self, why: Exception) -> None:
        """Its replica is lost: another one goes on with it, or begins it anew if nothing was said."""
        lost = self._replica
        self.leave()
        if self._aborted:
            raise Unavailable("The answer was cut off.", code="shutting_down", retry_after=5)
        self._losses += 1
        if lost is not None:
            self._tried.add(lost.id)
            logger.warning("replica %s was lost with a request: %s", lost.id, why)
        if self._losses > MAX_LOSSES or (self._begun and not self._movable):
            self._metrics.moved("failed")
            raise cannot_go_on()
        await self._elsewhere("lost")

    async def _refused(self, error: Exception | None) -> None:
        """Before it has a place: another replica may have one, if this one is about to go."""
        assert isinstance(error, ServerError | AdapterError)
        refusing = self._replica
        self.leave()
        if error.code not in ELSEWHERE or refusing is None:
            raise error
        self._tried.add(refusing.id)
        if self._best() is None:
            raise error
        await self._connect()

    def _can_leave_after(self, error: Exception) -> bool:
        """Whether what ended while it ran can go on, or begin anew, elsewhere: its engine was lost.

        An answer that has begun waits for a replica that may come.
        """
        if getattr(error, "code", None) not in ELSEWHERE or self._losses >= MAX_LOSSES:
            return False
        self._losses += 1
        return self._can_leave() or (self._begun and self._is_movable)

    def _can_leave(self) -> bool:
        """Whether there is another replica, be it one that it was at before."""
        if self._begun and not self._is_movable:
            return False
        here = {self._replica.id} if self._replica is not None else set[str]()
        self._tried |= here
        if self._best() is None:
            self._tried = here
        return self._best() is not None

    @property
    def _is_movable(self) -> bool:
        return self._movable and len(self._said) == self._totals[2]

    async def _leave_for_another(self) -> None:
        self.leave()
        await self._elsewhere("drained")

    async def _elsewhere(self, reason: Literal["lost", "drained"]) -> None:
        self._moves += 1
        self._metrics.moved(reason)
        await self._connect()
