"""What all replicas have in slots, host memory and queues, for ``/admin/v1/residency`` of a gateway."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from adapters.awake import AwakeTimeout
from adapters.errors import AdapterError
from server.errors import NotFound, ServerError
from server.fleet.directory import Directory, Known

# After which the others are shown without one that does not answer.
LOOK_S = 2.0
# The same where events are asked for: up to 8,192 of each, and the state before them. The command line
# gives up after ``server.cli.client.SECONDS`` without a byte, and must have the others' events by then.
EVENTS_S = 20.0
SUMMED = ("queued", "running", "counters")  # by tenant
COUNTED = ("aside", "drains", "preemptions")

JSON = Mapping[str, Any]
Seen = tuple[JSON, JSON | None]  # what is known of a replica, and what it told; None of one that did not


class FleetResidency:
    """``server.http.services.Peers``: asks each replica, whenever somebody looks."""

    def __init__(self, directory: Directory, waiting: Callable[[], Mapping[str, int]]) -> None:
        """``waiting``: the requests that wait at this gateway, by queue."""
        self._directory = directory
        self._waiting = waiting

    async def residency(self, own: JSON, events: int, replica: str | None) -> dict[str, Any]:
        """What a single process would show as ``own``, of all replicas or of the one with that id.

        NotFound (``replica_not_found``) where this gateway does not know it. A replica that does not answer
        is among ``replicas``, and nothing of it elsewhere.
        """
        chosen = [one for one in self._directory.all() if replica in (None, one.id)]
        if replica is not None and not chosen:
            raise NotFound(
                f"There is no replica {replica!r}; GET /admin/v1/replicas lists them.",
                code="replica_not_found",
                param="replica",
            )
        told = await asyncio.gather(*(self._ask(one, events) for one in chosen))
        found = merged(own, [(_known(one), said) for one, said in zip(chosen, told, strict=True)], events > 0)
        if replica is None:  # and what waits here for a place of its customer
            found["queued"] = _by_tenant([found["queued"], self._waiting()])
        return found

    async def _ask(self, one: Known, events: int) -> JSON | None:
        try:
            async with AwakeTimeout(EVENTS_S if events else LOOK_S):
                return await self._directory.post(one, "residency", {"events": events})
        except (ServerError, AdapterError, TimeoutError):  # it is lost, hung, or of an older release
            return None


def _known(one: Known) -> dict[str, Any]:
    """What a gateway knows of a replica without asking it."""
    facts, state = one.facts, one.said.get("state", "unknown")
    return {
        "id": one.id,
        "url": one.url,
        "state": "lost" if one.lost else state,
        "gpu_slots": facts.capacity.gpu_slots if facts is not None else None,
        "host_slots": facts.capacity.host_slots if facts is not None else None,
        "max_running": facts.max_running if facts is not None else None,
        "backlog_seconds": None if one.lost else round(one.backlog, 3),
    }


def merged(own: JSON, seen: Sequence[Seen], with_events: bool = False) -> dict[str, Any]:
    """One document of many: entries say whose they are, counts are sums, and ``replicas`` has the parts.

    ``own`` is what the gateway says of itself: whether it drains, and the times to the first token, which
    are those of its clients. Tokens per second are of all replicas.
    """
    told = [(str(known["id"]), said) for known, said in seen if said is not None]
    found = {
        **own,
        **{name: list(_entries(told, name)) for name in ("slots", "host")},
        **{name: _by_tenant(said[name] for _, said in told) for name in SUMMED},
        **{name: sum(said[name] for _, said in told) for name in COUNTED},
        "rates": {**own["rates"], **_tokens(said["rates"] for _, said in told)},
        "replicas": [_part(known, said) for known, said in seen],
    }
    if with_events:
        found["events"] = list(_entries(told, "events"))
        if any("checkpoint" in said for _, said in told):  # where all that are kept were asked for
            found["checkpoint"] = list(_entries(told, "checkpoint"))
    return found


def _entries(told: Iterable[tuple[str, JSON]], name: str) -> Iterator[dict[str, Any]]:
    for replica, said in told:
        for entry in said.get(name) or ():
            yield {"replica": replica, **entry}


def _by_tenant(counts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(total)


def _tokens(rates: Iterable[JSON]) -> dict[str, Any]:
    """Tokens per second of all replicas that have been looked at before; None of none."""
    known = [one for one in rates if one["output_tokens_per_second"] is not None]
    if not known:
        return {"seconds": 0.0, "output_tokens_per_second": None}
    together = round(sum(one["output_tokens_per_second"] for one in known), 2)
    return {"seconds": max(one["seconds"] for one in known), "output_tokens_per_second": together}


def _part(known: JSON, said: JSON | None) -> dict[str, Any]:
    """One of ``replicas``; null is what nobody has told."""
    if said is None:
        unknown = dict.fromkeys(("running", "queued", *COUNTED, "rates"))
        return {**known, "answered": False, **unknown}
    sums = {name: sum(said[name].values()) for name in ("running", "queued")}
    return {
        **known,
        "answered": True,
        **sums,
        **{name: said[name] for name in COUNTED},
        "rates": said["rates"],
    }
