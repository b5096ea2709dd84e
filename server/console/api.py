"""The API as a page asks it: calls of the same app in this process, with the key of the session.

So the console can show and change what that key may, and nothing else; limits, audit and logs are the API's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
from starlette.types import ASGIApp

TIMEOUT_S = 30.0


class Refused(Exception):
    """The API answered with an error; ``status`` 401 means that the key is no longer good."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


class Api:
    """``app`` is everything below the console; ``address`` is the browser's, for counting wrong keys."""

    def __init__(self, app: ASGIApp, key: str, address: tuple[str, int]) -> None:
        self._transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=address)
        self._headers = {"Authorization": f"Bearer {key}"}

    async def get(self, path: str, params: Mapping[str, Any] | None = None) -> Any:
        """The JSON that ``path`` answers; raises Refused for every status but 200."""
        return (await self._ask("GET", path, params)).json()

    async def status(self, path: str) -> tuple[int, Any]:
        """Status and JSON of ``path``, whatever they are: ``/ready`` answers with 503, too."""
        async with self._client() as client:
            answer = await client.get(path)
        return answer.status_code, answer.json()

    async def post(self, path: str, body: Any) -> Any:
        """The JSON of a POST; raises Refused unless it succeeded."""
        return (await self._ask("POST", path, None, body)).json()

    async def _ask(
        self, method: str, path: str, params: Mapping[str, Any] | None, body: Any = None
    ) -> httpx.Response:
        query = {name: value for name, value in (params or {}).items() if value not in (None, "")}
        async with self._client() as client:
            answer = await client.request(method, path, params=query, json=body)
        if answer.is_success:
            return answer
        try:
            error = answer.json()["error"]
            code, message = str(error.get("code")), str(error["message"])
        except (ValueError, KeyError, TypeError, AttributeError):
            code, message = "unknown", f"The server answered with status {answer.status_code}."
        raise Refused(answer.status_code, code, message)

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            transport=self._transport,
            base_url="http://127.0.0.1",
            headers=self._headers,
            timeout=TIMEOUT_S,
        )
