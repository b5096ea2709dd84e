"""What the plan believes beside what the worker reports. Pure; the worker is right."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from server.engine.calls import WorkerReport
from server.scheduling.nouns import Snapshot


@dataclass(frozen=True, slots=True)
class Corrections:
    """Load ids: ``lost`` ones to tell the plan, ``unknown`` ones to evict, ``slots`` to take back."""

    lost: frozenset[int]
    unknown: frozenset[int]
    slots: frozenset[int]


def corrections(seen: Snapshot, report: WorkerReport, staging: Collection[int]) -> Corrections:
    """How ``seen`` differs from ``report``. Loads in ``staging`` are left to their own answers."""
    believed = {entry.load_id for entry in seen.host}
    in_slots = {slot.load_id for slot in seen.slots if slot.load_id is not None}
    lost = (believed - report.host).difference(staging) | in_slots.difference(report.slots)
    unknown = (report.host - believed).difference(staging) | (report.host & lost)
    return Corrections(
        frozenset(lost), frozenset(unknown), frozenset((believed - in_slots).intersection(report.slots))
    )
