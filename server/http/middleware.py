"""What every route shares: request ids, the access log line, error bodies, and clients that leave."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.errors import AdapterError, StorageFailed, StorageFull, cause_of
from server.errors import (
    Internal,
    ServerError,
    body_of,
    envelope,
    headers_of,
    status_of,
)
from server.http.verbs import allow, methods_of
from server.inference.completion import new_request_id
from server.inference.dialects.messages import anthropic_error, speaks_anthropic
from server.inference.dialects.registry import SURFACES
from server.logs import LINE, REQUEST, RequestIds, traceparent
from server.telemetry.spans import TRACE, Tracer, end_request

logger = logging.getLogger("loraplex.access")
T = TypeVar("T")

# nginx's status for a client that left; nobody reads it, but it is counted and logged.
CLIENT_LEFT = 499
# Scrapes and probes would fill the log; what makes a server not ready has lines of its own.
_ASKED_BY_MACHINES = frozenset({"/health", "/ready", "/metrics"})
_CLIENT_ID = re.compile(r"[\x21-\x7e]{1,128}")


# What a page may read of an answer beside its body.
_EXPOSED = (
    "Retry-After", "X-Loraplex-Version", "X-Request-Id", "X-RateLimit-Limit-Requests",
    "X-RateLimit-Limit-Tokens", "X-RateLimit-Remaining-Requests", "X-RateLimit-Remaining-Tokens",
    "X-RateLimit-Reset-Requests", "X-RateLimit-Reset-Tokens",
)  # fmt: skip
# Paths of calls, none of which ends with a slash.
_CALLS = (
    "/v1/", "/admin/v1/", "/health/", "/ready/", "/metrics/", "/docs/", *(f"{one.path}/" for one in SURFACES),
    "/redoc/",
)  # fmt: skip


class Origins:
    """ASGI middleware: lets pages of the origins that ``allowed`` names, now, call from a browser.

    With a key and without cookies.
    """

    def __init__(self, app: ASGIApp, allowed: Callable[[], Sequence[str]]) -> None:
        self._app = app
        self._allowed = allowed
        self._origins: Sequence[str] = ()
        self._inside = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (origins := self._allowed()) != self._origins:
            self._origins, self._inside = origins, self._for(origins)
        await self._inside(scope, receive, send)

    def _for(self, origins: Sequence[str]) -> ASGIApp:
        if not origins:
            return self._app
        return CORSMiddleware(
            self._app,
            allow_origins=list(origins),
            allow_methods=["GET", "HEAD", "POST", "PATCH", "DELETE", "PUT"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
            max_age=600,
        )


class ClientLeft(Exception):
    """The client hung up before there was an answer."""


class RequestContext:
    """ASGI middleware: an id of our own for every request, and one log line when it is over.

    A client's ``X-Request-Id`` is echoed, never used. ``request.state.headers`` is called for more headers
    when the answer begins, whatever it is.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer | None = None) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if path.endswith("/") and path.startswith(_CALLS):
            scope["path"] = path.rstrip("/")  # a redirect would name the host that a proxy asked
        started = time.monotonic()
        request_id = new_request_id()
        shown = _client_id(scope) or request_id
        log: dict[str, Any] = {"request_id": request_id}
        if shown != request_id:
            log["client_request_id"] = shown
        given, began = _header(scope, b"traceparent"), time.time()
        is_traced = self._tracer is not None and path not in _ASKED_BY_MACHINES
        trace = self._tracer.begin(scope["method"], given, began) if self._tracer and is_traced else None
        TRACE.set(trace if trace is not None and trace.is_kept else None)
        ids = RequestIds(
            request_id,
            log.get("client_request_id"),
            trace.traceparent if trace else traceparent(given),
            is_kept=trace is None or trace.is_kept,
        )
        log["trace_id"] = ids.trace_id
        REQUEST.set(ids)
        LINE.set(log)
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, log=log, headers=dict)
        status = 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = {"x-request-id": shown, "traceparent": ids.traceparent, **state["headers"]()}
                encoded = [(name.encode(), value.encode()) for name, value in more.items()]
                message["headers"] = [*message["headers"], *encoded]
            await send(message)

        try:
            await self._app(scope, receive, tagged)
        except Exception as exc:
            logger.error("request failed", exc_info=exc, extra={"request_id": request_id})
            if status:
                raise  # a part of the answer is out; all that is left is to break the connection
            failed = _error(scope, body_of(Internal("The server failed on this request.")), 500)
            await failed(scope, receive, tagged)
        finally:
            if release := state.get("release"):
                release()
            log |= {"status": status, "seconds": round(time.monotonic() - started, 4)}
            path = matched_path(scope)
            level = logging.DEBUG if log.pop("quiet", False) or path in _ASKED_BY_MACHINES else logging.INFO
            logger.log(level, "%s %s", scope["method"], path, extra=log)
            if trace is not None and trace.is_kept:
                end_request(trace, scope["method"], path, log, began, state.get("operation"))


