"""A rollout as the database has it, and back; and a request's record as the guards look at it. Pure."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from adapters.store.rollouts import Answering, Record, Stored
from server.rollouts.guards import Guards, Seen
from server.rollouts.plan import Decision, Rollout

# What failed was the server's fault, or the version's; not what limits refused, nor whom its client left.
_FAILED = ("failed", "unavailable", "quarantined")
# Of these the version knows nothing: the server was full, stopped, or without what it leans on. A version
# that is in no slot yet meets them more often than the live one.
_NO_TURN = frozenset(
    {
        "database_unavailable", "limits_unavailable", "no_replica", "no_room", "queue_timeout",
        "server_overloaded", "shutting_down", "store_unavailable",
    }
)  # fmt: skip
# Requests of each version that one look takes in.
MOST = 100


def document(rollout: Rollout) -> dict[str, Any]:
    """All of a rollout but its version and state, which have columns."""
    return {
        "live": rollout.live,
        "since": rollout.since.isoformat(),
        "steps": list(rollout.steps),
        "hold": rollout.hold.total_seconds(),
        "guards": rollout.guards.model_dump(),
        "step": rollout.step,
        "share": rollout.share,
        "due": rollout.due,
        "held_by": rollout.held_by,
        "samples": rollout.samples,
        "waits_for": rollout.waits_for,
        "decisions": [decision.as_json() for decision in rollout.decisions],
    }


def rollout_of(stored: Stored) -> Rollout:
    """The rollout that ``document`` was made of."""
    kept: Mapping[str, Any] = stored.document
    state: Any = stored.state
    return Rollout(
        version=stored.version,
        live=kept["live"],
        since=datetime.fromisoformat(kept["since"]),
        steps=tuple(kept["steps"]),
        hold=timedelta(seconds=kept["hold"]),
        guards=Guards.model_validate(kept["guards"]),
        state=state,
        step=kept["step"],
        share=kept["share"],
        due=kept["due"],
        held_by=kept["held_by"],
        samples=kept["samples"],
        waits_for=kept["waits_for"],
        decisions=tuple(map(Decision.from_json, kept["decisions"])),
    )


def answering(rollout: Rollout) -> Answering:
    """What is to answer to the adapter's name."""
    return Answering(rollout.answers, rollout.split)


def some(records: Sequence[Record]) -> Sequence[Record]:
    """At most ``MOST`` of each version, chosen at random and in their order: enough to decide by, so that a
    server with many requests a second does not spend its time on them."""
    by_version: dict[int | None, list[int]] = {}
    for place, record in enumerate(records):
        by_version.setdefault(record.version, []).append(place)
    if all(len(places) <= MOST for places in by_version.values()):
        return records
    draw = random.Random()  # noqa: S311  # which requests count is no secret
    chosen = [place for places in by_version.values() for place in _at_most(places, draw)]
    return [records[place] for place in sorted(chosen)]


def _at_most(places: list[int], draw: random.Random) -> list[int]:
    return places if len(places) <= MOST else draw.sample(places, MOST)


def seen_of(record: Record) -> Seen | None:
    """None for what is not to be counted either: a limit refused it, or the server stopped.

    An answer without tokens, as of embeddings, has begun when it is there.
    """
    no_turn = record.outcome == "unavailable" and record.code in _NO_TURN
    if no_turn or record.outcome == "disconnected":
        return Seen(unanswered=True)
    if record.outcome in _FAILED:
        return Seen(failed=True)
    if record.outcome == "rejected":
        return Seen(refused=True)
    if record.outcome != "completed":
        return None
    tokens, first = record.output_tokens, record.first_token_seconds
    begun = tokens > 0 and first > 0
    if not tokens:
        first = record.seconds
    return Seen(
        first_token=max(0.0, first - record.queue_seconds) if first > 0 else None,
        token=max(0.0, record.seconds - first) / (tokens - 1) if begun and tokens > 1 else None,
        length=tokens if tokens else None,
        cut=record.finish == "length" if record.finish is not None else None,
    )


def as_json(stored: Stored) -> dict[str, Any]:
    """As both APIs show it; ``numbers`` are there where its evidence was read along."""
    from server.rollouts.guards import Evidence

    rollout = rollout_of(stored)
    numbers = None
    if stored.evidence is not None:
        numbers = Evidence.from_json(rollout.guards, dict(stored.evidence)).numbers()
    return {
        "id": stored.id,
        "tenant": stored.tenant,
        "adapter": stored.adapter,
        "version": rollout.version,
        "live": rollout.live,
        "state": rollout.state,
        "steps": list(rollout.steps),
        "step": rollout.step,
        "share": rollout.share,
        "hold": rollout.hold.total_seconds(),
        "guards": rollout.guards.model_dump(),
        "held_by": rollout.held_by,
        "waits_for": rollout.waits_for,
        "reason": rollout.reason,
        "created_at": stored.created_at.isoformat(),
        "updated_at": stored.updated_at.isoformat(),
        "decisions": [decision.as_json() for decision in rollout.decisions],
        "numbers": numbers,
    }
