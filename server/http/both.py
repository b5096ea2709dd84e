"""Calls on a tenant's adapters that operators and customers have alike: one function, registered for both."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter

from server.http.auth import ADMIN, AdapterOwner, NamedTenant

F = TypeVar("F", bound=Callable[..., Any])


class Both:
    """Two routers below ``path``: for operators the path names the tenant, for customers their key does."""

    def __init__(self, path: str) -> None:
        named = f"/admin/v1/tenants/{{tenant}}/adapters{path}"
        self.operators = APIRouter(prefix=named, dependencies=[ADMIN], tags=["admin"])
        self.customers = APIRouter(prefix=f"/v1/adapters{path}", tags=["self-service"])

    def get(self, path: str, **options: Any) -> Callable[[F], F]:
        return self._on("GET", path, options)

    def post(self, path: str, **options: Any) -> Callable[[F], F]:
        return self._on("POST", path, options)

    def patch(self, path: str, **options: Any) -> Callable[[F], F]:
        return self._on("PATCH", path, options)

    def delete(self, path: str, **options: Any) -> Callable[[F], F]:
        return self._on("DELETE", path, options)

    def _on(self, method: str, path: str, options: dict[str, Any]) -> Callable[[F], F]:
        """Registers a function that takes the tenant as ``owner``."""

        def register(call: F) -> F:
            for router, owner in ((self.operators, NamedTenant), (self.customers, AdapterOwner)):
                router.add_api_route(path, _given(call, owner), methods=[method], **options)
            return call

        return register


def _given(call: Any, owner: Any) -> Any:
    """``call`` as FastAPI is to see it: with ``owner`` as the dependency that finds the tenant."""
    copy = types.FunctionType(
        call.__code__, call.__globals__, call.__name__, call.__defaults__, call.__closure__
    )
    copy.__kwdefaults__, copy.__doc__, copy.__module__ = call.__kwdefaults__, call.__doc__, call.__module__
    copy.__annotations__ = {**call.__annotations__, "owner": owner}
    return copy
