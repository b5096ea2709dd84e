"""What a process answers. FastAPI looks at each function once, however many apps there are (in tests)."""

from __future__ import annotations

from functools import cache

from fastapi import APIRouter

from server.http import (
    account,
    admin,
    docs,
    inference,
    maintenance,
    observation,
    operations,
    people,
    reports,
    residency,
    self_service,
)
from server.http.auth import SINGLE


@cache
def router_of(internal: APIRouter | None = None) -> APIRouter:
    """All routes for customers and operators; of a replica, whose gateways ask it, ``internal`` instead."""
    whole = APIRouter(dependencies=[SINGLE])
    if internal is not None:
        whole.include_router(internal)
        whole.include_router(operations.router)
        return whole
    for router in (
        inference.router,
        inference.tokens,
        admin.router,
        observation.router,
        residency.router,
        maintenance.router,
        people.router,
        reports.operators,
        reports.customers,
        account.router,
        self_service.router,
        operations.router,
        docs.router,
    ):
        whole.include_router(router)
    return whole
