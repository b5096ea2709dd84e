"""What replicas are, and what a gateway says of them all. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapters.model import BaseModel, Head
from server.engine.parsers import Parsers
from server.engine.sizing import EngineCapacity

CAPACITY = ("gpu_slots", "host_slots", "slot_bytes", "entry_bytes")


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change while a replica lives."""

    base: BaseModel
    max_model_len: int
    max_running: int
    capacity: EngineCapacity
    dtype: str
    engine: str
    parsers: Parsers


def facts_of(sent: Mapping[str, Any]) -> Facts:
    """What ``server.fleet.replica.Replica.facts`` told."""
    base = BaseModel(
        name=str(sent["base"]),
        modules={},
        max_lora_rank=int(sent["max_lora_rank"]),
        fingerprint=sent["fingerprint"],
        pooling=bool(sent["pooling"]),
        head=Head(**sent["head"]) if sent.get("head") else None,  # an older replica has none
    )
    capacity = EngineCapacity(**{name: int(sent[name]) for name in CAPACITY})
    sizes = int(sent["max_model_len"]), int(sent["max_running"])
    parsers = sent.get("parsers") or {}  # an older replica says nothing of them
    chosen = Parsers(
        parsers.get("tool_parser"),
        parsers.get("reasoning_parser"),
        bool(parsers.get("tools_shown")),
        bool(parsers.get("tools_guessed")),
    )
    return Facts(base, *sizes, capacity, str(sent["dtype"]), str(sent["engine"]), chosen)


def common(facts: Sequence[Facts]) -> Facts:
    """What most of them say, the first of them where several are as many.

    ``max_model_len`` and ``max_running`` are the smallest of all: what a gateway fills in by them is taken by
    whichever replica a request goes to. ``facts`` must not be empty.
    """
    kinds = [replace(one, max_model_len=0, max_running=0) for one in facts]
    most = max(kinds, key=kinds.count)
    return replace(
        most,
        max_model_len=min(one.max_model_len for one in facts),
        max_running=min(one.max_running for one in facts),
    )
