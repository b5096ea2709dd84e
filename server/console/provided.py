"""The way into the console without a key: to the provider of identities, back, and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from server.accounts.sign_ins import SignIns, identity
from server.console.api import Refused
from server.console.oidc import BEGUN_S, Provider, SignInFailed
from server.console.sessions import Session
from server.errors import Forbidden
from server.settings.sign_in import SignIn

COOKIE = "loraplex_signing_in"


class Console(Protocol):
    """What this needs of the console."""

    def root(self, request: Request) -> str: ...
    def after(self, request: Request) -> str: ...
    def refuse(self, request: Request, status: int, error: str) -> Response: ...
    def onward(self, request: Request, address: str) -> Response: ...
    def start(self, request: Request, answer: Response, session: Session) -> Response: ...
    async def enter(self, request: Request, key: str) -> Session: ...


class Provided:
    """Signs people in whom ``Provider`` knows and whom the settings let in, as what these say."""

    def __init__(self, settings: SignIn, sign_ins: Callable[[], SignIns]) -> None:
        self.label = settings.oidc_label
        self._settings = settings
        self._sign_ins = sign_ins
        self._provider = Provider(settings)

    def routes(self, console: Console) -> list[Route]:
        """``/oidc`` leads to the provider, which leads to ``/oidc/callback``."""

        async def begin(request: Request) -> Response:
            return await self._begin(console, request)

        async def end(request: Request) -> Response:
            return await self._end(console, request)

        return [Route("/oidc", begin, methods=["GET"]), Route("/oidc/callback", end, methods=["GET"])]

    async def _begin(self, console: Console, request: Request) -> Response:
        after = console.after(request)
        try:
            url, kept = await self._provider.begin(f"{_outside(console, request)}/oidc/callback", after)
        except SignInFailed as exc:
            return console.refuse(request, 502, str(exc))
        answer = RedirectResponse(url, 303)
        # Lax: the provider's page leads back here, and that request must have it.
        answer.set_cookie(
            COOKIE,
            kept,
            max_age=BEGUN_S,
            path=f"{console.root(request)}/oidc",
            httponly=True,
            samesite="lax",
            secure=request.url.scheme == "https",
        )
        return answer

    async def _end(self, console: Console, request: Request) -> Response:
        try:
            known, after = await self._provider.end(
                request.cookies.get(COOKIE, ""), dict(request.query_params)
            )
            who = identity(known.claims, self._settings)
            key = self._sign_ins().admit(who, self._settings.oidc_hours)
            session = await console.enter(request, key)
            session.id_token, session.person = known.id_token, who.name
            session.lifetime = self._settings.oidc_hours * 3600
            answer = console.start(request, console.onward(request, after), session)
        except SignInFailed as exc:
            answer = console.refuse(request, 401, str(exc))
        except Forbidden as exc:
            answer = console.refuse(request, 403, exc.message)
        except Refused as exc:
            answer = console.refuse(request, exc.status, exc.message)
        answer.delete_cookie(COOKIE, path=f"{console.root(request)}/oidc")
        return answer

    async def leave(self, console: Console, request: Request, session: Session) -> str | None:
        """Ends what the sign-in made; the provider's address that signs out there, too, or None."""
        self._sign_ins().dismiss(session.key)
        if session.id_token is None:
            return None
        return await self._provider.way_out(session.id_token, f"{_outside(console, request)}/sign-in")


def _outside(console: Console, request: Request) -> str:
    """The console's address as the browser has it."""
    return f"{request.url.scheme}://{request.url.netloc}{console.root(request)}"