def _client_id(scope: Scope) -> str | None:
    text = _header(scope, b"x-request-id")
    return text if text and _CLIENT_ID.fullmatch(text) else None


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for known, value in scope["headers"] if known == name), None)


def matched_path(scope: Scope) -> str:
    """The route's template rather than the URL: bounded, and without anything a client made up."""
    route = scope.get("route")
    return getattr(route, "path", "(no route)")


def _error(
    scope: Scope, body: dict[str, Any], status: int, headers: dict[str, str] | None = None
) -> JSONResponse:
    """OpenAI's error ``body``, as the clients of this route read it."""
    told = anthropic_error(body, status) if speaks_anthropic(matched_path(scope)) else body
    return JSONResponse(told, status, headers)


async def while_connected(
    request: Request, work: Coroutine[Any, Any, T], discard: Callable[[T], Awaitable[None]]
) -> T:
    """``work``'s result; when the client hangs up first, ``work`` is cancelled and ClientLeft raised.

    A result that comes at the moment when this call is itself cancelled goes to ``discard``. The body must
    have been read: all that can still come from the client is its leaving.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled() and task.exception() is None:
            return task.result()
        raise ClientLeft
    except asyncio.CancelledError:
        if task.done() and not task.cancelled() and task.exception() is None:
            await discard(task.result())
        raise
    finally:
        watcher.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def install_error_handlers(app: FastAPI) -> None:
    """Every error leaves in OpenAI's shape, or in Anthropic's where its clients call, whoever raised it."""

    async def on_known(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, ServerError | AdapterError)
        request.state.log["code"] = exc.code
        status, _ = status_of(exc)
        if status == 500:
            logger.error("request failed", exc_info=exc, extra={"request_id": request.state.request_id})
        elif isinstance(exc, StorageFull | StorageFailed):  # no defect, so its cause and no traceback
            logger.error("%s, %s", exc.code, cause_of(exc), extra={"request_id": request.state.request_id})
        return _error(request.scope, body_of(exc), status, headers_of(exc))

    async def on_invalid(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, RequestValidationError)
        first = exc.errors()[0]
        param = ".".join(str(part) for part in first["loc"] if part != "body") or None
        message = f"{param}: {first['msg']}" if param else first["msg"]
        return JSONResponse(envelope(message, "invalid_request_error", "invalid_request", param), 422)

    async def on_http(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(exc.status_code, "invalid_request")
        message = f"{exc.detail}: {request.method} {request.url.path}"
        body = envelope(message, "invalid_request_error", code)
        headers = dict(exc.headers or {})
        if exc.status_code == 405:  # the router names those of one of the path's routes
            headers["Allow"] = allow(methods_of(request.app.router.routes, request.scope))
        return _error(request.scope, body, exc.status_code, headers)

    async def on_left(request: Request, exc: Exception) -> Response:
        return Response(status_code=CLIENT_LEFT)

    app.add_exception_handler(ServerError, on_known)
    app.add_exception_handler(AdapterError, on_known)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(ClientLeft, on_left)
    app.add_exception_handler(ClientDisconnect, on_left)
