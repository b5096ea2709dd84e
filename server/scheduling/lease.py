"""A lease: the right to run one request in the engine, and the meter of what it consumes.

lease = await dispatcher.submit(ask, version)            waits for a slot and a place in the engine
...the engine runs the call, with the lease as its meter...
await lease.close()                                      always, once; gives the place back
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

from adapters.errors import AdapterError
from adapters.model import Version
from server.engine.calls import Admission
from server.errors import ServerError
from server.metrics import Metrics, Outcome, TokenTimes

# Tokens between two reports of one request to the plan: fine enough for fairness, cheap enough to stream.
REPORT_EVERY = 8


class Work(Protocol):
    """What runs in the engine with a lease; see ``server.engine.engine.Engine`` for each."""

    async def abort(self) -> None: ...
    async def pause(self) -> bool: ...
    async def resume(self) -> None: ...
    async def give_up(self, reason: str) -> None: ...
    def poll(self) -> None: ...

    @property
    def paused(self) -> bool:
        """Whether the request is out of the engine, so that ``resume`` can go on with it."""

    @property
    def failed(self) -> bool:
        """Whether the engine has ended the request, with an error that whoever reads is still to meet."""


class Account(Protocol):
    """Who is told what a lease has used, as it is produced; see ``server.limits.reservation.Reservation``."""

    def progressed(self, lease: Lease) -> None: ...
    def closed(self, lease: Lease) -> None: ...


class LeaseOwner(Protocol):
    """What a lease needs of the dispatcher that handed it out."""

    metrics: Metrics

    def now(self) -> float: ...
    def progressed(self, lease: Lease) -> None: ...
    def closed(self, lease: Lease) -> None: ...
    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]: ...


class Lease:
    """A slot and a place in the engine, and the meter of what was consumed with it.

    The dispatcher may take both back for a while and return them later: the ``work`` is paused meanwhile.
    Its totals are cumulative: ``prompt_tokens``, ``output_tokens`` and ``cached_tokens`` over all parts.
    ``queued_for`` and ``first_token_after`` are seconds since arrival; an answer that is not streamed shows
    its first token at the next poll of its meter. ``load_seconds`` are those of ``queued_for`` in which its
    version was loaded, 0 where it was in a slot. ``code`` is the error that the request ended with,
    ``finish`` why its answer did: ``length`` if that is why any of several did.
    """

    def __init__(
        self, owner: LeaseOwner, id_: str, tenant: str, version: Version | None, since: float
    ) -> None:
        self.id = id_
        self.tenant = tenant
        self.version = version
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.cached_tokens = 0
        self.outcome: Outcome = "completed"
        self.streamed = False
        self.background = False  # nobody waits for it
        self.work: Work | None = None
        self.account: Account | None = None
        self.admission: Admission | None = None
        self.failure: ServerError | AdapterError | None = None  # why it ended, where the client did not
        self.code: str | None = None
        self.finish: str | None = None
        self.queued_for = 0.0
        self.load_seconds = 0.0
        self.first_token_after: float | None = None
        self._owner = owner
        self._since = since
        self._parts: dict[str, tuple[int, int, int]] = {}
        self._counted = (0, 0, 0)  # prompt, cached and output tokens that others know of
        self._last_token = 0.0
        self._token_times: TokenTimes | None = None
        self._gaps: list[tuple[float, int]] = []  # seconds before each of so many tokens, not yet told
        self._closing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        what = self.version.key if self.version else "base"
        return f"<Lease {self.id} {self.tenant} {what} {self.prompt_tokens}+{self.output_tokens} tokens>"

    def progressed(self, part: str, prompt_tokens: int, output_tokens: int, cached_tokens: int) -> None:
        """The engine's report on one part of the call; totals that go backwards are ignored."""
        prompt, output, cached = self._parts.get(part, (0, 0, 0))
        if output_tokens < output or (output_tokens == output and prompt_tokens <= prompt):
            return
        self._parts[part] = max(prompt, prompt_tokens), output_tokens, max(cached, cached_tokens)
        self.prompt_tokens += max(0, prompt_tokens - prompt)
        self.output_tokens += output_tokens - output
        self.cached_tokens += max(0, cached_tokens - cached)
        now = self._owner.now()
        if self.first_token_after is None and output_tokens:
            self.first_token_after = now - self._since
        if self.streamed and output_tokens > output:
            self._time_tokens(output_tokens - output, now)
        counted = self._counted[2]
        if counted == 0 or self.output_tokens - counted >= REPORT_EVERY:
            self._report()

    def finished(self, reasons: Sequence[str | None]) -> None:
        """A part of the call has ended, with this reason for each of its answers."""
        known = [reason for reason in (self.finish, *reasons) if reason]
        self.finish = "length" if "length" in known else next(iter(known), None)

    async def close(self, outcome: Outcome | None = None) -> None:
        """Ends the call in the engine if it still runs, then gives slot and place back. Idempotent.

        Runs to its end even if the caller is cancelled meanwhile.
        """
        if self._closing is None:
            if outcome is not None:
                self.outcome = outcome
            self._closing = self._owner.spawn(self._close())
        await asyncio.shield(self._closing)

    @property
    def age(self) -> float:
        """Seconds since the lease was asked for."""
        return self._owner.now() - self._since

    @property
    def closing(self) -> bool:
        return self._closing is not None

    async def _close(self) -> None:
        try:
            if self.work is not None and self.outcome != "completed":
                await self.work.abort()
        finally:
            self._report()
            self._owner.closed(self)

    def _report(self) -> None:
        now = (self.prompt_tokens, self.cached_tokens, self.output_tokens)
        new = (after - before for after, before in zip(now, self._counted, strict=True))
        self._owner.metrics.consumed(self.tenant, *new)
        if self._token_times is not None:
            for gap, tokens in self._gaps:
                for _ in range(tokens):
                    self._token_times.gap(gap)
            self._gaps.clear()
        self._counted = now
        self._owner.progressed(self)

    def _time_tokens(self, new: int, now: float) -> None:
        if self._token_times is None:
            self._token_times = self._owner.metrics.token_times(self.tenant)
            self._token_times.first(now - self._since)
        else:
            self._gaps.append(((now - self._last_token) / new, new))
        self._last_token = now


def told_of(lease: Lease) -> dict[str, Any]:
    """What the log line says of a request that ran."""
    first = lease.first_token_after
    return {
        "adapter": lease.version.adapter if lease.version else None,
        "version": lease.version.number if lease.version else None,
        "outcome": lease.outcome,
        "prompt_tokens": lease.prompt_tokens,
        "cached_tokens": lease.cached_tokens,
        "output_tokens": lease.output_tokens,
        "cold": lease.load_seconds > 0,
        "queue_seconds": round(lease.queued_for, 4),
        "load_seconds": round(lease.load_seconds, 4),
        "first_token_seconds": None if first is None else round(first, 4),
    } | ({"code": lease.code} if lease.code else {})
