"""JSON as a stranger may send it: what two readers could understand differently is refused.

``adapter_config.json`` and the safetensors header are read here by Python, by vLLM with ``json`` and by
safetensors with serde; a request's body has passed through a gateway's reader before. Duplicate keys, NaN,
infinities and deep nesting are where those part ways. Sizes are bounded before anything is parsed.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

MAX_DEPTH = 32
# More characters than any number has that a client means; Python takes 70 ms for 4 MiB of long ones.
MAX_DIGITS = 100
MAX_STRINGS = 1 << 17

_SURROGATE = re.compile("[\ud800-\udfff]")
_LONG_NUMBER = b"0" * (MAX_DIGITS + 1)
_DIGITS_AS_ZEROS = bytes(ord("0") if chr(byte).isdecimal() and byte < 128 else byte for byte in range(256))
_FRACTIONS = (b".", b"e", b"E")
_NO_MARKS = bytes(byte for byte in range(256) if byte not in b"{[,:.eE")
_MAX_INTEGER = 1 << 63


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much JSON may hold.

    ``max_items`` bounds all values together, because an empty object costs thirty times its two bytes.
    ``max_nodes`` bounds all but whole numbers in lists of nothing else, which cost least and which a prompt
    of tokens has many of; these must then fit in 64 bits.
    """

    max_items: int
    max_nodes: int | None = None
    max_depth: int = MAX_DEPTH
    allow_nul: bool = False


def loads(data: bytes, bounds: Bounds) -> Any:
    """The value of UTF-8 JSON ``data``; raises ValueError with the reason in words."""
    _check_size(data, bounds)
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_float=_finite_float,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"it is nested more than {bounds.max_depth} levels deep") from None
    except ValueError as error:
        if not str(error).startswith("Exceeds the limit"):  # Python's own, in words for programmers
            raise
        raise ValueError(f"a number has more than {MAX_DIGITS} digits") from None
    _check_tree(value, bounds)
    return value


def show(value: object) -> str:
    """``value`` for a message: one line, printable, at most about 120 characters."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:119]}…"


def is_storable(text: str) -> bool:
    """Whether a UTF-8 answer and a PostgreSQL column can hold ``text``."""
    return _is_text(text, allow_nul=False)


def _is_text(text: str, *, allow_nul: bool) -> bool:
    """Most texts are ASCII, of which no regular expression has to see each character."""
    if not allow_nul and "\0" in text:
        return False
    return text.isascii() or _SURROGATE.search(text) is None


def _check_size(data: bytes, bounds: Bounds) -> None:
    """Counts marks, in the whole text where that is few enough, else in what lies outside its strings.

    4 MiB take at most some 25 ms, whatever they hold: each pass is one of C's, as a regular expression's is
    not.
    """
    nodes = bounds.max_items if bounds.max_nodes is None else min(bounds.max_nodes, bounds.max_items)
    if len(data) <= nodes:
        return  # every value has a byte at least
    plain = data
    if b'"' in data:
        plain = data.replace(b"\\\\", b"").replace(b'\\"', b"")
        if plain.count(b'"') > 2 * MAX_STRINGS:
            raise ValueError(f"it has more than {MAX_STRINGS} strings")
        plain = b"".join(plain.split(b'"')[::2])
    marks = plain.translate(None, _NO_MARKS)
    opened = marks.count(b"{") + marks.count(b"[")
    if opened + marks.count(b",") > bounds.max_items:
        raise ValueError(f"it has more than {bounds.max_items} items")
    if opened > nodes or sum(marks.count(mark) for mark in _FRACTIONS) > 4 * nodes:
        raise ValueError(f"it has more than {nodes} lists, objects and fractions")
    if marks.count(b":") > nodes:
        raise ValueError(f"its objects have more than {nodes} members")
    if _LONG_NUMBER in plain.translate(_DIGITS_AS_ZEROS):
        raise ValueError(f"a number has more than {MAX_DIGITS} digits")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {show(twice)} appears twice")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _check_tree(root: Any, bounds: Bounds) -> None:
    """Depth, number of nodes, and strings that a UTF-8 answer or a PostgreSQL column could not hold."""
    what = "half a surrogate pair" if bounds.allow_nul else "a NUL or half a surrogate pair"
    waiting: list[tuple[Any, int]] = [([root], 0)]
    nodes = 0
    while waiting:
        container, depth = waiting.pop()
        if depth > bounds.max_depth:
            raise ValueError(f"it is nested more than {bounds.max_depth} levels deep")
        if isinstance(container, dict):
            items = [*container.keys(), *container.values()]
        elif set(map(type, container)) == {int}:
            if bounds.max_nodes is None:
                continue
            if max(container) >= _MAX_INTEGER or min(container) < -_MAX_INTEGER:
                raise ValueError("a whole number does not fit in 64 bits")
            continue
        else:
            items = container
        nodes += len(container)
        if bounds.max_nodes is not None and nodes > bounds.max_nodes:
            raise ValueError(f"it has more than {bounds.max_nodes} items that are no token")
        for item in items:
            if isinstance(item, dict | list):
                waiting.append((item, depth + 1))
            elif isinstance(item, str) and not _is_text(item, allow_nul=bounds.allow_nul):
                raise ValueError(f"the string {show(item)} holds {what}")
