"""What is told of a request and an upload as spans. Without traces it costs the look at a variable.

A request's spans are made when it has ended, from the numbers that its access line has; nothing happens by
the token.
Names are OpenTelemetry's for HTTP and for generative AI where there are any, else ``loraplex.…``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Protocol, Self

from server import __version__

_FAILED = frozenset({"failed", "unavailable", "quarantined", "cut"})


class Trace(Protocol):
    """A span that has begun; see ``server.telemetry.traces``. Times are in seconds since 1970."""

    @property
    def traceparent(self) -> str:
        """W3C's header that makes what others do a part of it."""

    @property
    def is_kept(self) -> bool:
        """Whether it is sampled; of others nothing needs to be told."""

    def child(self, name: str, began: float, attributes: Mapping[str, Any] | None = None) -> Self:
        """A part of it that began then; also of one that has ended."""

    def end(
        self,
        ended: float,
        attributes: Mapping[str, Any] | None = None,
        error: str | None = None,
        name: str | None = None,
    ) -> None:
        """``error`` is the code of what went wrong; ``name`` is its name from now on.

        Attributes that are None are left out.
        """


class Tracer(Protocol):
    """Where spans begin."""

    def begin(self, name: str, given: str | None, at: float) -> Trace:
        """What is done for a request; ``given`` is its ``traceparent``."""

    def keep(self, share: float) -> None:
        """The share that is kept of traces that begin here, from now on."""

    async def close(self) -> None:
        """Sends what is left; takes seconds at most."""


def tracer_of(url: str, share: float, role: str) -> Tracer | None:
    """None without a ``url``; then nothing of OpenTelemetry is imported."""
    if not url:
        return None
    from server.telemetry.traces import Traces

    about = {"service.version": __version__, "loraplex.role": role}
    return Traces(url, share, about)


# That of the request for which something is done, if it is kept.
TRACE: ContextVar[Trace | None] = ContextVar("trace", default=None)


def end_request(
    root: Trace, method: str, path: str, log: Mapping[str, Any], began: float, operation: str | None = None
) -> None:
    """Ends a request's span, with the parts that its access line ``log`` tells of.

    ``operation`` is what GenAI's conventions call an inference.
    """
    ended = began + log["seconds"]
    code = log.get("code") or (str(log["status"]) if log["status"] >= 500 else None)
    error = code if log["status"] >= 500 or log.get("outcome") in _FAILED else None
    if operation is not None and "queue_seconds" in log:
        _end_inference(root, operation, log, began, error)
    about = {
        "http.request.method": method,
        "http.route": path,
        "http.response.status_code": log["status"],
        "loraplex.tenant": log.get("tenant"),
        "loraplex.adapter": log.get("adapter"),
        "loraplex.version": log.get("version"),
        "loraplex.request_id": log["request_id"],
        "loraplex.client_request_id": log.get("client_request_id"),
        "loraplex.code": log.get("code"),
    }
    root.end(ended, about, error, f"{method} {path}")


def _end_inference(
    root: Trace, operation: str, log: Mapping[str, Any], began: float, error: str | None
) -> None:
    ended = began + log["seconds"]
    version = f"@{log['version']}" if log["version"] is not None else ""
    model = f"{log['adapter']}{version}" if log["adapter"] else str(log.get("model") or "base")
    about = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "loraplex",
        "gen_ai.request.model": log.get("model"),
        "gen_ai.response.model": model,
        "gen_ai.usage.input_tokens": log["prompt_tokens"],
        "gen_ai.usage.output_tokens": log["output_tokens"],
        "loraplex.cached_tokens": log["cached_tokens"],
        "loraplex.cold": log["cold"],
        "loraplex.outcome": log["outcome"],
    }
    inference = root.child(f"{operation} {model}", began, about)
    taken = began + log["queue_seconds"]
    queue = inference.child("queue", began)
    if log["cold"]:
        queue.child("load", taken - log["load_seconds"], {"loraplex.adapter": model}).end(taken)
    queue.end(taken)
    if log["first_token_seconds"] is not None:
        first = max(taken, min(ended, began + log["first_token_seconds"]))
        inference.child("prefill", taken).end(first)
        inference.child("decode", first, {"gen_ai.usage.output_tokens": log["output_tokens"]}).end(ended)
    inference.end(ended, error=error)


class Stages:
    """The parts of an upload, one after the other, as spans of the request that brought it; else nothing."""

    def __init__(self, tenant: str, adapter: str) -> None:
        self._root = TRACE.get()
        self._about = {"loraplex.tenant": tenant, "loraplex.adapter": adapter}
        self._upload: Trace | None = None
        self._stage: Trace | None = None
        if self._root is not None:
            self._upload = self._root.child("upload", time.time(), self._about)
            self.next("receiving")

    def next(self, stage: str, received: int | None = None) -> None:
        """The one before has ended, ``stage`` begins."""
        if self._upload is not None:
            now = time.time()
            if self._stage is not None:
                self._stage.end(now, {"loraplex.received_bytes": received})
            self._stage = self._upload.child(stage, now)

    def end(self, error: str | None = None) -> None:
        """All of it has ended, with the code of a refusal."""
        if self._upload is not None and self._stage is not None:
            now = time.time()
            self._stage.end(now, error=error)
            self._upload.end(now, error=error)
