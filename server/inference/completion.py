"""The use case: a completion, top to bottom.

Every refusal happens before the first byte of an answer: an unknown field, an unknown model, a full queue,
an adapter that cannot be loaded, a prompt that is too long. What comes out is a document or a stream; a
stream carries its lease and gives it back when it is closed, even if nobody ever read it.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from adapters.errors import AdapterError, AdapterNotFound, AdapterQuarantined, AdapterUnfit
from adapters.model import DEFAULT_MODEL, BaseModel, Version
from adapters.store.catalog import Catalog
from server.accounts.tenants import Tenant
from server.engine.calls import EngineDied, Relay
from server.errors import (
    BadRequest,
    Forbidden,
    ModelNotFound,
    ServerError,
    TooManyRequests,
    Unavailable,
)
from server.inference.defaults import default_max_tokens, with_defaults
from server.inference.dialects.base import Dialect
from server.limits.quotas import Quotas
from server.limits.reservation import Reservation
from server.metrics import Metrics, Outcome
from server.scheduling.lease import Lease
from server.scheduling.refusals import engine_restarting


class Answers(Protocol):
    """Who answers once a request is named and limited: this process's engine, or a replica's.

    See ``server.inference.local`` and ``server.fleet.remote``.
    """

    @property
    def base(self) -> BaseModel: ...

    @property
    def max_model_len(self) -> int: ...

    async def open(self, order: Order) -> Completion:
        """Reserves, waits for a turn and answers, or opens the stream; raises as ``open_completion``."""

    async def tokens(
        self, dialect: Dialect, fields: dict[str, Any], version: Version | None = None
    ) -> dict[str, Any]:
        """What the tokenizer says of ``fields``, as ``version`` chats. BadRequest for what it refuses."""


class Sampler(Protocol):
    """Who keeps prompts of some requests; see ``server.rollouts.sampler``. Nothing is ``wanted`` but of
    adapters that are being rolled out, whose customers have agreed."""

    @property
    def wanted(self) -> Mapping[tuple[str, str], Any]: ...
    def take(self, order: Order) -> None: ...


@dataclass(frozen=True, slots=True)
class Completions:
    """What a completion needs; made once by ``create_app``."""

    answers: Answers
    catalog: Catalog
    metrics: Metrics
    quotas: Quotas = field(default_factory=Quotas)
    sampler: Sampler | None = None


class Reserved(Protocol):
    """What was reserved for a request; see ``server.limits.reservation.Reservation``."""

    refused: ServerError | None

    @property
    def limits_tokens(self) -> bool: ...
    async def reserve(self, prompt_tokens: int, output_tokens: int, *, elastic: bool = False) -> None: ...
    def asks(self, prompt_tokens: int, output_tokens: int, sequences: int) -> None: ...
    async def settle(self) -> int | None: ...
    def withdraw(self) -> None: ...
    def progressed(self, lease: Lease) -> None: ...
    def closed(self, lease: Lease) -> None: ...


@dataclass(frozen=True, slots=True)
class Order:
    """A request that has its name and its limits, and is to be answered: what crosses to a replica.

    ``version`` is None for the base, ``public_model`` what the answer shows. ``prompt_bound`` is a high
    estimate of the prompt's tokens and ``prompt_tokens`` a likely one. ``elastic`` if the request does not
    say how long its answer is to be. ``elsewhere`` is that of ``server.scheduling.nouns.Ask``. ``relay`` is
    set where the answer goes to another process.
    """

    id: str
    tenant: Tenant
    dialect: Dialect
    fields: dict[str, Any]
    version: Version | None
    public_model: str
    reservation: Reserved
    prompt_bound: int
    prompt_tokens: int
    elastic: bool
    elsewhere: float = 0.0
    relay: Relay | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """``body``, ``parts`` or ``stream`` is set. ``model`` is the public name of what answered.

    ``parts`` are a body as JSON, where another process wrote it; see ``server.inference.long_documents``.
    """

    model: str
    lease: Lease
    body: dict[str, Any] | None = None
    stream: LeasedStream | None = None
    parts: Sequence[bytes] | None = None

    @property
    def document(self) -> dict[str, Any]:
        """The body, read if it came in parts."""
        if self.parts is None:
            assert self.body is not None, "a document was asked for"
            return self.body
        read: dict[str, Any] = json.loads(b"".join(self.parts))
        return read

    async def discard(self) -> None:
        """For one that nobody will read any more."""
        await self.lease.close("disconnected")


@dataclass(slots=True)
class Asked:
    """A request, and what is known of it so far.

    ``version`` None is the base model, or not known yet. ``numbered``: it names a version, as in ``name@3``.
    """

    id: str
    tenant: Tenant
    dialect: Dialect
    version: Version | None = None
    public_model: str = ""
    reservation: Reservation | None = None
    numbered: bool = False

    def order(
        self, dialect: Dialect, fields: dict[str, Any], prompt: str, *, prompt_bound: int, elastic: bool
    ) -> Order:
        """What is to be answered. ``dialect`` is what the engine is asked in, ``prompt`` a text of about the
        prompt's length."""
        assert self.reservation is not None
        return Order(
            id=self.id,
            tenant=self.tenant,
            dialect=dialect,
            fields=fields,
            version=self.version,
            public_model=self.public_model,
            reservation=self.reservation,
            prompt_bound=prompt_bound,
            prompt_tokens=estimate_prompt_tokens(prompt),
            elastic=elastic,
        )


