"""Every error that a client can see has a status, a type and the headers that its client acts on."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

from adapters import errors as adapter_errors
from adapters.errors import CURES, AdapterError, AdapterUnavailable, fault
from server import errors
from server.errors import (
    LONGEST_TEXT,
    STATUS,
    ServerError,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    body_of,
    envelope,
    headers_of,
    status_of,
)


def tree(root: type[Exception]) -> Iterator[type[Exception]]:
    for cls in root.__subclasses__():
        yield cls
        yield from tree(cls)


EVERY = [*tree(ServerError), *tree(AdapterError)]


@pytest.mark.parametrize("cls", EVERY)
def test_every_error_has_a_status_of_its_own(cls: type[ServerError]) -> None:
    found = [base for base in cls.__mro__ if base in STATUS]
    assert found, f"{cls.__name__} is missing in STATUS"
    status, kind = status_of(cls("message"))
    assert (status, kind) == STATUS[found[0]]
    assert 400 <= status < 600
    body = body_of(cls("message", code="some_code", param="field"))
    assert body == {"error": {"message": "message", "type": kind, "param": "field", "code": "some_code"}}
    assert isinstance(cls("message").code, str)
    assert cls("message").code != ServerError.code or status == 500


def test_the_tables_name_nothing_else() -> None:
    assert set(STATUS) <= set(EVERY)
    for module in (errors, adapter_errors):
        for cls in EVERY:
            if cls.__module__ == module.__name__:
                assert f" {cls.__name__} " in (module.__doc__ or ""), "the tree at the top is not complete"


def test_what_nobody_foresaw_is_a_500() -> None:
    assert status_of(ZeroDivisionError()) == (500, "server_error")


@pytest.mark.parametrize("cls", EVERY)
def test_retry_after_comes_with_429_and_503_and_never_else(cls: type[Exception]) -> None:
    status, _ = status_of(cls("message"))
    headers = headers_of(cls("message"))
    assert ("Retry-After" in headers) == (status in (429, 503))
    assert ("WWW-Authenticate" in headers) == (status == 401)


@pytest.mark.parametrize(("after", "sent"), [(None, "1"), (0, "1"), (0.2, "1"), (1.01, "2"), (60, "60")])
def test_retry_after_is_in_whole_seconds(after: float | None, sent: str) -> None:
    assert headers_of(TooManyRequests("m", retry_after=after)) == {"Retry-After": sent}
    assert headers_of(Unavailable("m", retry_after=after)) == {"Retry-After": sent}


def test_an_adapter_that_cannot_be_loaded_may_be_tried_again() -> None:
    assert headers_of(AdapterUnavailable("m")) == {"Retry-After": "1"}
    assert headers_of(Unauthorized("m")) == {"WWW-Authenticate": "Bearer"}


@pytest.mark.parametrize("code", CURES)
def test_every_fault_ends_with_its_cure(code: str) -> None:
    made = fault(code, "This is wrong.", param="field")
    assert (made.code, made.param, status_of(made)[0]) == (code, "field", 422)
    assert made.message == f"This is wrong. {CURES[code]}"
    assert CURES[code][-1] == "."
    assert len(made.message) <= LONGEST_TEXT


def test_what_a_client_sent_is_repeated_in_part_and_in_utf8() -> None:
    shown = envelope("\ud800" + "x" * 5000, "t", "c", "p\udfff" * 1000)["error"]
    assert shown["message"].startswith("?x")
    assert len(shown["message"]) == len(shown["param"]) == LONGEST_TEXT + 1
    json.dumps(shown, ensure_ascii=False).encode()
    assert envelope("m", "t", None)["error"] == {"message": "m", "type": "t", "param": None, "code": None}


def test_the_statuses_are_those_that_the_official_client_has_classes_for() -> None:
    known = {
        400: openai.BadRequestError, 401: openai.AuthenticationError, 403: openai.PermissionDeniedError,
        404: openai.NotFoundError, 409: openai.ConflictError, 422: openai.UnprocessableEntityError,
        429: openai.RateLimitError,
    }  # fmt: skip
    for cls in EVERY:
        status, _ = status_of(cls("message"))
        assert status in known or status >= 500 or status in (408, 413, 415)
