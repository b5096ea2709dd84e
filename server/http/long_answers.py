"""Documents as answers; those of megabytes are written in slices and sent in parts."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from adapters.awake import AwakeTimeout
from server.inference.completion import Completion
from server.inference.long_documents import is_long, written


class LongAnswer(Response):
    """JSON in parts. The connection of a client that takes none for ``client_timeout`` seconds is ended."""

    def __init__(self, parts: Sequence[bytes], client_timeout: float) -> None:
        self._parts = parts
        self._client_timeout = client_timeout
        length = {"content-length": str(sum(map(len, parts)))}
        super().__init__(headers=length, media_type="application/json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        limit: AwakeTimeout | None = None
        try:
            for number, part in enumerate(self._parts, 1):
                limit = AwakeTimeout(self._client_timeout)
                async with limit:
                    more = number < len(self._parts)
                    await send({"type": "http.response.body", "body": part, "more_body": more})
                await asyncio.sleep(0)  # a client that reads well lets nobody wait
        except TimeoutError:
            if limit is None or not limit.expired():
                raise


async def long_answer(document: Mapping[str, Any], client_timeout: float) -> Response:
    """``document``, which may be of any length."""
    return LongAnswer(await written(document), client_timeout)


async def answer_of(opened: Completion, client_timeout: float) -> Response:
    """The document that ``opened`` has."""
    if opened.parts is not None:
        return LongAnswer(opened.parts, client_timeout)
    assert opened.body is not None
    return (
        await long_answer(opened.body, client_timeout) if is_long(opened.body) else JSONResponse(opened.body)
    )
