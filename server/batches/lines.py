"""One line of a batch: what it asks, what is wrong with it, and what is written of it. Pure.

in      {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {…}}
out     {"id": "batch_req_…", "custom_id": "a", "error": null,
         "response": {"status_code": 200, "request_id": "…", "headers": {…}, "body": {…}}}
"""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.errors import AdapterError
from adapters.inspection import strict_json
from adapters.model import Version
from server.errors import ServerError, body_of, status_of
from server.inference.bounds import CLIENT_JSON
from server.inference.completion import version_header
from server.inference.dialects.base import Dialect
from server.inference.dialects.registry import ANSWERING
from server.limits.errors import BeyondLimits

ENDPOINTS: Mapping[str, Dialect] = {d.path: d for d in ANSWERING if d.batched}
MAX_LINES = 50_000
AT_ONCE = 1024  # lines that are looked at in one go
MAX_ERRORS = 100  # that one batch names
MAX_CUSTOM_ID = 512
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
# Errors that may pass and often do not are tried so often.
TRIES = 5
RETRY_SOONEST, RETRY_LATEST = 0.5, 60.0  # seconds
_UNSURE = ("adapter_unavailable", "adapter_damaged", "adapter_files_missing", "storage_failed")
_INK = re.compile(rb"\S")
_FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class Line:
    """``number`` counts from 1, with empty lines."""

    number: int
    custom_id: str
    body: dict[str, Any]


class BadLine(Exception):
    """What is wrong with line ``number``, None for the file as a whole, as OpenAI's batches show it."""

    def __init__(self, code: str, message: str, number: int | None, param: str | None = None) -> None:
        super().__init__(message)
        self.shown = {"code": code, "message": message, "line": number, "param": param}


async def split(content: AsyncIterator[bytes], most: int) -> AsyncIterator[list[tuple[int, bytes | None]]]:
    """The lines of ``content`` with their numbers, at most ``AT_ONCE`` at a time, without blank ones.

    None stands for a line of more than ``most`` bytes, of which no more is held. What is blank is passed over
    by searches of C: a file may hold two hundred million empty lines.
    """
    number, left, too_long = 1, bytearray(), False
    async for chunk in content:
        found: list[tuple[int, bytes | None]] = []
        at = 0
        if left or too_long:  # a line goes on
            end = chunk.find(b"\n")
            left += chunk if end < 0 else chunk[:end]
            too_long = too_long or len(left) > most
            if too_long:
                left.clear()
            if end < 0:
                continue
            if too_long or left.strip():
                found.append((number, None if too_long else bytes(left)))
            number, at, too_long = number + 1, end + 1, False
            left.clear()
        while (ink := _INK.search(chunk, at)) is not None:
            begin = max(at, chunk.rfind(b"\n", at, ink.start()) + 1)
            number += chunk.count(b"\n", at, begin)
            end = chunk.find(b"\n", begin)
            if end < 0:
                at = begin
                break
            found.append((number, None if end - begin > most else chunk[begin:end]))
            number, at = number + 1, end + 1
            if len(found) == AT_ONCE:
                yield found
                found = []
        number += chunk.count(b"\n", at)
        left += chunk[max(at, chunk.rfind(b"\n") + 1) :]
        if len(left) > most:
            too_long = True
            left.clear()
        if found:
            yield found
    if too_long or left.strip():
        yield [(number, None if too_long else bytes(left))]


def parse(number: int, raw: bytes | None, endpoint: str, most: int) -> Line:
    """Raises BadLine."""
    if raw is None:
        raise BadLine("line_too_long", f"A line may have at most {most} bytes.", number)
    try:
        value = strict_json.loads(raw.removeprefix(BOM_UTF8) if number == 1 else raw, CLIENT_JSON)
    except ValueError as exc:
        raise BadLine("invalid_json_line", f"This line is not valid JSON: {str(exc)[:200]}", number) from None
    if not isinstance(value, dict):
        raise BadLine("invalid_json_line", "This line is not a JSON object.", number)
    for name in _FIELDS:
        if value.get(name) is None:
            raise BadLine("missing_required_parameter", f"`{name}` is missing.", number, name)
    if unknown := sorted(value.keys() - _FIELDS):
        raise BadLine("unknown_parameter", f"`{unknown[0][:100]}` is not a field of a line.", number)
    custom_id, body = value["custom_id"], value["body"]
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID:
        text = f"`custom_id` must be a text of 1 to {MAX_CUSTOM_ID} characters."
        raise BadLine("invalid_custom_id", text, number, "custom_id")
    if value["method"] != "POST":
        raise BadLine("invalid_method", "`method` must be POST.", number, "method")
    if value["url"] != endpoint:
        text = f"`url` must be the batch's endpoint, {endpoint}."
        raise BadLine("mismatched_url", text, number, "url")
    if not isinstance(body, dict):
        raise BadLine("invalid_body", "`body` must be a JSON object.", number, "body")
    return Line(number, custom_id, body)


