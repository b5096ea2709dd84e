"""Every error a client can see, and the one table that says how it looks.

    ServerError
    ├── BadRequest              400   the body or a header is wrong
    ├── Unauthorized            401   no key, or a wrong one
    ├── Forbidden               403   a good key for something else
    ├── NotFound                404
    │   └── ModelNotFound       404   also for another tenant's adapter
    ├── RequestTimeout          408   the body did not come
    ├── Conflict                409
    ├── UnsupportedEncoding     415   a compressed body
    ├── Unprocessable           422   admin input that parses but cannot be done
    ├── TooManyRequests         429   with Retry-After
    ├── Unavailable             503   with Retry-After
    └── Internal                500

Adapter errors (``adapters.errors``) are mapped here too, by ``status_of``.
"""

from __future__ import annotations

import math
from typing import Any

from adapters import errors as adapter_errors


class ServerError(Exception):
    """``code`` is for programs, ``param`` the field at fault, ``retry_after`` in seconds."""

    code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        if code is not None:
            self.code = code


class BadRequest(ServerError):
    """The body or a header is wrong."""

    code = "invalid_request"


class Unauthorized(ServerError):
    """There is no key, or a wrong one."""

    code = "invalid_api_key"


class Forbidden(ServerError):
    """The key is good, but not for this."""

    code = "permission_denied"


class NotFound(ServerError):
    """There is no such thing, or it is another tenant's."""

    code = "not_found"


class ModelNotFound(NotFound):
    """The tenant has no adapter of this name."""

    code = "model_not_found"


class RequestTimeout(ServerError):
    """The body did not come in time."""

    code = "request_timeout"


class UnsupportedEncoding(ServerError):
    """The body is compressed."""

    code = "unsupported_encoding"


class Conflict(ServerError):
    """It is there already, or is needed."""

    code = "conflict"


class Unprocessable(ServerError):
    """The body can be read, but what it asks for cannot be done."""

    code = "unprocessable"


class TooManyRequests(ServerError):
    """The tenant has too much under way or used; ``retry_after`` says when to come back."""

    code = "rate_limit_exceeded"


class Unavailable(ServerError):
    """The server cannot answer now; ``retry_after`` says when to come back."""

    code = "server_overloaded"


class Internal(ServerError):
    """A defect of the server."""

    code = "internal_error"


# The most specific class first. type is OpenAI's vocabulary, so that its clients raise their own classes.
STATUS: dict[type[Exception], tuple[int, str]] = {
    BadRequest: (400, "invalid_request_error"),
    Unauthorized: (401, "authentication_error"),
    Forbidden: (403, "permission_error"),
    NotFound: (404, "invalid_request_error"),
    RequestTimeout: (408, "invalid_request_error"),
    UnsupportedEncoding: (415, "invalid_request_error"),
    Conflict: (409, "invalid_request_error"),
    Unprocessable: (422, "invalid_request_error"),
    TooManyRequests: (429, "rate_limit_error"),
    Unavailable: (503, "service_unavailable_error"),
    Internal: (500, "server_error"),
    adapter_errors.AdapterRejected: (422, "invalid_request_error"),
    adapter_errors.UploadTooLarge: (413, "invalid_request_error"),
    adapter_errors.UploadIncomplete: (400, "invalid_request_error"),
    adapter_errors.StorageFull: (507, "server_error"),
    adapter_errors.StorageFailed: (503, "service_unavailable_error"),
    adapter_errors.StorageBusy: (503, "service_unavailable_error"),
    adapter_errors.DatabaseUnavailable: (503, "service_unavailable_error"),
    adapter_errors.StoreUnavailable: (503, "service_unavailable_error"),
    adapter_errors.AdapterNotFound: (404, "invalid_request_error"),
    adapter_errors.AdapterConflict: (409, "invalid_request_error"),
    adapter_errors.QuotaExceeded: (403, "permission_error"),
    adapter_errors.AdapterUnavailable: (503, "service_unavailable_error"),
}

LONGEST_TEXT = 1000


def status_of(error: Exception) -> tuple[int, str]:
    """(HTTP status, OpenAI error type) of ``error``; (500, "server_error") for anything unknown."""
    for cls in type(error).__mro__:
        if cls in STATUS:
            return STATUS[cls]
    return STATUS[Internal]


def envelope(message: str, type_: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error body; the texts are cut to ``LONGEST_TEXT`` characters."""
    message = adapter_errors.printable(message, LONGEST_TEXT)
    param = None if param is None else adapter_errors.printable(param, LONGEST_TEXT)
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def body_of(error: ServerError | adapter_errors.AdapterError) -> dict[str, Any]:
    """OpenAI's error body."""
    return envelope(error.message, status_of(error)[1], error.code, error.param)


def headers_of(error: Exception) -> dict[str, str]:
    """``Retry-After`` in whole seconds, at least 1, on every 429 and 503; the challenge on a 401.

    A 408 ends the connection, on which the rest of the body may still come.
    """
    status, _ = status_of(error)
    if status == 408:
        return {"Connection": "close"}
    if status == 401:
        return {"WWW-Authenticate": "Bearer"}
    if status not in (429, 503):
        return {}
    after = getattr(error, "retry_after", None)
    return {"Retry-After": str(max(1, math.ceil(after if after is not None else 1)))}
