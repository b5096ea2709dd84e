"""Errors as OpenAI's and Anthropic's clients expect them, in a document and in the middle of a stream."""

from __future__ import annotations

import json
from typing import Any

from adapters.errors import AdapterError
from server.errors import ServerError, body_of, status_of

# https://docs.anthropic.com/en/api/errors; the statuses stay ours.
_ANTHROPIC_TYPE = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


def speaks_anthropic(path: str) -> bool:
    """Whether the route with this template answers Anthropic's clients."""
    return path.startswith("/v1/messages")


def anthropic(body: dict[str, Any], status: int) -> dict[str, Any]:
    """OpenAI's error ``body`` as Anthropic's; ``code`` is beside the type, as everywhere."""
    error = body["error"]
    type_ = _ANTHROPIC_TYPE.get(status, "invalid_request_error")
    return {"type": "error", "error": {"type": type_, "message": error["message"], "code": error["code"]}}


def error_event(kind: str, error: ServerError | AdapterError, number: int) -> str:
    """The event that ends a stream; ``number`` is that of the events before it."""
    body = body_of(error)
    if kind == "messages":
        return f"event: error\ndata: {json.dumps(anthropic(body, status_of(error)[0]))}\n\n"
    if kind == "responses":
        told = {name: body["error"][name] for name in ("code", "message", "param")}
        return f"event: error\ndata: {json.dumps({'type': 'error', **told, 'sequence_number': number})}\n\n"
    return f"data: {json.dumps(body)}\n\n"