class Checker:
    """Looks at all lines before the first one runs. ``errors`` are as ``BadLine.shown``."""

    def __init__(self, endpoint: str, most: int) -> None:
        self.errors: list[dict[str, Any]] = []
        self.lines = 0
        self._endpoint = endpoint
        self._most = most
        self._numbers: dict[str, int] = {}

    @property
    def full(self) -> bool:
        """Whether it has seen enough."""
        return len(self.errors) >= MAX_ERRORS or self.lines > MAX_LINES

    def look(self, lines: Sequence[tuple[int, bytes | None]]) -> None:
        for number, raw in lines:
            if self.full:
                return
            self.lines += 1
            try:
                self._add(parse(number, raw, self._endpoint, self._most))
            except BadLine as exc:
                self.errors.append(exc.shown)

    def _add(self, line: Line) -> None:
        first = self._numbers.setdefault(line.custom_id, line.number)
        if first != line.number:
            text = f"`custom_id` is that of line {first}; each line needs one of its own."
            raise BadLine("duplicate_custom_id", text, line.number, "custom_id")

    def finish(self) -> None:
        """After the last line."""
        if self.lines > MAX_LINES:
            text = f"A batch has at most {MAX_LINES} lines; send several."
            self.errors.insert(0, BadLine("too_many_lines", text, None).shown)
        elif not self.lines:
            self.errors.append(BadLine("empty_file", "The file has no lines.", None).shown)


def answered(id_: str, custom_id: str, body: str, version: Version | None = None, status: int = 200) -> str:
    """The line of an answer by ``version``, or of an error of one request, whose id is ``id_``.

    ``body`` is JSON. The line has the headers of any other answer that say what gave it.
    """
    headers = {"X-Request-Id": id_, **version_header(version)}
    response = _dumped({"status_code": status, "request_id": id_, "headers": headers})
    line = _dumped({"id": f"batch_req_{id_}", "custom_id": custom_id, "error": None})
    if not body.isascii():  # U+2028 and others end a line for some readers
        body = _NOT_ASCII.sub(lambda found: _dumped(found[0])[1:-1], body)
    return f'{line[:-1]},"response":{response[:-1]},"body":{body}}}}}'


def _dumped(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def refused(
    id_: str, custom_id: str, error: ServerError | AdapterError, version: Version | None = None
) -> str:
    """The line of a request that ended with ``error``; ``version`` if it was known by then."""
    return answered(id_, custom_id, _dumped(body_of(error)), version, status_of(error)[0])


_UNANSWERED = {
    "expired": ("batch_expired", "This request was not answered before the batch's window ended."),
    "cancelled": ("batch_cancelled", "This request was not answered before the batch was cancelled."),
}


def unanswered(id_: str, custom_id: str, end: str) -> str:
    """The line of a request that was not answered before its batch was ``expired`` or ``cancelled``."""
    code, message = _UNANSWERED[end]
    error = {"code": code, "message": message}
    return json.dumps(
        {"id": f"batch_req_{id_}", "custom_id": custom_id, "response": None, "error": error},
        separators=(",", ":"),
    )


def again_after(error: ServerError | AdapterError, tries: int, left: float) -> float | None:
    """Seconds until a request is tried again that has been tried ``tries`` times; None if it is not.

    ``left`` is what its batch has left, in seconds: a budget that comes back later is not waited for.
    """
    if error.code == "tenant_suspended":  # and released again, perhaps
        return RETRY_LATEST
    if status_of(error)[0] not in (429, 503) or isinstance(error, BeyondLimits):
        return None
    if error.code in _UNSURE and tries >= TRIES:
        return None
    asked = float(getattr(error, "retry_after", None) or 0.0)
    if error.code == "insufficient_quota" and asked > left:
        return None
    return min(max(asked, RETRY_SOONEST * 2.0 ** min(tries, 10)), RETRY_LATEST)
