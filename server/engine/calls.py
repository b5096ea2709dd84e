"""What goes in and out of the engine: paging operations, calls and answers. Imports no vLLM.

The scheduler, the use cases and the fake engine of the tests all speak in these terms.
"""

from __future__ import annotations

import contextvars
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from server.engine.manners import Manner
from server.errors import ServerError

# The name of a dialect: "chat", "completion", "responses", …; see ``server.inference.dialects.registry``.
Kind = str


@dataclass(frozen=True, slots=True)
class PageOp:
    """One step of paging. ``name`` and ``path`` (absolute) are needed by "stage" only."""

    verb: Literal["stage", "activate", "deactivate", "evict"]
    load_id: int
    name: str = ""
    path: str = ""


@dataclass(frozen=True, slots=True)
class PageResult:
    """How an operation ended: ``error`` is None when it was done; ``seconds`` is the worker's time."""

    error: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class StageResult:
    """A load that has left its staging thread; ``size_bytes`` of host memory if ``error`` is None.

    With several workers ``size_bytes`` is their sum: each keeps its part, in the memory of one host.
    ``ranks`` is what the adapter takes of slots that are shared, else 0.
    """

    load_id: int
    error: str | None
    seconds: float
    size_bytes: int
    ranks: int = 0


@dataclass(frozen=True, slots=True)
class PageReport:
    results: tuple[PageResult, ...]
    staged: tuple[StageResult, ...]


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What the workers hold: load ids in host memory, per slot, and being staged."""

    host: frozenset[int]
    slots: tuple[int | None, ...]
    staging: frozenset[int]
    in_step_loads: int


class EngineDied(Exception):
    """The engine process is gone; nothing can be served until it is started again."""


class EngineHung(EngineDied):
    """The engine process is there, but does not answer."""


class Meter(Protocol):
    """Told by the engine what a call consumed.

    A call with several prompts runs as several ``part``s; the totals of one part are cumulative.
    """

    def progressed(self, part: str, prompt_tokens: int, output_tokens: int, cached_tokens: int) -> None: ...
    def finished(self, reasons: Sequence[str | None]) -> None:
        """A part has ended; why, for each of its answers."""


class Unmetered:
    """A meter of what nobody pays for."""

    def finished(self, reasons: Sequence[str | None]) -> None:
        pass

    def progressed(self, part: str, prompt_tokens: int, output_tokens: int, cached_tokens: int) -> None:
        pass


class Admission(Protocol):
    """Says whether a call may run, once its prompts are tokens; see ``server.limits.reservation``."""

    refused: ServerError | None

    def asks(self, prompt_tokens: int, output_tokens: int, sequences: int) -> None: ...
    async def settle(self) -> int | None: ...


class Relay(Protocol):
    """Where an answer goes that another process hands on, and what that one must know to go on elsewhere.

    ``said`` are the tokens that another engine has produced for this call, of a prompt of which ``cached``
    tokens were in its prefix cache; all that they say has been handed on. The engine goes on behind them: its
    first output stands for them.
    """

    said: Sequence[int]
    cached: int

    def begins(self, movable: bool) -> None:
        """The engine has the call; ``movable`` if another engine could go on from its tokens exactly."""

    def produced(self, token_ids: Sequence[int], prompt_tokens: int, cached_tokens: int) -> None:
        """One output of the engine, before it becomes chunks."""

    async def flush(self) -> None:
        """All chunks of what was ``produced`` are out; not called after the last output."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class Call:
    """One admitted request on its way through the engine.

    ``model`` is the engine's name for what answers, ``public_model`` the name shown in the answer.
    ``cache_salt`` separates tenants in the prefix cache (at most 128 characters, none of ``@ / \\``).
    ``resumable`` is what ``Engine.resumable`` says of its request. ``sent`` holds what the engine was asked
    for, as vLLM's core knows it; see ``Engine.pause``. ``failure`` is why the engine ended it, where that is
    known better than vLLM tells it.
    """

    id: str
    kind: Kind
    model: str
    public_model: str
    cache_salt: str
    meter: Meter
    admission: Admission | None = None
    request_ids: list[str] = field(default_factory=list)
    resumable: bool = False
    sent: list[Any] = field(default_factory=list)
    paused: bool = False
    aborted: bool = False
    failure: ServerError | None = None
    manner: Manner | None = None  # how what answers chats, where that is not the base's way
    life: int = 0  # which of the engine's lives it runs in; see ``Engine.detach``
    relay: Relay | None = None
    replaying: bool = False  # paused until what its relay has said is taken


@dataclass(frozen=True, slots=True)
class Answer:
    """Either ``body`` (a JSON document) or ``stream`` (server-sent events).

    The stream must be closed. It raises ServerError or EngineDied where the answer breaks off.
    """

    body: dict[str, Any] | None = None
    stream: AsyncIterator[str] | None = None


class Dialect(Protocol):
    """One API surface, as far as the engine needs it; see ``server.inference.dialects.base.Dialect``."""

    @property
    def name(self) -> Kind: ...
    @property
    def base(self) -> str: ...
    @property
    def first_request(self) -> Mapping[str, Any] | None: ...
    @property
    def prompt_field(self) -> str | None: ...
    @property
    def asks_while_streaming(self) -> bool: ...
    def request_model(self, body: dict[str, Any]) -> str: ...
    def request_id(self, call: Call) -> str | None: ...
    async def call(self, serving: Any, request: Any) -> Any: ...
    def document(self, call: Call, result: Any) -> dict[str, Any]: ...
    def events(self, call: Call, result: AsyncIterator[Any]) -> AsyncIterator[str]: ...


class RunsCalls(Protocol):
    """An engine, as far as a call that runs in it needs it; see ``server.engine.engine.Engine``."""

    async def abort(self, call: Call) -> None: ...
    async def pause(self, call: Call) -> bool: ...
    async def resume(self, call: Call) -> None: ...
    async def give_up(self, call: Call, reason: str) -> None: ...
    def poll(self, call: Call) -> None: ...


@dataclass(frozen=True, slots=True)
class InFlight:
    """A call and the engine that runs it."""

    engine: RunsCalls
    call: Call

    async def abort(self) -> None:
        await self.engine.abort(self.call)

    async def pause(self) -> bool:
        return await self.engine.pause(self.call)

    async def resume(self) -> None:
        await self.engine.resume(self.call)

    async def give_up(self, reason: str) -> None:
        await self.engine.give_up(self.call, reason)

    def poll(self) -> None:
        self.engine.poll(self.call)

    @property
    def paused(self) -> bool:
        """Whether the call is out of the engine, and can be resumed."""
        return self.call.paused

    @property
    def failed(self) -> bool:
        """Whether the engine has ended the call, and knows why."""
        return self.call.failure is not None


# The call whose request vLLM's front end works on, for what vLLM calls back into.
current_call: contextvars.ContextVar[Call | None] = contextvars.ContextVar("loraplex_call", default=None)