async def open_completion(service: Completions, asked: Asked, body: dict[str, Any]) -> Completion:
    """Answers ``body``, or opens the stream that will. ``asked`` is told what becomes known.

    Raises a ServerError or AdapterError before anything was answered. Cancelling it ends the request in the
    engine and gives its place back.
    """
    dialect = asked.dialect
    with recorded_refusals(service, asked):
        with counted_refusals(service.metrics, asked.tenant):
            check_dialect(service.answers.base, dialect)
            reservation = await resolve_allowed(service, asked, body)
            version = asked.version
            if version is not None and version.chat:
                body = with_defaults(dialect, body, version.chat)
            text = dialect.prompt_text(body)
            most_prompt = prompt_tokens_bound(text, body.get("tools"))
            elastic = all(body.get(param) is None for param in dialect.max_tokens_fields)
            fields = dialect.allowed_fields(body)
            fields = with_token_limit(service, reservation, dialect, fields, most_prompt, version)
        order = asked.order(dialect, fields, text, prompt_bound=most_prompt, elastic=elastic)
        completion = await service.answers.open(order)
        sampler = service.sampler
        if sampler is not None and sampler.wanted and not asked.numbered:
            sampler.take(order)
        return completion


@contextmanager
def recorded_refusals(service: Completions, asked: Asked) -> Iterator[None]:
    """Lets a request be found that ended before it had a lease, which would have recorded it."""
    began = time.monotonic()

    def ended(outcome: Outcome, code: str | None, named: tuple[str, int] | None = None) -> None:
        if asked.version is not None:
            named = asked.version.adapter, asked.version.number
        if asked.reservation is None or not asked.reservation.recorded:
            service.quotas.refused(
                asked.tenant,
                named,
                endpoint=asked.dialect.name,
                request_id=asked.id,
                outcome=outcome,
                code=code,
                seconds=time.monotonic() - began,
                numbered=asked.numbered,
            )

    try:
        yield
    except (ServerError, AdapterError) as exc:
        named = exc.version if isinstance(exc, AdapterQuarantined | AdapterUnfit) else None
        ended(_outcome_of(exc), exc.code, named)
        raise
    except asyncio.CancelledError:
        ended("disconnected", None)
        raise


@contextmanager
def counted_refusals(metrics: Metrics, tenant: Tenant) -> Iterator[None]:
    """Counts what ends before it has a lease."""
    try:
        yield
    except (ServerError, AdapterError) as exc:
        metrics.ended(tenant.id, _outcome_of(exc))
        raise
    except asyncio.CancelledError:
        metrics.ended(tenant.id, "disconnected")
        raise


