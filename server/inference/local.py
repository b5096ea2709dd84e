"""This process's engine answers: parse, wait for a turn, run.

A request passes in two steps, which a replica tells apart for its gateway:

    admitted = await answers.admit(order)      every refusal that is not the engine's own; holds a lease
    completion = await answers.run(admitted)   the answer, or the stream that carries the lease
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapters.model import BaseModel, Version
from adapters.store.cache import Cache
from server.engine.calls import Call, InFlight
from server.engine.engine import Engine
from server.engine.errors import named
from server.engine.manners import Manners
from server.errors import BadRequest
from server.inference import embeddings
from server.inference.completion import (
    Completion,
    LeasedStream,
    Order,
    closed_on_failure,
    counted_refusals,
)
from server.inference.dialects.base import Dialect
from server.metrics import Metrics
from server.scheduling.dispatcher import Dispatcher
from server.scheduling.lease import Lease
from server.scheduling.nouns import Ask


@dataclass(frozen=True, slots=True)
class Admitted:
    """An order that has its turn: ``lease`` is to be closed by whoever does not ``run`` it."""

    order: Order
    lease: Lease
    request: Any
    resumable: bool
    inputs: Sequence[embeddings.Input] | None = None  # of embeddings and their like
    places: int = 1


class LocalAnswers:
    """``server.inference.completion.Answers``, by an engine and a dispatcher of this process.

    ``cache`` has the files of versions where not all are in the data folder.
    """

    def __init__(
        self, engine: Engine, dispatcher: Dispatcher, metrics: Metrics, cache: Cache | None = None
    ) -> None:
        self.engine = engine
        self.dispatcher = dispatcher
        self._metrics = metrics
        self._cache = cache
        self._manners = Manners()

    @property
    def base(self) -> BaseModel:
        return self.engine.base

    @property
    def max_model_len(self) -> int:
        return self.engine.max_model_len

    async def open(self, order: Order) -> Completion:
        with counted_refusals(self._metrics, order.tenant):
            admitted = await self.admit(order)
        return await self.run(admitted)

    async def tokens(
        self, dialect: Dialect, fields: dict[str, Any], version: Version | None = None
    ) -> dict[str, Any]:
        request = await self._parsed(dialect, fields)
        if self._cache is None or version is None or not version.chat.get("kept"):
            manner = await self._manners.of(version)
        else:
            async with self._cache.held(version):
                manner = await self._manners.of(version)
        return await self.engine.tokens(dialect.name, request, manner)

    async def _parsed(self, dialect: Dialect, fields: dict[str, Any]) -> Any:
        """vLLM's request; BadRequest names the field, also where vLLM has read parts apart from it."""
        try:
            return await self.engine.parse_in_turns(dialect.name, fields)
        except BadRequest as exc:
            raise named(exc, dialect.prompt_field) from exc.__cause__

    async def admit(self, order: Order) -> Admitted:
        """Waits for its turn; see ``Dispatcher.submit``. Raises also BadRequest, and as ``reserve``.

        The lease then tells the reservation what it uses.
        """
        engine, dialect = self.engine, order.dialect
        request = await self._parsed(dialect, order.fields)
        if dialect.pools:
            return await self._admit_embeddings(order, request)
        sequences, max_tokens = sequences_and_tokens(
            order.fields, dialect, request, most=engine.max_model_len, max_running=engine.max_running
        )
        resumable = engine.resumable(request)
        await engine.check_structure(order.tenant.cache_salt, request)
        room = max(1, engine.max_model_len - order.prompt_bound)
        reserved = sequences * min(max_tokens, room)
        await order.reservation.reserve(order.prompt_bound, reserved, elastic=order.elastic)
        lease = await self._lease(order, max_tokens=max_tokens, sequences=sequences, resumable=resumable)
        return Admitted(order, lease, request, resumable)

    async def _admit_embeddings(self, order: Order, request: Any) -> Admitted:
        inputs = embeddings.inputs_of(request)
        places = embeddings.places_of(inputs, self.engine.max_running)
        await order.reservation.reserve(order.prompt_bound, 0)
        lease = await self._lease(order, max_tokens=1, sequences=places)
        return Admitted(order, lease, request, False, inputs, places)

    async def _lease(
        self, order: Order, *, max_tokens: int, sequences: int, resumable: bool = False
    ) -> Lease:
        tenant, reservation = order.tenant, order.reservation
        try:
            ask = Ask(
                id=self.dispatcher.new_id(tenant.id),
                tenant=tenant.queue,
                version=order.version.key if order.version else None,
                prompt_tokens=order.prompt_tokens,
                max_tokens=max_tokens,
                sequences=sequences,
                weight=tenant.share,
                max_queued=tenant.max_queued,
                max_running=tenant.max_running,
                resumable=resumable,
                elsewhere=order.elsewhere,
            )
            lease = await self.dispatcher.submit(ask, order.version, payer=tenant.id)
        except BaseException:
            reservation.withdraw()
            raise
        lease.account = reservation
        if reservation.limits_tokens:
            lease.admission = reservation
        return lease

    async def run(self, admitted: Admitted) -> Completion:
        """Every way out either returns the lease in the completion or closes it."""
        if admitted.inputs is not None:
            return await self._embed(admitted, admitted.inputs)
        lease, order, request = admitted.lease, admitted.order, admitted.request
        call = self._call(admitted)
        lease.streamed = bool(request.stream)
        lease.work = InFlight(self.engine, call)
        async with closed_on_failure(lease):
            call.manner = await self._manners.of(order.version)
            answer = await self.engine.answer(call, request)
            if answer.stream is not None:
                stream = await LeasedStream.opened(answer.stream, lease, order.dialect)
                return Completion(call.public_model, lease, stream=stream)
        await lease.close("completed")
        return Completion(call.public_model, lease, body=answer.body)

    async def _embed(self, admitted: Admitted, inputs: Sequence[embeddings.Input]) -> Completion:
        """A few inputs at a time under one lease."""
        lease, places, parts = admitted.lease, admitted.places, []
        async with closed_on_failure(lease):
            manner = await self._manners.of(admitted.order.version)
            for at in range(0, len(inputs), places):
                call = self._call(admitted, f"-{at}")
                call.manner = manner
                lease.work = InFlight(self.engine, call)
                some = embeddings.part_of(admitted.request, inputs[at : at + places])
                answer = await self.engine.answer(call, some)
                assert answer.body is not None
                parts.append(embeddings.finite(answer.body, admitted.order.dialect))
            whole = embeddings.joined(parts)
        await lease.close("completed")
        return Completion(admitted.order.public_model, lease, body=whole)

    def _call(self, admitted: Admitted, part: str = "") -> Call:
        order, lease = admitted.order, admitted.lease
        return Call(
            id=f"{order.id}{part}",
            kind=order.dialect.name,
            model=order.version.key if order.version else self.engine.base.name,
            public_model=order.public_model,
            cache_salt=order.tenant.cache_salt,
            meter=lease,
            admission=lease.admission,
            resumable=admitted.resumable,
            relay=order.relay,
        )


def sequences_and_tokens(
    fields: dict[str, Any], dialect: Dialect, request: Any, *, most: int, max_running: int
) -> tuple[int, int]:
    """(sequences, most output tokens of each). BadRequest for more sequences than can ever run at once.

    ``most`` is the longest prompt plus answer.
    """
    sequences, limit = dialect.sizes(fields, request)
    if not 1 <= sequences <= max_running:
        raise BadRequest(f"n times the number of prompts must be from 1 to {max_running}", param="n")
    return sequences, most if limit is None else max(1, min(limit, most))


class Fields:
    """A request's fields as attributes, as far as a dialect's ``sizes`` looks at them."""

    def __init__(self, fields: dict[str, Any], dialect: Dialect) -> None:
        self._fields = fields
        self._default = dict.fromkeys(dialect.max_tokens_fields, dialect.default_max_tokens)

    def __getattr__(self, name: str) -> Any:
        value = self._fields.get(name)
        return self._default.get(name) if value is None else value
