"""What the console draws, and who is signed in: arithmetic, without a browser."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.model import ranges
from server.console import formats, views
from server.console.sessions import IDLE_S, LIFETIME_S, TICKET_S, Sessions


def residency(**changes: Any) -> dict[str, Any]:
    free = {"version": None, "load_id": None, "state": None, "running": 0, "draining": False}
    slot = {
        "version": "acme/a@0123456789abcdef",
        "load_id": 1,
        "state": "active",
        "running": 2,
        "draining": False,
    }
    entry = {"version": slot["version"], "tier": "gpu", "pinned": True, "size_bytes": 5}
    return {"slots": [slot, free], "host": [entry], "queued": {}, "running": {}} | changes


def test_a_tile_says_who_is_in_a_slot_and_what_it_does() -> None:
    busy, free = views.tiles(residency())
    assert (busy.who, busy.state, busy.running, busy.pinned) == (
        ("acme", "a", "01234567"),
        "running",
        2,
        True,
    )
    assert (free.who, free.state, free.pinned) == (None, "free", False)


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"running": 0}, "idle"),
        ({"draining": True}, "draining"),
        ({"state": "activating", "running": 0}, "loading"),
    ],
)
def test_the_state_of_a_tile(changes: dict[str, Any], state: str) -> None:
    seen = residency()
    seen["slots"][0] |= changes
    assert views.tiles(seen)[0].state == state


def test_the_number_of_a_version_is_shown_where_it_is_known() -> None:
    assert views.named({"version": "acme/a@0123456789", "number": 7}) == ("acme", "a", "7")


def test_a_single_process_is_one_place_and_a_fleet_one_for_each_replica() -> None:
    seen = residency()
    (whole,) = views.places(seen)
    assert whole.replica is None
    assert whole.tiles == views.tiles(seen)
    assert [(entry["version"], who and who.adapter) for entry, who in whole.host] == [
        ("acme/a@0123456789abcdef", "a")
    ]

    slots = [{**seen["slots"][0], "replica": "y"}, {**seen["slots"][1], "replica": "x"}]
    host = [{**seen["host"][0], "replica": "y"}, {**seen["host"][0], "replica": "x", "pinned": False}]
    replicas = [{"id": "x"}, {"id": "y"}, {"id": "z"}]
    x, y, z = views.places({"slots": slots, "host": host, "replicas": replicas})
    assert [place.replica for place in (x, y, z)] == replicas
    assert [(tile.number, tile.state) for tile in x.tiles] == [(0, "free")]
    assert [(tile.number, tile.state, tile.pinned) for tile in y.tiles] == [(0, "running", True)]
    assert (len(x.host), y.host_bytes, z.tiles, z.host) == (1, 5, [], [])
    assert views.places({"slots": [], "host": [], "replicas": []}) == []


def test_queues_begin_with_the_longest() -> None:
    found = views.queues(residency(queued={"a": 2, "b": 8}, running={"c": 1}))
    assert found == [("b", 8, 0, 1.0), ("a", 2, 0, 0.25), ("c", 0, 1, 0.0)]


@given(st.sets(st.integers(0, 200)))
def test_layers_are_read_as_the_report_writes_them(layers: set[int]) -> None:
    assert views.layers_of(ranges(sorted(layers))) == sorted(layers)


def coverage(**changes: Any) -> dict[str, Any]:
    row = {
        "module": "self_attn.q_proj",
        "layers": "0-1, 3",
        "available": 4,
        "rank": [4, 8],
        "norm": [1.0, 3.0],
    }
    return row | changes


def test_a_heat_map_has_a_cell_for_every_changed_layer() -> None:
    heat = views.heat_map([coverage(norms=[1.0, 4.0, 2.0]), coverage(module="mlp.up_proj", norm=[0.5, 4.0])])
    assert heat is not None
    first, second = heat.rows
    assert [cell.layer for cell in first.cells] == [0, 1, 3]
    assert [cell.strength for cell in first.cells] == [0.362, 1.0, 0.575]
    assert first.detail == "3 of 4 layers, rank 4-8"
    assert {cell.strength for cell in second.cells} == {0.628}  # without single norms, the middle of them
    assert heat.layers == 4
    assert views.heat_map([]) is None


def test_an_infinite_norm_is_drawn_in_full() -> None:
    heat = views.heat_map([coverage(norms=[1.0, float("inf"), 2.0], norm=[1.0, float("inf")])])
    assert heat is not None
    assert [cell.strength for cell in heat.rows[0].cells] == [0.15, 1.0, 0.15]


@given(
    st.dictionaries(
        st.tuples(st.integers(1, 28), st.sampled_from("abcdefghijklm")), st.integers(1, 10**9), min_size=1
    )
)
def test_bars_add_up_and_stay_in_the_picture(used: dict[tuple[int, str], int]) -> None:
    rows = [{"day": f"2026-02-{d:02}T00:00:00+00:00", "tenant": t, "tokens": n} for (d, t), n in used.items()]
    chart = views.stacked(rows, "day", "tenant", "tokens")
    assert chart is not None
    assert len(chart.legend) == min(len({t for _, t in used}), views.COLORS)
    tallest = max(sum(n for (d, _), n in used.items() if d == day) for day, _ in used)
    for day in {d for d, _ in used}:
        title = f"2026-02-{day:02} 00:00"
        column = [bar for bar in chart.bars if bar.title.startswith(title)]
        amount = sum(n for (d, _), n in used.items() if d == day)
        assert sum(bar.height for bar in column) == pytest.approx(
            amount / tallest * 208, abs=0.1 * len(column)
        )
        assert all(bar.x >= 0 and bar.x + bar.width <= chart.width + 0.1 for bar in column)
        assert all(bar.y >= -0.1 and bar.y + bar.height <= chart.height for bar in column)
    assert all(0 <= bar.color <= views.COLORS for bar in chart.bars)


def test_nothing_used_is_no_chart() -> None:
    assert views.stacked([], "day", "tenant", "tokens") is None
    assert (
        views.stacked([{"day": "2026-02-01", "tenant": None, "tokens": 0}], "day", "tenant", "tokens") is None
    )


_SECONDS = st.floats(0, 100)


@given(_SECONDS, _SECONDS, _SECONDS, _SECONDS)
def test_a_timeline_fills_the_whole_and_no_more(
    queue: float, load: float, first: float, total: float
) -> None:
    row = {"queue_seconds": queue, "load_seconds": load, "first_token_seconds": first, "seconds": total}
    spans = views.timeline(row)
    if total <= 0:
        assert spans == []
        return
    assert sum(span.seconds for span in spans) == pytest.approx(total, rel=1e-6, abs=1e-6)
    assert all(0 <= span.start <= 100 and 0 <= span.length <= 100.01 for span in spans)
    assert [span.start for span in spans] == sorted(span.start for span in spans)


def test_a_timeline_names_its_parts() -> None:
    row = {"queue_seconds": 3.0, "load_seconds": 1.0, "first_token_seconds": 4.0, "seconds": 10.0}
    assert [(span.name, span.start, span.length) for span in views.timeline(row)] == [
        ("queued", 0, 20),
        ("loading", 20, 10),
        ("prefill", 30, 10),
        ("decode", 40, 60),
    ]


@pytest.mark.parametrize(
    ("used", "level"), [(0, "ok"), (79, "ok"), (80, "near"), (99, "near"), (100, "over"), (130, "over")]
)
def test_a_gauge_warns_before_it_is_full(used: int, level: str) -> None:
    found = views.gauge("tokens", used, 100)
    assert found is not None
    assert (found.level, found.share) == (level, min(1.0, used / 100))
    assert views.gauge("tokens", used, None) is None


def test_formats() -> None:
    assert [formats.seconds(value) for value in (None, 0.0123, 3.456, 600, 7200)] == [
        "–",
        "12 ms",
        "3.5 s",
        "10.0 min",
        "2.0 h",
    ]
    assert [formats.size(value) for value in (None, 12, 1536, 3 << 30)] == ["–", "12 B", "1.5 KiB", "3.0 GiB"]
    assert formats.number(1234.5) == "1,234"
    assert formats.segment("a/b?c") == "a%2Fb%3Fc"
    assert formats.flat({"a": {"b": 1, "c": None}, "d": []}) == {"a.b": "1", "a.c": "–", "d": "–"}
    assert '"2026-01-02T03:04:05+00:00"' in formats.when("2026-01-02T03:04:05+00:00")
    assert "&lt;b&gt;" in formats.when("<b>")


def test_a_session_ends_when_it_is_not_used_and_when_it_is_old() -> None:
    sessions = Sessions()
    session = sessions.make("key", "operator", "admin", 0.0)
    token = sessions.start(session)
    assert sessions.find(token, IDLE_S) is session
    assert sessions.find(token, 2 * IDLE_S + 1) is None
    token = sessions.start(sessions.make("key", "operator", "admin", 0.0))
    at = 0.0
    while at <= LIFETIME_S:
        assert sessions.find(token, at) is not None
        at += IDLE_S / 2
    assert sessions.find(token, LIFETIME_S + 1) is None
    session = sessions.make("key", "operator", "admin", 0.0)
    session.lifetime = 60.0
    assert sessions.find(sessions.start(session), 61.0) is None


def test_sessions_are_bounded_and_the_oldest_one_ends() -> None:
    sessions = Sessions(limit=2)
    tokens = [sessions.start(sessions.make(f"key {n}", "customer", "acme", 0.0)) for n in range(3)]
    assert [sessions.find(token, 1.0) is not None for token in tokens] == [False, True, True]
    sessions.end(tokens[1])
    assert sessions.find(tokens[1], 1.0) is None
    assert sessions.find("nonsense", 1.0) is None


def test_a_ticket_works_once_and_not_for_long() -> None:
    sessions = Sessions()
    ticket = sessions.ticket("key", 0.0)
    assert sessions.redeem(ticket, TICKET_S) == "key"
    assert sessions.redeem(ticket, TICKET_S) is None
    assert sessions.redeem(sessions.ticket("key", 0.0), TICKET_S + 1) is None
    assert sessions.redeem("nonsense", 0.0) is None
