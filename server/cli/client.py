"""A running server's admin API, as the command line calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote

if TYPE_CHECKING:
    import httpx  # imported by who makes a client: it takes as long as all the rest of a command

ADMIN = "/admin/v1"
# An upload is answered when the engine has tried the adapter, which waits for what runs.
_UPLOAD_SECONDS = 900.0
_SECONDS = 30.0


class RemoteError(Exception):
    """``code`` is the server's, or says why there was no answer of its; ``str`` is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class AdminClient:
    """One server and the key it is asked with. Every call raises RemoteError for all but success."""

    def __init__(self, url: str, key: str, transport: httpx.BaseTransport | None = None) -> None:
        import httpx

        self.url = url
        try:
            self._http = httpx.Client(
                base_url=url,
                headers={"Authorization": f"Bearer {key}"},
                timeout=_SECONDS,
                transport=transport,
            )
        except httpx.InvalidURL as exc:
            raise RemoteError("url_invalid", f"{url} is not a URL: {exc}") from exc
        except UnicodeEncodeError as exc:
            raise RemoteError("key_invalid", "A key has ASCII characters only.") from exc

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def get(self, *path: str | int, **query: str | int | None) -> Any:
        """The answer's document; ``path`` is below ``/admin/v1``, in parts that are quoted here."""
        asked = {name: value for name, value in query.items() if value is not None}
        return self._ask("GET", path, params=asked).json()

    def post(self, *path: str | int, body: Mapping[str, Any], seconds: float = _SECONDS, **query: int) -> Any:
        """``seconds``: how long the answer may take."""
        return self._ask("POST", path, json=body, params=query, timeout=seconds).json()

    def patch(self, *path: str | int, body: Mapping[str, Any]) -> Any:
        return self._ask("PATCH", path, json=body).json()

    def delete(self, *path: str | int) -> None:
        self._ask("DELETE", path)

    def upload(self, *path: str | int, files: Mapping[str, IO[bytes]]) -> Any:
        """Sends open files as they are read, in fields of their names."""
        return self._ask("POST", path, files=files, timeout=_UPLOAD_SECONDS).json()

    def metrics(self) -> str:
        """The page that Prometheus reads."""
        return self._send("GET", "/metrics").text

    def _ask(self, method: str, path: tuple[str | int, ...], **options: Any) -> httpx.Response:
        if not all(str(part).strip(".") for part in path):  # which a URL takes for a step upwards
            raise RemoteError("name_invalid", "A name is not empty, nor of dots alone.")
        parts = "/".join(quote(str(part), safe="") for part in path)
        answer = self._send(method, f"{ADMIN}/{parts}", **options)
        if answer.content and "json" not in answer.headers.get("content-type", ""):
            raise self._stranger(answer)
        return answer

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        import httpx

        try:
            answer = self._http.request(method, path, **options)
        except httpx.HTTPError as exc:
            self._unanswered(exc)
        if answer.is_success:
            return answer
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
