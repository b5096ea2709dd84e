"""A running server's API, as the command line calls it: the operators', or the customers' with such a key."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote

from server import __version__

if TYPE_CHECKING:
    import httpx  # imported by who makes a client: it takes as long as all the rest of a command

ADMIN = "/admin/v1"
# What a command has in the place of a customer that was not named: the one whose key it is.
OWN = "@own"
_CUSTOMERS_KEY = re.compile(r"lp-[A-Za-z0-9_-]{43}", re.ASCII)
# What a customer may say of its usage and audit beside itself.
_OWN_REPORTS = {
    "usage": {"adapter", "by", "from", "to", "key", "percentiles"},
    "audit": {"from", "to", "after", "limit"},
}
# An upload is answered when the engine has tried the adapter, which waits for what runs.
_UPLOAD_SECONDS = 900.0
# Without a byte of an answer. A gateway answers before that without its slow replicas.
SECONDS = 30.0


class RemoteError(Exception):
    """``code`` is the server's, or says why there was no answer of its; ``str`` is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def own_path(path: tuple[str | int, ...], query: Mapping[str, Any], tenant: str) -> tuple[str | int, ...]:
    """Where ``tenant`` asks with its own key what an operator asks at ``path`` below ``/admin/v1``.

    Raises RemoteError (``operator_only``) for what there is not for customers.
    """
    whose = path[1] if path[:1] == ("tenants",) and len(path) > 1 else query.get("tenant")
    if whose not in (None, OWN, tenant):
        raise RemoteError("operator_only", f"This key is {tenant}'s, and says nothing of {whose}.")
    match path:
        case ("tenants", _, ("adapters" | "keys") as what, *rest):
            return (what, *rest)
        case ("tenants", _) | ("tenants", _, "limits"):
            return ("me",)
        case (("usage" | "audit") as what,):
            more = [n for n, v in query.items() if v is not None and n not in (*_OWN_REPORTS[what], "tenant")]
            if not more or more == ["order"]:
                return path
            raise RemoteError("operator_only", f"Only the operator may name {' or '.join(more)}.")
    raise RemoteError("operator_only", "Only an admin key can ask this, and the key given is a customer's.")


class Answer(dict[str, Any]):
    """An object of an answer, whose fields are looked for by name: RemoteError says which is not there."""

    def __missing__(self, name: str) -> NoReturn:
        raise RemoteError(
            "answer_incomplete",
            f"The answer has no `{name}`, which this release ({__version__}) expects: the server is of"
            " another one, or no Loraplex. Is --url (LORAPLEX_URL) right?",
        )


