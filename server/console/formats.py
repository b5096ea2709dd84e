"""Numbers, sizes and times for people, as the templates' filters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

NONE = "–"


def number(value: float | None, digits: int = 0) -> str:
    """12345.6 -> ``12,346``; a dash for None."""
    return NONE if value is None else f"{value:,.{digits}f}"


def seconds(value: float | None) -> str:
    """Milliseconds below one second: 0.0123 -> ``12 ms``, 3.456 -> ``3.5 s``, 7200 -> ``2.0 h``."""
    if value is None:
        return NONE
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def size(value: float | None) -> str:
    """Bytes with a binary unit: 1536 -> ``1.5 KiB``."""
    if value is None:
        return NONE
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    step = 0
    while value >= 1024 and step < len(units) - 1:
        value, step = value / 1024, step + 1
    return f"{value:.{0 if step == 0 else 1}f} {units[step]}"


def percent(value: float | None) -> str:
    """A share from 0 to 1: 0.123 -> ``12 %``."""
    return NONE if value is None else f"{value * 100:.0f} %"


def when(value: str | datetime | None) -> Markup | str:
    """A moment (ISO 8601) that the page's script writes in the reader's own zone."""
    if value is None:
        return NONE
    text = value.isoformat() if isinstance(value, datetime) else value
    plain = text[:19].replace("T", " ") + " UTC"
    return Markup('<time datetime="{}">{}</time>').format(text, plain)


def short(value: str, length: int = 12) -> str:
    """The beginning of a digest."""
    return value[:length]


def segment(value: str) -> str:
    """One part of a path, with everything escaped that would end it."""
    return quote(value, safe="")


def flat(value: Mapping[str, Any] | None, prefix: str = "") -> dict[str, str]:
    """Nested JSON as one level of names and texts, for before and after."""
    found: dict[str, str] = {}
    for name, inner in (value or {}).items():
        if isinstance(inner, Mapping) and inner:
            found |= flat(inner, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = NONE if inner is None or inner in ({}, []) else str(inner)
    return found


FILTERS: dict[str, Callable[..., Any]] = {
    "number": number,
    "seconds": seconds,
    "size": size,
    "percent": percent,
    "when": when,
    "short": short,
    "segment": segment,
    "flat": flat,
}
