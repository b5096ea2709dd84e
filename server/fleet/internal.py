"""``/internal/v1``: what a replica answers to gateways, and to nobody else."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from adapters.database.audit import ACTOR, Actor
from adapters.errors import AdapterError, UploadIncomplete
from adapters.model import Quota, Waivers
from server.engine.calls import EngineDied
from server.errors import BadRequest, ServerError, TooManyRequests, Unauthorized, status_of
from server.fleet import wire
from server.fleet.replica import Replica
from server.fleet.wire import Chunk, End, Granted, Kind, Malformed, WireOrder
from server.http.long_answers import long_answer
from server.http.pieces import Pieces
from server.http.residency import look
from server.inference.completion import Order, counted_refusals
from server.inference.dialects.registry import DIALECTS
from server.inference.long_documents import is_long, written
from server.publishing.publish import publish, verify
from server.publishing.truth import unfit
from server.scheduling.lease import Lease
from server.scheduling.refusals import engine_restarting


def _replica_of(request: Request) -> Replica:
    replica = request.app.state.replica
    assert isinstance(replica, Replica)
    return replica


async def _of_the_fleet(request: Request) -> None:
    """Unauthorized without the fleet's key; the same time is taken whatever was sent."""
    key = _replica_of(request).key
    sent = request.headers.get("authorization", "").encode("utf-8", "replace")
    if not hmac.compare_digest(sent, f"Bearer {key}".encode()):
        raise Unauthorized("This is for the gateways of this fleet, which have its LORAPLEX_FLEET_KEY.")
    request.state.log["quiet"] = True


router = APIRouter(prefix=wire.PREFIX, include_in_schema=False, dependencies=[Depends(_of_the_fleet)])


class Reserved:
    """``server.inference.completion.Reserved`` at a replica: limits are the gateway's, who is told.

    ``larger`` is what the engine has counted, where that is more than was granted.
    """

    def __init__(self, granted: Granted | None, tell: Callable[[bytes], Awaitable[None]]) -> None:
        self.refused: ServerError | None = None
        self.larger: tuple[int, int, int] | None = None
        self._granted = granted
        self._tell = tell
        self._asked = self._told = (0, 0, 0)
        self._settling = asyncio.Lock()

    @property
    def limits_tokens(self) -> bool:
        return self._granted is not None

    async def reserve(self, prompt_tokens: int, output_tokens: int, *, elastic: bool = False) -> None:
        """The gateway has."""

    def asks(self, prompt_tokens: int, output_tokens: int, sequences: int) -> None:
        """Adds a part of the request."""
        prompt, output, parts = self._asked
        self._asked = prompt + prompt_tokens, output + output_tokens, parts + sequences

    async def settle(self) -> int | None:
        """Tells the gateway what was counted. TooManyRequests where that is more than it has reserved."""
        assert self._granted is not None
        async with self._settling:
            if not self._granted.covers(self._asked[0], self._asked[1]):
                self.larger = self._asked
                self.refused = TooManyRequests("The request is larger than what was reserved for it.")
                raise self.refused
            if self._told != self._asked:
                self._told = self._asked
                await self._tell(wire.framed(Kind.ASKS, self._asked))
            return self._granted.most

    def withdraw(self) -> None:
        """Nothing here: the gateway withdraws the reservation when it is told of the end."""

    def progressed(self, lease: Lease) -> None:
        """The gateway counts."""

    def closed(self, lease: Lease) -> None:
        """The gateway counts."""