@asynccontextmanager
async def closed_on_failure(lease: Lease) -> AsyncIterator[None]:
    """Gives ``lease`` back if the block fails, with the outcome of the exception that it ends with."""
    try:
        yield
    except asyncio.CancelledError:
        await lease.close("disconnected")
        raise
    except EngineDied as exc:
        failure = lease.failure or engine_restarting()
        lease.code = failure.code
        await lease.close("failed")
        raise failure from exc
    except Exception as exc:
        lease.code = getattr(lease.failure or exc, "code", None)
        await lease.close("failed" if lease.failure else _outcome_of(exc))
        if lease.failure is not None:  # the engine was lost: whatever vLLM made of that
            raise lease.failure from exc
        raise
    except BaseException as exc:
        await lease.close(_outcome_of(exc))
        raise


# The last that OpenAI's streams say.
DONE = "data: [DONE]\n\n"


class Sink(Protocol):
    """Where the chunks of a stream go; see ``server.http.streams.Way``."""

    def ready(self) -> bool:
        """Whether a chunk can be handed on without waiting for anybody."""

    def take(self, chunk: str) -> None:
        """Hands it on; only where ``ready``."""


class Passing(Protocol):
    """Where chunks come from that may go to ``sink`` while their consumer waits for them, and past it."""

    sink: Sink | None


class LeasedStream:
    """SSE chunks, and the lease that they are produced with. ``aclose`` is idempotent and always needed."""

    def __init__(
        self,
        chunks: AsyncIterator[str],
        first: str | None,
        lease: Lease,
        dialect: Dialect,
        passing: Passing | None = None,
    ) -> None:
        self._chunks = chunks
        self._first = first
        self._lease = lease
        self._dialect = dialect
        self._passing = passing
        self._sink: Sink | None = None
        self._number = 0  # of the last chunk
        self._outcome: Outcome = "disconnected"

    @classmethod
    async def opened(
        cls,
        chunks: AsyncIterator[str],
        lease: Lease,
        dialect: Dialect,
        passing: Passing | None = None,
    ) -> LeasedStream:
        """Waits for the first chunk, so that a request which fails at once gets a status, not a stream.

        ``passing`` is where ``chunks`` come from, if they can go past whoever iterates.
        """
        return cls(chunks, await anext(chunks, None), lease, dialect, passing)

    def goes_to(self, sink: Sink) -> None:
        """Whoever iterates hands each chunk to ``sink``, where some may go by themselves meanwhile."""
        if self._passing is not None:
            self._sink, self._passing.sink = sink, self

    def ready(self) -> bool:
        """As a ``Sink``."""
        return self._sink is not None and self._sink.ready()

    def take(self, chunk: str) -> None:
        """As a ``Sink``."""
        assert self._sink is not None
        self._passes(chunk)
        self._sink.take(chunk)

    def _passes(self, chunk: str) -> None:
        self._number += 1
        if chunk.endswith(DONE):
            self._outcome = "completed"  # its client may leave before a replica says that it ended

    async def __aiter__(self) -> AsyncIterator[str]:
        """The chunks; an error becomes the last one, as clients of this dialect expect it."""
        try:
            if self._first is not None:
                self._passes(self._first)
                yield self._first
            async for chunk in self._chunks:
                self._passes(chunk)
                yield chunk
        except (ServerError, EngineDied) as exc:
            self._outcome = "failed"
            died = engine_restarting() if isinstance(exc, EngineDied) else exc
            error = self._lease.failure or died
            self._lease.code = error.code
            yield self._dialect.error_event(error, self._number)
        else:
            self._outcome = "completed"

    async def raw(self) -> AsyncIterator[str]:
        """As iteration, but raises ServerError or EngineDied where the answer breaks off."""
        if self._first is not None:
            yield self._first
        async for chunk in self._chunks:
            yield chunk
        self._outcome = "completed"

    async def aclose(self) -> None:
        if self._passing is not None:  # which refers to this
            self._sink = self._passing.sink = None
        await self._lease.close(self._outcome)


def check_dialect(base: BaseModel, dialect: Dialect) -> None:
    """BadRequest (``not_supported_by_base``) for a dialect that the base model cannot answer in."""
    if dialect.base in ("any", base.makes) or (dialect.base == "scores" and base.pooling):
        return
    cure = {
        "text": "makes text and no {}; call /v1/chat/completions, or a server with a model for them.",
        "embeddings": "makes embeddings and no {}; call /v1/embeddings.",
        "labels": "gives labels and makes no {}; call /v1/classify.",
    }[base.makes].format(dialect.base)
    raise BadRequest(f"The base model that is served here {cure}", code="not_supported_by_base")


