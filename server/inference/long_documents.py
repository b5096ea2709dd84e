"""Answers of megabytes as JSON, in slices: others have turns while one is written.

Two thousand embeddings of a thousand numbers take a second to write, for which every stream would wait. What
is written is kept in parts, which go on their way one by one: from a replica to its gateway, which need not
read them, and to the client.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from typing import Any

from server.errors import Internal

# Values that are written in one go: a millisecond of floats.
SLICE = 2_000
# A document of fewer is written at once.
LONG = 10_000
PART_BYTES = 128 << 10
# A text of so many characters takes as long as a number.
_CHARACTERS = 256
_DEEP = (str, list, dict)


def is_long(document: Mapping[str, Any]) -> bool:
    """Whether others should have turns while ``document`` is written."""
    return _values(document, LONG) > LONG


async def written(document: Mapping[str, Any]) -> list[bytes]:
    """``document`` as JSON, in parts of ``PART_BYTES``. Internal where a number in it is none."""
    parts, part = [], bytearray()
    try:
        for text in slices(document):
            part += text.encode("utf-8", "replace")
            while len(part) >= PART_BYTES:
                parts.append(bytes(part[:PART_BYTES]))
                del part[:PART_BYTES]
            await asyncio.sleep(0)
    except ValueError as exc:
        raise Internal("The model's answer to this input is not a number.") from exc
    return [*parts, bytes(part)] if part else parts


def slices(value: Any) -> Iterator[str]:
    """``value`` as JSON: each piece has about ``SLICE`` values at most, or is one text."""
    if isinstance(value, dict) and _values(value, SLICE) > SLICE:
        before = "{"
        for name, item in value.items():
            yield f"{before}{dumped(name)}:"
            yield from slices(item)
            before = ","
        yield "}"
    elif isinstance(value, list) and _values(value, SLICE) > SLICE:
        yield from _of_list(value)
    else:
        yield dumped(value)


def _of_list(items: list[Any]) -> Iterator[str]:
    before, at = "[", 0
    while at < len(items):
        end = at + SLICE if _is_flat(items) else _end(items, at)
        if end == at:  # one item that is too long by itself
            yield before
            yield from slices(items[at])
            end += 1
        else:
            yield before + dumped(items[at:end])[1:-1]
        before, at = ",", end
    yield "]"


def _end(items: list[Any], at: int) -> int:
    """Where the items from ``at`` on have come to a slice; ``at`` itself if the first is more."""
    room = SLICE
    for place in range(at, len(items)):
        room -= _values(items[place], SLICE)
        if room < 0:
            return place
    return len(items)


def _values(value: Any, most: int) -> int:
    """Roughly how many numbers there are in ``value``, or as much; beyond ``most`` it is not counted on."""
    if isinstance(value, str):
        return 1 + len(value) // _CHARACTERS
    if isinstance(value, list):
        if _is_flat(value):
            return 1 + len(value)
        inner: Any = value
    elif isinstance(value, dict):
        inner = value.values()
    else:
        return 1
    count = 1
    for item in inner:
        count += _values(item, most)
        if count > most:
            break
    return count


def _is_flat(items: list[Any]) -> bool:
    """By its ends, as lists have items of one kind; some begin with None."""
    return not items or not (isinstance(items[0], _DEEP) or isinstance(items[-1], _DEEP))


def dumped(value: Any) -> str:
    """JSON as ``JSONResponse`` writes it."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
