"""What a process answers. FastAPI looks at each function once, however many apps there are (in tests)."""

from __future__ import annotations

from fastapi import APIRouter

from server.http import (
    account,
    adapter_calls,
    admin,
    batches,
    docs,
    inference,
    maintenance,
    observation,
    operations,
    people,
    reports,
    residency,
    rollouts,
    self_service,
)
from server.http.auth import SINGLE

# By the identity of ``internal``, which is a module's and stays: a router has no hash.
_made: dict[int, APIRouter] = {}


def router_of(internal: APIRouter | None = None) -> APIRouter:
    """All routes for customers and operators; of a replica, whose gateways ask it, ``internal`` instead."""
    return _made.get(id(internal)) or _made.setdefault(id(internal), _router_of(internal))


def _router_of(internal: APIRouter | None) -> APIRouter:
    whole = APIRouter(dependencies=[SINGLE])
    if internal is not None:
        whole.include_router(internal)
        whole.include_router(operations.router)
        return whole
    for router in (
        inference.router,
        inference.tokens,
        batches.router,
        batches.operators,
        admin.router,
        observation.router,
        residency.router,
        maintenance.router,
        people.router,
        reports.operators,
        reports.customers,
        account.router,
        self_service.router,
        adapter_calls.both.operators,
        adapter_calls.both.customers,
        rollouts.operators,
        rollouts.both.operators,
        rollouts.both.customers,
        operations.router,
        docs.router,
    ):
        whole.include_router(router)
    return whole