async def resolve_allowed(service: Completions, asked: Asked, body: dict[str, Any]) -> Reservation:
    """Tells ``asked`` what ``body`` names, as ``resolve``, and the reservation, which it returns too, if the
    tenant may use it; see ``Quotas.open``."""
    unit, asked.numbered = body.get("user") or asked.id, is_numbered(body.get("model"))
    version, public = await resolve(service, asked.tenant, body.get("model"), str(unit))
    reservation = await service.quotas.open(
        asked.tenant,
        version,
        endpoint=asked.dialect.name,
        in_parts=asked.dialect.pools,
        request_id=asked.id,
        numbered=asked.numbered,
    )
    asked.version, asked.public_model, asked.reservation = version, public, reservation
    return reservation


def is_numbered(model: Any) -> bool:
    """Whether a request names a version, as in ``name@3``; no adapter's name has an @ in it."""
    return isinstance(model, str) and "@" in model


async def resolve(
    service: Completions, tenant: Tenant, model: Any, unit: str = ""
) -> tuple[Version | None, str]:
    """(version, public name); the version is None for the base model. ``unit`` chooses in a split."""
    if model is not None and not isinstance(model, str):
        raise BadRequest("model must be a string", param="model")
    if model == service.answers.base.name and tenant.base_allowed:
        return None, model
    try:
        version = await service.catalog.resolve(tenant.id, model, unit)
    except AdapterNotFound as exc:
        raise ModelNotFound(exc.message, param="model") from exc
    by_name = model is not None and model != DEFAULT_MODEL
    return version, model if by_name and model is not None else version.adapter


def with_token_limit(
    service: Completions,
    reservation: Reservation,
    dialect: Dialect,
    body: dict[str, Any],
    prompt_tokens: int,
    version: Version | None = None,
) -> dict[str, Any]:
    """``body`` asking for as many tokens as limits and the version's default leave, where it does not say.

    Raises BadRequest where it asks for more than the tenant's limit of one answer.
    """
    least = body.get("min_tokens") or 0
    reservation.check_max_tokens(least, "min_tokens")
    for param in dialect.max_tokens_fields:
        asked = body.get(param)
        if asked is not None:
            reservation.check_max_tokens(asked, param)
            return body
    n = body.get("n")
    most = reservation.max_output(prompt_tokens, n if isinstance(n, int) and n > 1 else 1)
    usual = default_max_tokens(dialect, version.chat) if version is not None else dialect.default_max_tokens
    if most is None or prompt_tokens + most >= service.answers.max_model_len:
        if usual in (None, dialect.default_max_tokens):
            return body
        return body | {dialect.max_tokens_fields[0]: max(usual or 1, least)}
    # Never less than it asks for at least: what limits do not leave is refused when it is reserved.
    most = max(most, least)
    return body | {dialect.max_tokens_fields[0]: min(most, usual or most)}


def prompt_tokens_bound(text: str, tools: Any = None) -> int:
    """A high estimate of the prompt's tokens, to be reserved until the engine has counted them.

    Ordinary text of any language has three bytes or more to a token, token ids with their commas too. For
    what has fewer, more is reserved then, or it is refused; see ``Reservation.settle``.
    """
    whole = text + str(tools or "")
    return len(whole.encode("utf-8", "surrogatepass")) // 3 + 1


def estimate_prompt_tokens(text: str) -> int:
    """A quick estimate of a prompt's tokens, at least 1; the true number comes with the first token."""
    return max(1, len(text) // 4)


def _outcome_of(exc: BaseException) -> Outcome:
    if isinstance(exc, TooManyRequests):
        return "refused"
    if isinstance(exc, AdapterQuarantined):
        return "quarantined"
    if isinstance(exc, Unavailable):
        return "unavailable"
    if isinstance(exc, BadRequest | ModelNotFound | Forbidden):
        return "rejected"
    return "unavailable" if isinstance(exc, AdapterError) else "failed"


def version_header(version: Version | None) -> dict[str, str]:
    """Which version answers, which a canary leaves open; nothing for the base."""
    return {"X-Loraplex-Version": f"{version.adapter}@{version.number}"} if version else {}


def new_request_id() -> str:
    return secrets.token_hex(16)
