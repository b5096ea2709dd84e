"""JSON as an upload must have it: what two readers could understand differently is refused.

``adapter_config.json`` and the safetensors header are read here by Python, by vLLM with ``json`` and by
safetensors with serde. Duplicate keys, NaN, infinities and deep nesting are where those part ways.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

MAX_DEPTH = 32

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def loads(data: bytes, *, max_items: int) -> Any:
    """The value of UTF-8 JSON ``data``; raises ValueError with the reason in words.

    ``max_items`` bounds brackets and commas, because an empty object costs thirty times its two bytes.
    """
    if sum(data.count(mark) for mark in (b"{", b"[", b",")) > max_items:
        raise ValueError(f"it has more than {max_items} items")
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
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    _check_tree(value)
    return value


def show(value: object) -> str:
    """``value`` for a message: one line, printable, at most about 120 characters."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:119]}…"


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


def _check_tree(root: Any) -> None:
    """Depth, and strings that a UTF-8 answer or a PostgreSQL column could not hold."""
    waiting: list[tuple[Any, int]] = [([root], 0)]
    while waiting:
        container, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        items = [*container.keys(), *container.values()] if isinstance(container, dict) else container
        for item in items:
            if isinstance(item, dict | list):
                waiting.append((item, depth + 1))
            elif isinstance(item, str) and _UNSTORABLE.search(item):
                raise ValueError(f"the string {show(item)} holds a NUL or half a surrogate pair")
