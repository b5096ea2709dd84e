"""Puts the console around an app."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.applications import Starlette

from server.console import customer, operator
from server.console.sessions import Role
from server.console.web import Console, PageHandler


def install(app: Starlette, model: str) -> None:
    """``app`` answers ``/console`` from now on; ``model`` is the base model's public name."""
    pages: Mapping[Role, Mapping[str, PageHandler]] = {"operator": operator.PAGES, "customer": customer.PAGES}
    app.add_middleware(Console, pages=pages, forms={"operator": operator.FORMS}, model=model)
