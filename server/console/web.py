"""``/console``: the way in and out, and what every page shares; ``operator`` and ``customer`` have the pages.

The console is a layer around the app: it owns ``/console`` and asks everything else of the app below it.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import __version__
from server.console import formats
from server.console.api import Api, Refused
from server.console.sessions import Role, Session, Sessions

if TYPE_CHECKING:
    from server.console.provided import Provided

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
COOKIE = "loraplex_session"
MAX_FORM = 4096
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
SAFE = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
BRIDGED = ("v1/", "admin/v1/")
WRONG = "This key is not valid here. Sign in with the admin key or with a customer's own key."


class Page:
    """One request for a page: who asks, the API with that one's key, and the way to an answer."""

    def __init__(self, console: Console, request: Request, session: Session) -> None:
        self.request = request
        self.session = session
        self.api = console.api(request, session.key)
        self._console = console

    def api_of(self, key: str) -> Api:
        """The API with another key than the session's."""
        return self._console.api(self.request, key)

    @property
    def root(self) -> str:
        """Where the console lies, without a slash at the end."""
        return self._console.root(self.request)

    @property
    def base(self) -> str:
        """The base model's public name."""
        return self._console.model

    @property
    def query(self) -> dict[str, str]:
        """The query's fields, the last of those with the same name."""
        return dict(self.request.query_params)

    def show(self, template: str, *, status: int = 200, **values: object) -> Response:
        """The page that ``template`` makes of ``values``."""
        return self._console.render(self.request, template, status, session=self.session, **values)


PageHandler = Callable[[Page], Awaitable[Response]]


