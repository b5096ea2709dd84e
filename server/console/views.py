"""What the pages draw, computed from what the API says: tiles, a heat map, bars, a timeline. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

JSON = Mapping[str, Any]
COLORS = 8  # of the stylesheet's .series-0 … .series-7
OTHERS = "others"


class Named(NamedTuple):
    """A version's place in the console; ``label`` is what follows the @ where its number is not known."""

    tenant: str
    adapter: str
    label: str


def named(entry: JSON) -> Named | None:
    """Whom an entry of the residency is about; None for a free slot."""
    key = entry.get("version")
    if not isinstance(key, str):
        return None
    name, _, digest = key.rpartition("@")
    tenant, _, adapter = name.partition("/")
    number = entry.get("number")
    return Named(tenant, adapter, str(number) if number is not None else digest[:8])


@dataclass(frozen=True, slots=True)
class Tile:
    """One GPU slot: free where ``who`` is None. ``state`` is free, loading, idle, running or draining."""

    number: int
    who: Named | None
    state: str
    running: int
    pinned: bool


def tiles(residency: JSON) -> list[Tile]:
    """The slots of ``GET /admin/v1/residency``, in their order."""
    pinned = {entry["version"] for entry in residency["host"] if entry["pinned"]}
    found = []
    for number, slot in enumerate(residency["slots"]):
        who = named(slot)
        if who is None:
            state = "free"
        elif slot["draining"]:
            state = "draining"
        elif slot["state"] == "activating":
            state = "loading"
        else:
            state = "running" if slot["running"] else "idle"
        found.append(Tile(number, who, state, slot["running"], slot["version"] in pinned))
    return found


@dataclass(frozen=True, slots=True)
class Place:
    """Slots and host memory of one replica, or of a server that has none: then ``replica`` is None.

    ``host`` has its entries of the residency, and whom each is about.
    """

    replica: JSON | None
    tiles: list[Tile]
    host: list[tuple[JSON, Named | None]]
    host_bytes: int


def places(residency: JSON) -> list[Place]:
    """Of each replica of ``GET /admin/v1/residency``, in its order; of a single process one place."""
    replicas: Sequence[JSON | None] = residency.get("replicas", [None])
    return [_place(residency, replica) for replica in replicas]


def _place(residency: JSON, replica: JSON | None) -> Place:
    id_ = replica["id"] if replica is not None else None
    slots, host = ([e for e in residency[name] if e.get("replica") == id_] for name in ("slots", "host"))
    named_host = [(entry, named(entry)) for entry in host]
    mine = tiles({"slots": slots, "host": host})
    return Place(replica, mine, named_host, sum(entry["size_bytes"] for entry in host))


class Queue(NamedTuple):
    """One customer's requests: ``waiting`` in the queue and ``running`` in the engine."""

    tenant: str
    waiting: int
    running: int
    share: float


def queues(residency: JSON) -> list[Queue]:
    """The customers that have requests, the longest queue first; ``share`` is of that one."""
    queued, running = residency["queued"], residency["running"]
    longest = max(queued.values(), default=0) or 1
    found = [
        Queue(name, queued.get(name, 0), running.get(name, 0), queued.get(name, 0) / longest)
        for name in {*queued, *running}
    ]
    return sorted(found, key=lambda queue: (-queue.waiting, -queue.running, queue.tenant))


def layers_of(text: str) -> list[int]:
    """``0-2, 5`` -> 0, 1, 2, 5."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if first:
            found.extend(range(int(first), int(last or first) + 1))
    return found


class Cell(NamedTuple):
    """A layer of one kind of module. ``strength``, from 0 to 1, is how much of it the adapter changes."""

    x: int
    layer: int
    strength: float
    title: str


class Row(NamedTuple):
    y: int
    module: str
    cells: list[Cell]
    detail: str


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Kinds of modules down, layers across; lengths in pixels."""

    rows: list[Row]
    layers: int
    cell: int
    left: int
    width: int
    height: int


def heat_map(coverage: Sequence[JSON]) -> HeatMap | None:
    """What an adapter changes, from the coverage of its report; None where that has none.

    A cell's strength is the norm of what the adapter adds there, beside the largest of the adapter.
    """
    if not coverage:
        return None
    cell, left, top = 16, 176, 18
    largest = max((row["norm"][1] for row in coverage), default=0) or 1.0
    rows, layers = [], 0
    for y, entry in enumerate(coverage):
        changed = layers_of(entry["layers"])
        layers = max(layers, entry["available"], max(changed, default=0) + 1)
        norms = entry.get("norms") or [sum(entry["norm"]) / 2] * len(changed)
        cells = []
        for layer, norm in zip(changed, norms, strict=True):
            strength = norm / largest if math.isfinite(norm) else 1.0
            title = f"{entry['module']}, layer {layer}: norm {norm:.3g}"
            cells.append(Cell(left + layer * cell, layer, round(0.15 + 0.85 * strength, 3), title))
        ranks = "-".join(str(rank) for rank in dict.fromkeys(entry["rank"]))
        detail = f"{len(changed)} of {entry['available']} layers, rank {ranks}"
        rows.append(Row(top + y * cell, entry["module"], cells, detail))
    return HeatMap(rows, layers, cell, left, left + layers * cell + 4, top + len(rows) * cell + 4)


