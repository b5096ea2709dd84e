"""Documents with lists of a million items, as four megabytes of tokens: others have turns meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

SLICE = 10_000  # items, about a millisecond


async def long_text(document: Mapping[str, Any]) -> str:
    """``document`` as JSON. Lists in it are written ``SLICE`` items at a time."""
    parts = []
    for name, value in document.items():
        text = await _list(value) if isinstance(value, list) and len(value) > SLICE else dumped(value)
        parts.append(f"{dumped(name)}:{text}")
    return f"{{{','.join(parts)}}}"


async def _list(items: list[Any]) -> str:
    parts = []
    for first in range(0, len(items), SLICE):
        parts.append(dumped(items[first : first + SLICE])[1:-1])
        await asyncio.sleep(0)
    return f"[{','.join(parts)}]"


def dumped(value: Any) -> str:
    """JSON as ``JSONResponse`` writes it."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