class Console:
    """ASGI middleware: answers ``/console``, leads there from ``/`` and ``/ui``, passes the rest on."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        pages: Mapping[Role, Mapping[str, PageHandler]],
        forms: Mapping[Role, Mapping[str, PageHandler]],
        model: str,
        provided: Provided | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._pages = pages
        self._forms = forms
        self.model = model
        self._provided = provided
        self._clock = clock
        self._sessions = Sessions()
        self._owner: object = None
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters.update(formats.FILTERS)
        self._site = self._routes()

    def _routes(self) -> Starlette:
        def all_of(kind: Mapping[Role, Mapping[str, PageHandler]]) -> dict[str, None]:
            return dict.fromkeys(path for pages in kind.values() for path in pages)

        routes = [
            Route("/sign-in", self._sign_in, methods=["GET", "POST"]),
            Route("/sign-out", self._sign_out, methods=["POST"]),
            Route("/ticket", self._ticket, methods=["POST"]),
            Route("/enter", self._enter, methods=["GET"]),
            *(self._provided.routes(self) if self._provided else []),
            Mount("/api", self._bridge),
            Mount("/static", StaticFiles(directory=HERE / "static")),
            *(Route(path, self._page(self._forms, path), methods=["POST"]) for path in all_of(self._forms)),
            *(Route(path, self._page(self._pages, path), methods=["GET"]) for path in all_of(self._pages)),
        ]
        handlers = {Refused: self._refused, HTTPException: self._failed}
        return Starlette(routes=[Mount("/console", routes=routes)], exception_handlers=handlers)

    async def _below(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app without the console; the pages' own app left its mark in the scope."""
        await self._app({**scope, "app": self._owner}, receive, send)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._owner = scope.get("app")
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else ""
        if path in ("/", "/ui", "/ui/", "/console"):
            location = scope.get("root_path", "") + "/console/"
            await RedirectResponse(location, 307)(scope, receive, send)
        elif path.startswith("/console/api/"):
            await self._site(scope, receive, send)
        elif path.startswith("/console/"):
            await self._site(scope, receive, _with_headers(send))
        else:
            await self._app(scope, receive, send)

    def api(self, request: Request, key: str) -> Api:
        """The API for this browser, with ``key``."""
        client = request.client
        return Api(self._below, key, (client.host, client.port) if client else ("", 0))

    def render(self, request: Request, template: str, status: int = 200, **values: object) -> Response:
        """What ``template`` makes of ``values``, the root of all links among them."""
        root = self.root(request)
        shared = {
            "root": root,
            "server_version": __version__,
            "model": self.model,
            "path": "/console" + request.url.path.removeprefix(root),
            "session": None,
            "provider": self._provided.label if self._provided else None,
        }
        page = self._templates.get_template(template).render(shared | values)
        return Response(page, status, media_type="text/html")

    def root(self, request: Request) -> str:
        """Where the console lies behind whatever is in front of the server, without a slash at the end."""
        mounted = str(request.scope["root_path"])
        before = mounted[: mounted.rindex("/console")] if "/console" in mounted else mounted
        return f"{before}/console"

    def _page(
        self, kind: Mapping[Role, Mapping[str, PageHandler]], path: str
    ) -> Callable[[Request], Awaitable[Response]]:
        """The page of whoever is signed in; the way to sign in for everybody else."""

        async def answer(request: Request) -> Response:
            session = self._session(request)
            if session is None:
                return self._to_sign_in(request)
            handler = kind.get(session.role, {}).get(path)
            if handler is None:
                raise HTTPException(404, "There is no such page.")
            return await handler(Page(self, request, session))

        return answer

    def _session(self, request: Request) -> Session | None:
        token = request.cookies.get(COOKIE)
        return self._sessions.find(token, self._clock()) if token else None

    def _to_sign_in(self, request: Request, reason: str = "") -> Response:
        if request.headers.get("X-Fragment"):
            return Response(status_code=401)  # the script goes to the sign-in page then
        after = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        query = f"?next={quote(after, safe='')}" + (f"&reason={quote(reason)}" if reason else "")
        return RedirectResponse(f"{self.root(request)}/sign-in{query}", 303)

    async def _sign_in(self, request: Request) -> Response:
        after = self.after(request)
        if request.method == "GET":
            reason = "Your session is over." if request.query_params.get("reason") else ""
            return self.render(request, "sign_in.html", error=reason, next=after)
        if not _same_origin(request):
            raise HTTPException(403, "This form was sent from another site.")
        if int(request.headers.get("content-length") or MAX_FORM + 1) > MAX_FORM:
            raise HTTPException(413, "A key is shorter than that.")
        form = parse_qs((await request.body()).decode("utf-8", "replace"))
        key = form.get("key", [""])[0].strip()
        try:
            session = await self.enter(request, key)
        except Refused as exc:
            return self.refuse(request, exc.status, WRONG if exc.status in (401, 403) else exc.message)
        return self.start(request, RedirectResponse(after, 303), session)

    def after(self, request: Request) -> str:
        """Where to go after signing in."""
        return _local(request.query_params.get("next", ""), self.root(request))

    def refuse(self, request: Request, status: int, error: str) -> Response:
        """The way in once more, and why it did not open."""
        return self.render(request, "sign_in.html", status, error=error, next=self.after(request))

    def onward(self, request: Request, address: str) -> Response:
        """A page that leads to ``address`` by itself.

        No redirect: to one that begins at another site the browser would not send a strict cookie.
        """
        return self.render(request, "onward.html", address=address)

    async def _who(self, request: Request, key: str) -> tuple[Role, str]:
        """Role and name of whoever has this key; Refused for a key of neither operator nor customer."""
        if not key.isascii() or not key.isprintable() or not key:
            raise Refused(401, "invalid_api_key", WRONG)
        api = self.api(request, key)
        try:
            me = await api.get("/v1/me")
        except Refused as exc:
            if exc.code != "permission_denied":
                raise
            return "operator", str((await api.get("/admin/v1/me"))["name"])
        return "customer", str(me["tenant"]["id"])

    async def enter(self, request: Request, key: str) -> Session:
        """A session of whoever has ``key``, for ``start``; Refused as ``_who``."""
        role, name = await self._who(request, key)
        return self._sessions.make(key, role, name, self._clock())

    def start(self, request: Request, answer: Response, session: Session) -> Response:
        """``answer`` with the cookie of ``session``, in the place of the one before."""
        old = request.cookies.get(COOKIE)
        if old:
            self._sessions.end(old)
        answer.set_cookie(
            COOKIE,
            self._sessions.start(session),
            max_age=int(session.lifetime),
            path=self.root(request),
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return answer

    async def _sign_out(self, request: Request) -> Response:
        session = self._session(request)
        form = parse_qs((await request.body())[:MAX_FORM].decode("utf-8", "replace"))
        if session is not None:
            if not hmac.compare_digest(form.get("csrf", [""])[0].encode(), session.csrf.encode()):
                raise HTTPException(403, "This form is not from this console.")
            self._sessions.end(request.cookies[COOKIE])
        answer = await self._way_out(request, session)
        answer.delete_cookie(COOKIE, path=self.root(request))
        return answer

    async def _way_out(self, request: Request, session: Session | None) -> Response:
        """Through the provider, where it was the way in."""
        if self._provided is not None and session is not None:
            address = await self._provided.leave(self, request, session)
            if address is not None:
                return self.onward(request, address)
        return RedirectResponse(f"{self.root(request)}/sign-in", 303)

    async def _ticket(self, request: Request) -> Response:
        """For a program that has a key: an address that signs a person in once, within ten minutes."""
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not key:
            return JSONResponse({"error": {"message": "Send a key as a Bearer token."}}, 401)
        try:
            await self._who(request, key)
        except Refused as exc:
            return JSONResponse({"error": {"message": exc.message, "code": exc.code}}, exc.status)
        ticket = self._sessions.ticket(key, self._clock())
        return JSONResponse({"path": f"{self.root(request)}/enter?ticket={ticket}"}, 201)

    async def _enter(self, request: Request) -> Response:
        key = self._sessions.redeem(request.query_params.get("ticket", ""), self._clock())
        if key is None:
            return self.refuse(request, 401, "This address was used before, or is too old.")
        answer = RedirectResponse(f"{self.root(request)}/", 303)
        return self.start(request, answer, await self.enter(request, key))

    async def _bridge(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a script's call on to the API, with the session's key in the place of the cookie."""
        request = Request(scope)
        session = self._session(request)
        path = scope["path"].removeprefix(scope["root_path"]).lstrip("/")
        refusal = self._refusal(request, session, path)
        if refusal is not None or session is None:
            status, message = refusal or (401, "Sign in first.")
            body = {"error": {"message": message, "type": "console_error", "param": None, "code": "console"}}
            await JSONResponse(body, status)(scope, receive, send)
            return
        tenant = request.headers.get("X-Playground")
        key = session.key if tenant is None else session.playground.get(tenant, session.key)
        dropped = (b"cookie", b"authorization", b"x-csrf-token", b"x-playground")
        headers = [(name, value) for name, value in scope["headers"] if name not in dropped]
        headers.append((b"authorization", f"Bearer {key}".encode()))
        root = str(scope["root_path"]).removesuffix("/console/api")
        inner = {name: scope[name] for name in scope if name not in ("state", "endpoint", "path_params")}
        whole = f"{root}/{path}"
        inner |= {"path": whole, "raw_path": quote(whole).encode(), "root_path": root, "headers": headers}
        inner["app_root_path"] = root
        await self._below(inner, receive, send)

    def _refusal(self, request: Request, session: Session | None, path: str) -> tuple[int, str] | None:
        """Status and reason why this call is not passed on; None if it is."""
        if session is None:
            return 401, "Sign in first."
        if not path.startswith(BRIDGED):
            return 404, "There is no such call."
        if request.method in ("GET", "HEAD"):
            return None
        token = request.headers.get("X-CSRF-Token", "")
        if not hmac.compare_digest(token.encode(), session.csrf.encode()) or not _same_origin(request):
            return 403, "This call is not from this console. Load the page again."
        return None

    async def _refused(self, request: Request, exc: Exception) -> Response:
        assert isinstance(exc, Refused)
        session = self._session(request)
        if exc.status == 401 and session is not None:
            self._sessions.end(request.cookies[COOKIE])
            return self._to_sign_in(request, "key")
        return self._error(request, exc.status if exc.status >= 400 else 502, exc.message, exc.code)

    async def _failed(self, request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        return self._error(request, exc.status_code, exc.detail)

    def _error(self, request: Request, status: int, message: str, code: str = "") -> Response:
        values = {"session": self._session(request), "message": message, "code": code, "error_status": status}
        return self.render(request, "error.html", status, **values)


def _same_origin(request: Request) -> bool:
    """Whether a page of this host sent it, as far as the browser says."""
    site = request.headers.get("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none"):
        return False
    origin = request.headers.get("origin")
    return origin is None or origin.partition("://")[2] == request.headers.get("host")


def _local(path: str, root: str) -> str:
    """Where to go after signing in: a page of this console, never another host."""
    good = path.startswith(f"{root}/") and "//" not in path and "\\" not in path
    return path if good and "/sign-" not in path else f"{root}/"


def _with_headers(send: Send) -> Send:
    async def tagged(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            kind = headers.get("content-type", "")
            for name, value in SAFE.items():
                if name == "Cache-Control" and not kind.startswith("text/html"):
                    continue  # the stylesheet and the script keep their ETag
                headers[name] = value
        await send(message)

    return tagged