class Bar(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    color: int
    title: str


class Tick(NamedTuple):
    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Stacked bars; lengths in pixels. ``legend`` are names with their colours."""

    bars: list[Bar]
    across: list[Tick]
    up: list[Tick]
    legend: list[tuple[int, str]]
    width: int
    height: int


def stacked(
    rows: Iterable[JSON], across: str, stack: str, value: str, moments: Sequence[str] = ()
) -> Chart | None:
    """Sums of ``value`` by ``across`` (moments, in order), stacked by ``stack`` unless that is empty; None
    without any. ``moments`` have a place also where nothing was used.

    The largest stacks have colours of their own, all others one together.
    """
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    totals: dict[str, float] = defaultdict(float)
    for row in rows:
        name = str(row[stack]) if row.get(stack) is not None else "base" if stack else "all"
        sums[str(row[across])][name] += row[value]
        totals[name] += row[value]
    highest = max((sum(column.values()) for column in sums.values()), default=0)
    if not highest:
        return None
    for moment in moments:
        sums[moment]  # made by being asked for
    names = sorted(totals, key=lambda name: (-totals[name], name))
    shown = names if len(names) <= COLORS else names[: COLORS - 1]
    width, height, left, bottom = 720, 240, 64, 24
    room, step = height - bottom - 8, (width - left) / len(sums)
    bars = []
    for column, moment in enumerate(sorted(sums)):
        base = float(height - bottom)
        stacks = {name: sums[moment].get(name, 0.0) for name in shown}
        if rest := sum(sums[moment].values()) - sum(stacks.values()):
            stacks[OTHERS] = rest
        for color, (name, amount) in enumerate(stacks.items()):
            if amount:
                tall = amount / highest * room
                base -= tall
                title = f"{moment[:16].replace('T', ' ')}: {name} {amount:,.0f}"
                x, wide = left + column * step + step * 0.1, step * 0.8
                bars.append(Bar(round(x, 1), round(base, 1), round(wide, 1), round(tall, 1), color, title))
    every = max(1, math.ceil(len(sums) / 8))
    daily = all(moment[11:16] == "00:00" for moment in sums)
    texts = [
        Tick(round(left + (column + 0.5) * step, 1), moment[5:10] if daily else moment[11:16])
        for column, moment in enumerate(sorted(sums))
        if column % every == 0
    ]
    up = [Tick(round(height - bottom - part * room, 1), _brief(part * highest)) for part in (0, 0.5, 1)]
    legend = list(enumerate(shown)) + ([(len(shown), OTHERS)] if len(names) > len(shown) else [])
    return Chart(bars, texts, up, legend, width, height)


def _brief(value: float) -> str:
    """1,234,567 -> ``1.2M``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


class Span(NamedTuple):
    """One part of a request's time: ``start`` and ``length`` in percent of the whole, ``seconds`` long."""

    name: str
    start: float
    length: float
    seconds: float


def timeline(request: JSON) -> list[Span]:
    """Queue, load, prefill and decode of one request, from the seconds that its row has.

    Loading is a part of the time in the queue: a request waits for its adapter there.
    """
    total = request.get("seconds") or 0.0
    if total <= 0:
        return []
    load = min(request.get("load_seconds") or 0.0, total)
    queue = max(0.0, min(request.get("queue_seconds") or 0.0, total) - load)
    first = request.get("first_token_seconds") or 0.0
    waited = queue + load
    prefill = max(0.0, min(first, total) - waited) if first else 0.0
    parts = {"queued": queue, "loading": load, "prefill": prefill, "decode": total - waited - prefill}
    spans, at = [], 0.0
    for name, seconds in parts.items():
        if seconds > 0:
            spans.append(Span(name, round(at / total * 100, 2), round(seconds / total * 100, 2), seconds))
        at += seconds
    return spans


class Gauge(NamedTuple):
    """How much of a limit is used: ``share`` from 0 to 1, ``level`` one of ok, near, over; ``until`` when."""

    name: str
    used: float
    limit: float
    share: float
    level: str
    until: str


def gauge(name: str, used: float, limit: float | None, until: str = "") -> Gauge | None:
    """None where there is no limit."""
    if limit is None:
        return None
    share = min(1.0, used / limit) if limit else 1.0
    level = "over" if used >= limit else "near" if share >= 0.8 else "ok"
    return Gauge(name, used, limit, share, level, until)
