"""What the command line shows of a server's documents: tables for people.

Everything here is (document, what to show), or a part of the latter.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # rich takes longer to import than a command that does not need it takes in all
    from rich.console import RenderableType
    from rich.table import Table

Shown = tuple[Any, Any]  # a document, and what rich prints of it


def table(headings: Iterable[str], rows: Iterable[Iterable[Any]]) -> Table:
    """Numbers to the right; None is a dash and a truth a word."""
    from rich.table import Table

    cells = [list(row) for row in rows]
    made = Table(box=None, header_style="bold", pad_edge=False)
    for index, heading in enumerate(headings):
        numeric = all(_is_number(row[index]) or row[index] is None for row in cells)
        made.add_column(heading, justify="right" if cells and numeric else "left", overflow="fold")
    for row in cells:
        made.add_row(*map(_cell, row))
    return made


def rows(documents: list[dict[str, Any]]) -> RenderableType:
    """Documents with the same fields, one in a row."""
    if not documents:
        return "none"
    headings = [name.replace("_", " ") for name in documents[0]]
    return table(headings, ([_field(name, value) for name, value in d.items()] for d in documents))


def fields(document: dict[str, Any]) -> Shown:
    """A document as names and values."""
    from rich.table import Table

    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for name, value in document.items():
        made.add_row(name.replace("_", " "), _cell(_field(name, value)))
    return document, made


def _field(name: str, value: Any) -> Any:
    """A value as people read it: moments to the second, other times to the minute, objects as JSON."""
    if value and name == "at":
        return value[:19].replace("T", " ")
    if value and name.endswith("_at"):
        return when(value)
    return json.dumps(value) if isinstance(value, dict | list) else value


def _cell(value: Any) -> str:
    from rich.markup import escape

    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else escape(str(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def when(timestamp: str) -> str:
    return timestamp[:16].replace("T", " ")


def change(before: Any, after: Any) -> str | None:
    """What differs between two states of something, as ``live 2 -> 1``; of a new one what it has."""
    was, now = (one if isinstance(one, dict) else {} for one in (before, after))
    if was:
        names = [name for name in now | was if was.get(name) != now.get(name)]
        said = [f"{name} {_brief(was.get(name))} -> {_brief(now.get(name))}" for name in names]
    else:
        said = [f"{name} {_brief(value)}" for name, value in now.items() if value and name[-3:] != "_at"]
    return _cut(", ".join(said), 100) or None


def _brief(value: Any) -> str:
    return "none" if value is None else _cut(json.dumps(value, ensure_ascii=False), 60)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def size(count: int | None) -> str | None:
    from rich.filesize import decimal

    return None if count is None else decimal(count)


def tenant_cells(tenant: dict[str, Any]) -> tuple[Any, ...]:
    return (
        *(tenant[field] for field in ("id", "name", "weight", "base_allowed", "max_queued", "max_running")),
        size(tenant["stored_bytes"]),
        when(tenant["created_at"]),
    )


def key_cells(key: dict[str, Any]) -> tuple[Any, ...]:
    times = (key[field] and when(key[field]) for field in ("created_at", "expires_at", "last_used_at"))
    limits = json.dumps(key["limits"]) if key["limits"] else None
    return key["id"], key["name"], ", ".join(key["scopes"]), limits, *times


def adapter_cells(adapter: dict[str, Any]) -> tuple[Any, ...]:
    live = [v["report"].get("rank") for v in adapter["versions"] if v["version"] == adapter["live"]]
    return (
        adapter["name"], adapter["live"], len(adapter["versions"]), adapter["tier"], adapter["default"],
        adapter["pinned"], live[0] if live else None, when(adapter["created_at"]),
    )  # fmt: skip


def adapter(document: dict[str, Any], covered: int | None = None) -> Shown:
    """An adapter's versions, one in a row; their reports; what ``covered`` (the live one) changes."""
    from rich.console import Group
    from rich.markup import escape

    rows, notes = [], []
    coverage: list[RenderableType] = []
    for version in document["versions"]:
        number, report = version["version"], version["report"]
        weights = report.get("rank"), size(report.get("size_bytes"))
        since = when(version["created_at"])
        rows.append(
            (number, _state(document, version), version["tier"], *weights, version["digest"][:12], since)
        )
        notes += [escape(f"version {number}: {note}") for note in (*_troubles(version), *_notes(report))]
        if number == (covered or document["live"]) and report.get("coverage"):
            coverage = ["", f"version {number} changes", _coverage(report["coverage"])]
    made = table(("version", "", "tier", "rank", "size", "digest", "since"), rows)
    marks = ", ".join(mark for mark in ("default", "pinned") if document[mark])
    made.title = escape(f"{document['tenant']}/{document['name']}") + (f" ({marks})" if marks else "")
    made.title_justify = "left"
    if document.get("defaults"):
        notes.insert(0, escape(f"defaults: {json.dumps(document['defaults'], ensure_ascii=False)}"))
    return document, Group(made, *notes, *coverage)


def _state(document: dict[str, Any], version: dict[str, Any]) -> str:
    """Whether a version answers, or its share in percent, and whether it is out of service."""
    share = (document.get("split") or {}).get(str(version["version"]))
    live = "live" if version["version"] == document["live"] else ""
    out = "out of service" if version.get("quarantine") else ""
    return f"{f'{share} %' if share else live} {out}".strip()


def _troubles(version: dict[str, Any]) -> Iterator[str]:
    if out := version.get("quarantine"):
        yield f"out of service since {when(out['at'])}: {out['reason']}"
    if problem := version.get("problem"):
        yield f"not served: {problem['code']}: {problem['message']}"
    if note := version.get("note"):
        yield f"note: {note}"


def _coverage(found: list[dict[str, Any]]) -> Table:
    """What an adapter does to each kind of module, over all layers."""
    headings = ("module", "layers", "of", "rank", "scaling", "norm of the change")
    return table(
        headings,
        (
            (
                row["module"],
                row["layers"],
                row["available"],
                *(_span(row[n]) for n in ("rank", "scaling", "norm")),
            )
            for row in found
        ),
    )


def _span(bounds: list[float]) -> str:
    low, high = bounds
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _notes(report: dict[str, Any]) -> Iterator[str]:
    """What a version's report says in words and numbers."""
    for kind in ("conversions", "warnings"):
        yield from (f"{kind.removesuffix('s')}: {text}" for text in report.get(kind) or ())
    elsewhere = [("golden elsewhere", found) for found in report.get("golden_elsewhere") or ()]
    for kind, found in [("probe", report.get("probe")), ("golden", report.get("golden")), *elsewhere]:
        if found:
            values = (f"{name} {_cell(_field(name, value))}" for name, value in found.items())
            yield f"{kind}: {', '.join(values)}"


def gone(what: str) -> Shown:
    from rich.markup import escape

    return {"deleted": what}, f"deleted {escape(what)}"
