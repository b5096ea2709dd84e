"""Puts the console around an app."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from starlette.applications import Starlette

from server.accounts.sign_ins import SignIns
from server.console import customer, operator
from server.console.sessions import Role
from server.console.web import Console, PageHandler
from server.settings import Settings


def install(app: Starlette, settings: Settings, sign_ins: Callable[[], SignIns]) -> None:
    """``app`` answers ``/console`` from now on."""
    pages: Mapping[Role, Mapping[str, PageHandler]] = {"operator": operator.PAGES, "customer": customer.PAGES}
    provided = None
    if settings.oidc_issuer:
        from server.console.provided import Provided  # with its libraries, which most starts do without

        provided = Provided(settings, sign_ins)
    app.add_middleware(
        Console,
        pages=pages,
        forms={"operator": operator.FORMS},
        model=settings.served_model_name,
        provided=provided,
    )
