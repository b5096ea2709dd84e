"""HEAD and OPTIONS for every call, and which methods one has."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from fastapi.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# What a router writes into a scope, for those who look at it afterwards.
_MATCHED = ("route", "endpoint", "path_params")


class Verbs:
    """ASGI middleware: HEAD is answered as GET without its body, OPTIONS with the methods of the path.

    The preflight of a page of another origin never comes here; see ``allow_origins``.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        methods = methods_of(self._routes, scope)
        if scope["method"] in methods or ("GET" not in methods and scope["method"] == "HEAD") or not methods:
            await self._app(scope, receive, send)
        elif scope["method"] == "HEAD":
            await self._head(scope, send)
        else:
            await Response(status_code=204, headers={"Allow": allow(methods)})(scope, receive, send)

    async def _head(self, scope: Scope, send: Send) -> None:
        """A stream ends at its beginning: for it, the client has left."""
        asked: dict[str, Any] = {**scope, "method": "GET"}
        begun = asyncio.Event()

        async def without_body(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b""})
                begun.set()

        async def left() -> Message:
            await begun.wait()
            return {"type": "http.disconnect"}

        try:
            await self._app(asked, left, without_body)
        finally:
            scope.update({name: asked[name] for name in _MATCHED if name in asked})


def methods_of(routes: Iterable[BaseRoute], scope: Scope) -> set[str]:
    """All methods of the path that ``scope`` asks for; none where there is no such path."""
    found = (route for route in routes if route.matches(scope)[0] is not Match.NONE)
    return {method for route in found for method in getattr(route, "methods", None) or ()}


def allow(methods: set[str]) -> str:
    """As the header ``Allow`` has it, with what this server adds."""
    more = {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())
    return ", ".join(sorted(methods | more))
