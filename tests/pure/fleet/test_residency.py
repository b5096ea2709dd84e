"""What a gateway shows of its replicas' slots and queues, from what each told."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from server.cli import client
from server.fleet import residency
from server.fleet.residency import FleetResidency, merged

OWN = {
    "slots": [], "host": [], "queued": {}, "running": {"acme": 1}, "counters": {},
    "aside": 0, "drains": 0, "preemptions": 0, "draining": True,
    "rates": {
        "seconds": 9.0, "output_tokens_per_second": 7.0, "first_tokens": 3,
        "first_token_p50": 0.1, "first_token_p99": 0.2,
    },
}  # fmt: skip


def known(id_: str, **changes: Any) -> dict[str, Any]:
    return {"id": id_, "url": f"http://{id_}", "state": "ready", "gpu_slots": 2} | changes


def told(tokens: float | None, **changes: Any) -> dict[str, Any]:
    rates = {"seconds": 2.0, "output_tokens_per_second": tokens, "first_tokens": 8, "first_token_p50": 5.0}
    said = {
        "slots": [{"version": "acme/a@1"}], "host": [], "queued": {"acme": 2}, "running": {"acme": 1, "b": 1},
        "counters": {"acme": 1.5}, "aside": 1, "drains": 2, "preemptions": 3, "draining": False,
        "rates": rates, "events": [{"event": "tick"}],
    }  # fmt: skip
    return said | changes


def test_counts_are_sums_and_entries_say_whose_they_are() -> None:
    found = merged(OWN, [(known("x"), told(10.0)), (known("y"), told(2.5, queued={"c": 1}))])
    assert found["slots"] == [{"replica": id_, "version": "acme/a@1"} for id_ in "xy"]
    assert (found["queued"], found["running"]) == ({"acme": 2, "c": 1}, {"acme": 2, "b": 2})
    assert found["counters"] == {"acme": 3.0}
    assert (found["aside"], found["drains"], found["preemptions"]) == (2, 4, 6)
    assert [(one["id"], one["running"], one["queued"]) for one in found["replicas"]] == [
        ("x", 2, 2),
        ("y", 2, 1),
    ]
    assert "events" not in found


def test_tokens_are_of_all_and_first_tokens_of_the_gateways_clients() -> None:
    found = merged(OWN, [(known("x"), told(10.0)), (known("y"), told(2.5)), (known("z"), told(None))])
    assert found["rates"] == OWN["rates"] | {"seconds": 2.0, "output_tokens_per_second": 12.5}
    first = merged(OWN, [(known("x"), told(None))])["rates"]
    assert first["output_tokens_per_second"] is None, "nobody has looked before"
    assert found["draining"], "the gateway's own"


def test_one_that_does_not_answer_has_nulls_and_counts_nowhere() -> None:
    found = merged(OWN, [(known("x", state="lost"), None), (known("y"), told(2.5))], with_events=True)
    lost, there = found["replicas"]
    assert (lost["answered"], lost["state"], lost["running"], lost["rates"]) == (False, "lost", None, None)
    assert there["answered"]
    assert lost.keys() == there.keys()
    assert {slot["replica"] for slot in found["slots"]} == {"y"}
    assert found["events"] == [{"replica": "y", "event": "tick"}]
    assert "checkpoint" not in found, "nobody asked for all that are kept"
    all_of_it = {**told(2.5), "checkpoint": [{"part": "numbers"}]}
    found = merged(OWN, [(known("x"), all_of_it), (known("y"), None)], with_events=True)
    assert found["checkpoint"] == [{"replica": "x", "part": "numbers"}]


@pytest.mark.parametrize("events", [0, 8192])
async def test_events_are_waited_for_longer_than_slots(events: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica writes all that it keeps in small pieces, beside its requests."""
    monkeypatch.setattr(residency, "LOOK_S", 0.02)
    replica: Any = SimpleNamespace(
        id="x", url="http://x", said={"state": "ready"}, facts=None, lost=False, backlog=0.0
    )

    async def post(one: Any, path: str, sent: Any) -> dict[str, Any]:
        assert (one, path, sent) == (replica, "residency", {"events": events})
        await asyncio.sleep(0.3 if events else 3600)
        return told(2.5)

    directory: Any = SimpleNamespace(all=lambda: [replica], post=post)
    found = await FleetResidency(directory, dict).residency(OWN, events, None)
    assert found["replicas"][0]["answered"] is bool(events)
    assert found.get("events") == ([{"replica": "x", "event": "tick"}] if events else None)


def test_the_command_line_waits_for_longer_than_a_gateway_does() -> None:
    """It gave up just before the answer came that says which replica is slow."""
    assert residency.EVENTS_S + residency.LOOK_S <= client.SECONDS


def test_without_replicas_nothing_is_there() -> None:
    found = merged(OWN, [])
    assert (found["slots"], found["running"], found["replicas"]) == ([], {}, [])