class AdminClient:
    """One server and the key it is asked with. Every call raises RemoteError for all but success.

    With a customer's key the paths are those of the customer's own API; see ``own_path``.
    """

    def __init__(self, url: str, key: str, transport: httpx.BaseTransport | None = None) -> None:
        httpx = _quickly_imported()

        self.url = url
        self._seems_customers = _CUSTOMERS_KEY.fullmatch(key) is not None
        self._me: dict[str, Any] | None = None
        try:
            self._http = httpx.Client(
                base_url=url,
                headers={"Authorization": f"Bearer {key}"},
                timeout=SECONDS,
                transport=transport,
                # The system's certificates take longer to read than most answers to come.
                verify=not url.startswith("http://"),
            )
        except httpx.InvalidURL as exc:
            raise RemoteError("url_invalid", f"{url} is not a URL: {exc}") from exc
        except UnicodeEncodeError as exc:
            raise RemoteError("key_invalid", "A key has ASCII characters only.") from exc

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def get(self, *path: str | int, **query: str | float | None) -> Any:
        """The answer's document; ``path`` is below ``/admin/v1``, in parts that are quoted here."""
        asked = {name: value for name, value in query.items() if value is not None}
        return self._document(self._ask("GET", path, params=asked))

    def post(self, *path: str | int, body: Mapping[str, Any], seconds: float = SECONDS, **query: int) -> Any:
        """``seconds``: how long the answer may take."""
        return self._document(self._ask("POST", path, json=body, params=query, timeout=seconds))

    def patch(self, *path: str | int, body: Mapping[str, Any]) -> Any:
        return self._document(self._ask("PATCH", path, json=body))

    def delete(self, *path: str | int) -> None:
        self._ask("DELETE", path)

    def upload(
        self, *path: str | int, files: Mapping[str, IO[bytes]], key: str, query: Mapping[str, Any]
    ) -> Any:
        """Sends open files as they are read, in fields of their names; ``key`` is the Idempotency-Key."""
        headers = {"Idempotency-Key": key}
        options = {"files": files, "headers": headers, "params": query, "timeout": _UPLOAD_SECONDS}
        return self._document(self._ask("POST", path, **options))

    def download(self, *path: str | int, to: Path) -> None:
        """Writes what is there to ``to``, as it comes; nothing is left of a download that breaks."""
        import httpx

        part = to.with_name(f"{to.name}.part")
        try:
            with self._http.stream("GET", self._url(path, {})[0], timeout=_UPLOAD_SECONDS) as answer:
                if not answer.is_success:
                    answer.read()
                    self._refused(answer)
                with part.open("wb") as file:
                    for piece in answer.iter_bytes():
                        file.write(piece)
            part.replace(to)
        except httpx.HTTPError as exc:
            self._unanswered(exc)
        except OSError as exc:
            raise RemoteError("file_unwritable", f"{to} cannot be written: {exc}") from exc
        finally:
            part.unlink(missing_ok=True)

    def me(self) -> dict[str, Any] | None:
        """``/v1/me`` with a customer's key; None with an operator's, which has another form."""
        if self._me is None and self._seems_customers:
            try:
                self._me = self._document(self._send("GET", "/v1/me"))
            except RemoteError as exc:
                if exc.code != "permission_denied":  # as an admin key is, whatever its form
                    raise
                self._seems_customers = False
        return self._me

    @contextmanager
    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
        """The documents of a stream of events, until ``[DONE]``."""
        import httpx

        try:
            with self._http.stream("POST", path, json=body, timeout=_UPLOAD_SECONDS) as answer:
                if not answer.is_success:
                    answer.read()
                    self._refused(answer)
                yield _documents(answer.iter_lines())
        except httpx.HTTPError as exc:
            self._unanswered(exc)

    def ready(self) -> dict[str, Any]:
        """``/ready``, also of a server that is not."""
        import httpx

        try:
            return self._document(self._http.get("/ready"))
        except httpx.HTTPError as exc:
            self._unanswered(exc)

    def metrics(self) -> str:
        """The page that Prometheus reads."""
        return self._send("GET", "/metrics").text

    def _url(self, path: tuple[str | int, ...], query: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
        """Where ``path`` is for this key, and what of ``query`` is asked there."""
        if not all(str(part).strip(".") for part in path):  # which a URL takes for a step upwards
            raise RemoteError("name_invalid", "A name is not empty, nor of dots alone.")
        root = ADMIN
        if (me := self.me()) is not None:
            root, path = "/v1", own_path(path, query, me["tenant"]["id"])
            query = {n: v for n, v in query.items() if n not in ("tenant", "order")}
        elif OWN in path:
            raise RemoteError(
                "tenant_missing", "Name the customer first; only a customer's own key says who."
            )
        return f"{root}/{'/'.join(quote(str(part), safe='') for part in path)}", query

    def _ask(self, method: str, path: tuple[str | int, ...], **options: Any) -> httpx.Response:
        url, options["params"] = self._url(path, options.get("params") or {})
        answer = self._send(method, url, **options)
        if answer.content and "json" not in answer.headers.get("content-type", ""):
            raise self._stranger(answer)
        return answer

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        import httpx

        try:
            answer: httpx.Response = self._http.request(method, path, **options)
        except httpx.HTTPError as exc:
            self._unanswered(exc)
        except ValueError as exc:  # NaN, and arguments that are no UTF-8
            raise RemoteError("value_invalid", f"This cannot be sent as JSON: {exc}.") from exc
        return answer if answer.is_success else self._refused(answer)

    def _document(self, answer: httpx.Response) -> Answer:
        try:
            document = json.loads(answer.content, object_hook=Answer)
        except ValueError as exc:
            raise self._stranger(answer) from exc
        if not isinstance(document, Answer):
            raise self._stranger(answer)
        return document

    def _refused(self, answer: httpx.Response) -> NoReturn:
        try:
            error = answer.json()["error"]
            raise RemoteError(str(error["code"]), str(error["message"]))
        except (ValueError, KeyError, TypeError) as exc:
            raise self._stranger(answer) from exc

    def _stranger(self, answer: httpx.Response) -> RemoteError:
        return RemoteError(
            f"http_{answer.status_code}",
            f"{answer.url} did not answer as Loraplex does; is --url (LORAPLEX_URL) right?",
        )

    def _unanswered(self, exc: httpx.HTTPError) -> NoReturn:
        import httpx

        if isinstance(exc, httpx.UnsupportedProtocol):
            raise RemoteError("url_invalid", f"{self.url} must begin with http:// or https://.") from exc
        if isinstance(exc, httpx.ConnectError | httpx.ConnectTimeout):
            raise RemoteError(
                "no_connection",
                f"No connection to {self.url} ({exc or 'timed out'}). Is the server running there?"
                " Name another with --url or LORAPLEX_URL.",
            ) from exc
        if isinstance(exc, httpx.TimeoutException):
            raise RemoteError(
                "timeout", f"{self.url} took too long; what was asked may still happen."
            ) from exc
        raise RemoteError("connection_lost", f"The connection to {self.url} broke: {exc}") from exc


def _quickly_imported() -> Any:
    """httpx without its own command line, which imports more than all the rest of it and can be missed."""
    own = "httpx._main"
    if is_missing := own not in sys.modules:
        sys.modules[own] = None  # type: ignore[assignment]
    try:
        import httpx
    finally:
        if is_missing:
            del sys.modules[own]
    return httpx


def _documents(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """What the lines of an event stream hold; RemoteError for an error among them."""
    for line in lines:
        data = line.removeprefix("data: ")
        if data == line or data == "[DONE]":
            continue
        document = json.loads(data)
        if error := document.get("error"):
            raise RemoteError(str(error.get("code")), str(error.get("message")))
        yield document