class RelayedCall(Response):
    """An order's answer, as an ASGI response; also its call's ``Relay``.

    A gateway that closes the connection ends it in the engine.
    """

    def __init__(self, replica: Replica, sent: WireOrder) -> None:
        super().__init__(media_type="application/octet-stream")
        self.said: Sequence[int] = sent.said
        self.cached = sent.cached
        self._replica = replica
        self._reserved = Reserved(sent.granted, self.tell)
        self._in_parts = sent.in_parts
        self._order = Order(
            id=sent.id,
            tenant=sent.tenant,
            dialect=DIALECTS[sent.dialect],
            fields=sent.fields,
            version=sent.version,
            public_model=sent.public_model,
            reservation=self._reserved,
            prompt_bound=sent.prompt_bound,
            prompt_tokens=sent.prompt_tokens,
            elastic=sent.elastic,
            elsewhere=sent.elsewhere,
            relay=self,
        )
        self._lease: Lease | None = None
        self._send: Send | None = None
        self._pieces: Pieces | None = None
        self._task: asyncio.Task[None] | None = None
        self._movable = False
        self._ids: list[int] = []
        self._text: list[str] = []
        self._totals = 0, 0, 0  # prompt, cached and output tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        calls = self._replica.calls
        headers = [(b"content-type", b"application/octet-stream")]  # and no length, as a response has one
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._send, self._pieces = send, Pieces.of(scope)
        self._task = asyncio.ensure_future(self._answer())
        gone = asyncio.ensure_future(_disconnected(receive))
        calls[self._order.id] = self
        try:
            await asyncio.wait({self._task, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._send = None
            gone.cancel()
            self._task.cancel()
            await asyncio.wait([self._task])
            if calls.get(self._order.id) is self:
                del calls[self._order.id]
        if not self._task.cancelled():
            self._task.result()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def tell(self, framed: bytes) -> None:
        """Waits while the gateway does not read."""
        if self._send is None:
            return
        if self._pieces is not None and self._pieces.ready():
            self._pieces.write(framed)
        else:
            await self._send({"type": "http.response.body", "body": framed, "more_body": True})

    async def end(self) -> tuple[int, int, int]:
        """Ends it for a gateway that does not want the rest; returns prompt, cached and output tokens."""
        if self._lease is not None:
            await self._lease.close("disconnected")
        if self._task is not None:
            self._task.cancel()
        return self._counted()

    # --- what the engine tells -------------------------------------------------------------------------

    def begins(self, movable: bool) -> None:
        """See ``Relay``."""
        self._movable = movable and self._order.dialect.resumes_elsewhere

    def produced(self, token_ids: Sequence[int], prompt_tokens: int, cached_tokens: int) -> None:
        """Kept until its text is out."""
        self._ids += token_ids
        self._totals = prompt_tokens, cached_tokens, self._totals[2] + len(token_ids)

    async def flush(self) -> None:
        """Sends what was produced, if it came to any text."""
        if self._text:
            ids, text = tuple(self._ids), "".join(self._text)
            self._ids, self._text = [], []
            await self.tell(Chunk(self._movable, *self._totals, ids, text).encoded())

    # --- the answer ------------------------------------------------------------------------------------

    async def _answer(self) -> None:
        answers, order = self._replica.answers, self._order
        try:
            with counted_refusals(self._replica.services.metrics, order.tenant):
                admitted = await answers.admit(order)
        except (ServerError, AdapterError) as exc:
            await self._ended(error=exc)
            return
        self._lease = admitted.lease
        body: dict[str, Any] | None = None
        error: Exception | None = None
        try:
            await self.tell(wire.framed(Kind.RUNNING, {"load": self._lease.load_seconds}))
            completion = await answers.run(admitted)
            body = completion.body
            if completion.stream is not None:
                async for chunk in completion.stream.raw():
                    self._text.append(chunk)
            await self._lease.close("completed")
            if body is not None and self._in_parts and is_long(body):
                for part in await written(body):
                    await self.tell(wire.frame(Kind.BODY, part))
                body = None
        except (ServerError, AdapterError, EngineDied) as exc:
            await self._lease.close("failed")
            lost = engine_restarting() if isinstance(exc, EngineDied) else exc
            error = self._lease.failure or lost
        except BaseException as exc:
            await self._lease.close("disconnected" if isinstance(exc, asyncio.CancelledError) else "failed")
            raise
        if self._reserved.larger is not None:
            await self.tell(wire.framed(Kind.LARGER, self._reserved.larger))
        else:
            await self._ended(body, error)

    async def _ended(self, body: dict[str, Any] | None = None, error: Exception | None = None) -> None:
        finish = self._lease.finish if self._lease is not None else None
        await self.tell(End(*self._counted(), "".join(self._text), body, error, finish).encoded())

    def _counted(self) -> tuple[int, int, int]:
        lease = self._lease
        if lease is None:
            return 0, 0, 0
        return lease.prompt_tokens, lease.cached_tokens, lease.output_tokens


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, limit: int) -> bytes:
    """BadRequest beyond ``limit`` bytes."""
    parts, size = [], 0
    async for chunk in request.stream():
        parts.append(chunk)
        size += len(chunk)
        if size > limit:
            raise BadRequest(f"A message has more than {limit} bytes.", code="body_too_large")
    return b"".join(parts)


async def _json(request: Request) -> dict[str, Any]:
    sent = json.loads(await _body(request, wire.MAX_FRAME))
    if not isinstance(sent, dict):
        raise BadRequest("not an object", code="invalid_json")
    return sent


async def _told(work: Awaitable[Any]) -> Response:
    """What ``work`` returns, or the error that the gateway is to raise in its place."""
    try:
        return JSONResponse(await work)
    except (ServerError, AdapterError) as exc:
        return JSONResponse({"loraplex_error": wire.error_as_json(exc)}, status_of(exc)[0])


@router.post("/open")
async def open_(request: Request) -> Any:
    """Answers an order, in frames."""
    replica = _replica_of(request)
    limit = 8 * replica.services.settings.max_body_bytes + wire.MAX_ENVELOPE  # as JSON in ASCII
    try:
        sent = WireOrder.decoded(await _body(request, limit), replica.services.blobs.path)
        return RelayedCall(replica, sent)
    except (Malformed, KeyError) as exc:
        refused = BadRequest(f"This replica does not understand the gateway: {exc}", code="invalid_request")
        return JSONResponse({"loraplex_error": wire.error_as_json(refused)}, 400)


@router.post("/calls/{id_}/end")
async def end(request: Request, id_: str) -> dict[str, Any]:
    call = _replica_of(request).calls.get(id_)
    return {"totals": await call.end() if call is not None else (0, 0, 0)}


@router.get("/state")
async def state(request: Request) -> dict[str, Any]:
    """How this replica is, asked every second by every gateway."""
    replica = _replica_of(request)
    served = replica.services.dispatcher.served()
    now = replica.services.dispatcher.snapshot()
    report = replica.report(now)
    told = {"report": report.as_json(), "backlog": report.backlog, "id": replica.id}
    counts = {"queued": now.queued, "running": now.running}
    return {**told, **counts, "facts": replica.facts, "served": served}


@router.post("/tokens")
async def tokens(request: Request) -> Response:
    """What the tokenizer says."""
    sent, replica = await _json(request), _replica_of(request)
    given = sent.get("version")
    version = wire.version_of(given, replica.services.blobs.path) if given else None
    return await _told(replica.answers.tokens(DIALECTS[sent["dialect"]], sent["fields"], version))


@router.post("/warm")
async def warm(request: Request) -> Response:
    """Loads a version without a request."""
    sent, replica = await _json(request), _replica_of(request)
    version = wire.version_of(sent["version"], replica.services.blobs.path)

    async def warmed() -> dict[str, Any]:
        timeout = float(sent["timeout"])
        return {"tier": await replica.services.dispatcher.warm(version, slot=sent["slot"], timeout=timeout)}

    return await _told(warmed())


@router.post("/verify")
async def verify_(request: Request) -> Response:
    """A version against its golden probes."""
    sent = await _json(request)
    publishing = _replica_of(request).services.publishing
    return await _told(verify(publishing, sent["tenant"], sent["adapter"], sent["number"]))


@router.post("/unfit")
async def unfit_(request: Request) -> Response:
    """What this engine does not serve, for a gateway's ``/admin/v1/check``."""
    services = _replica_of(request).services

    async def found() -> dict[str, Any]:
        return {"unfit": await unfit(services.publishing.fitness, services.database, services.blobs.path)}

    return await _told(found())


@router.post("/residency")
async def residency(request: Request) -> Response:
    """What a gateway asks for its ``/admin/v1/residency``, and the last events of the scheduler."""
    services, sent = _replica_of(request).services, await _json(request)
    told = await services.dispatcher.recorded(int(sent["events"]))
    return await long_answer(look(services) | told, services.settings.client_timeout)


@router.post("/publish")
async def publish_(request: Request) -> Response:
    """An upload, piece by piece, as the gateway receives it."""
    publishing = _replica_of(request).services.publishing
    frames = _frames(request)

    async def pieces() -> AsyncIterator[tuple[str, bytes]]:
        async for kind, payload in frames:
            if kind is Kind.END:
                return
            yield wire.piece_of(payload)
        raise UploadIncomplete("The upload broke off between gateway and replica; send it again.")

    async def published() -> dict[str, Any]:
        kind, payload = await anext(frames)
        if kind is not Kind.OPTIONS:
            raise BadRequest("an upload begins with its options", code="invalid_request")
        sent = wire.json_of(payload)
        quota = Quota(*sent["quota"]) if sent["quota"] else None
        waived = Waivers(**{**sent["waived"], "fields": tuple(sent["waived"]["fields"])})
        names = sent["tenant"], sent["adapter"]
        ACTOR.set(Actor(*sent["actor"]))
        made = await publish(
            publishing,
            *names,
            pieces(),
            waived=waived,
            key=sent["key"],
            quota=quota,
            annotation=sent["note"],
            keep_reason=sent["keep_reason"],
            make_live=sent.get("make_live", True),
        )
        return {"answer": dict(made.answer), "gone": [wire.as_json(version) for version in made.gone]}

    return await _told(published())


async def _frames(request: Request) -> AsyncIterator[tuple[Kind, bytes]]:
    frames = wire.Frames()
    async for data in request.stream():
        for one in frames.feed(data):
            yield one
