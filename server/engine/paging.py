"""Adapters in the engine's workers: operations go to all of them, and what they report is put together."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping, Sequence
from typing import Any

from server.engine.calls import PageOp, PageReport, PageResult, StageResult, WorkerReport
from server.engine.notices import Notices
from server.settings import Settings

# Between two slices of a slot that is filled: others ask the engine for something meanwhile.
FILL_POLL_S = 0.0005


def worker_options(settings: Settings, notices: Notices | None = None) -> dict[str, Any]:
    """What ``LoraplexWorker.loraplex_open`` is told beside the numbers of slots."""
    return {
        "shards": settings.host_shards,
        "shared": bool(settings.rank_slots),
        "pool": settings.host_pool,
        "slice_s": settings.activation_slice,
        "notices": None if notices is None else (notices.address, notices.token),
    }


class Paging:
    """The loads of one engine. ``workers`` is vLLM's client, which has ``collective_rpc``.

    ``names`` is vLLM's table of servable names, kept equal to what is in a slot.
    """

    def __init__(self, workers: Any, names: MutableMapping[str, Any], options: dict[str, Any]) -> None:
        self._workers = workers
        self._names = names
        self._options = options
        self._number = 1
        self.is_told = False  # every worker says by itself that a load has ended
        self._loads: dict[int, PageOp] = {}
        self._half_staged: dict[int, list[StageResult]] = {}
        self._left_over: list[int] = []  # loads that have failed on some workers and are in others' memory

    async def open(self, gpu_slots: int, host_slots: int) -> list[dict[str, Any]]:
        """Starts paging on every worker; returns their accounts of the model. See ``loraplex_open``."""
        described: list[dict[str, Any]] = await self._workers.collective_rpc(
            "loraplex_open", args=(gpu_slots, host_slots), kwargs=self._options
        )
        self._number = len(described)
        self.is_told = all(one.get("notices") for one in described)
        return described

    def forget(self) -> None:
        """The workers are gone, and all loads with them."""
        self._loads.clear()
        self._half_staged.clear()
        self._left_over.clear()
        self._names.clear()

    async def page(self, ops: Sequence[PageOp]) -> PageReport:
        """As ``Engine.page``; raises what vLLM does."""
        left_over, self._left_over = self._left_over, []
        wire = [("evict", load_id, "", "") for load_id in left_over]
        wire += [(op.verb, op.load_id, op.name, op.path) for op in ops]
        reports = await self._whole_slots(wire)
        by_op = list(zip(*(r["results"] for r in reports), strict=True))[len(left_over) :]
        results = []
        for op, per_worker in zip(ops, by_op, strict=True):
            ended = [report.get("filled", {}).get(op.load_id) for report in reports]
            if op.verb == "activate":
                per_worker = tuple(fill or one for fill, one in zip(ended, per_worker, strict=True))
            errors = [error for error, _ in per_worker if error is not None]
            results.append(PageResult(errors[0] if errors else None, max(s for _, s in per_worker)))
            self._remember(op, failed=bool(errors))
        return PageReport(tuple(results), self._whole_stages(reports))

    async def _whole_slots(self, wire: list[tuple[str, int, str, str]]) -> list[dict[str, Any]]:
        """What the workers answer to ``wire`` once every slot is full that one of them began to fill.

        They go on with each call, a slice at a time, between two steps; ``filled`` is how each slot ended.
        """
        reports: list[dict[str, Any]] = await self._workers.collective_rpc("loraplex_page", args=(wire,))
        latest = reports
        while True:
            for whole, one in zip(reports, latest, strict=True):
                filled = whole.setdefault("filled", {})
                filled |= {load_id: (error, seconds) for load_id, error, seconds in one.get("activated", ())}
                if one is not whole:
                    whole["staged"] = [*whole["staged"], *one["staged"]]
            if not any(one.get("filling") for one in latest):
                return reports
            await asyncio.sleep(FILL_POLL_S)
            latest = await self._workers.collective_rpc("loraplex_page", args=([],))

    async def report(self) -> WorkerReport:
        """As ``Engine.report``; raises what vLLM does."""
        reports = await self._workers.collective_rpc("loraplex_report")
        first = reports[0]
        return WorkerReport(
            host=frozenset.intersection(*(frozenset(r["host"]) for r in reports)),
            slots=tuple(
                load if all(load in r["slots"] for r in reports) else None for load in first["slots"]
            ),
            staging=frozenset().union(*(r["staging"] for r in reports)),
            in_step_loads=sum(r["in_step_loads"] for r in reports),
        )

    def _remember(self, op: PageOp, *, failed: bool) -> None:
        """Keeps vLLM's table of servable names equal to what is in a slot."""
        from vllm.lora.request import LoRARequest

        if op.verb == "stage" and not failed:
            self._loads[op.load_id] = op
        elif op.verb == "activate" and not failed:
            load = self._loads[op.load_id]
            self._names[load.name] = LoRARequest(load.name, load.load_id, load.path)
        elif op.verb in ("deactivate", "evict"):
            load = self._loads.pop(op.load_id, op) if op.verb == "evict" else self._loads.get(op.load_id, op)
            served = self._names.get(load.name)
            if served is not None and served.lora_int_id == op.load_id:
                del self._names[load.name]

    def _whole_stages(self, reports: Sequence[dict[str, Any]]) -> tuple[StageResult, ...]:
        """A load is staged when every worker has it, and failed when one of them could not.

        The others then give it back with the next operations: nobody else would ever ask for it.
        """
        whole = []
        for report in reports:
            for load_id, *staged in report["staged"]:
                parts = self._half_staged.setdefault(load_id, [])
                parts.append(StageResult(load_id, *staged))
                if len(parts) == self._number:
                    del self._half_staged[load_id]
                    whole.append(self._together(parts))
        return tuple(whole)

    def _together(self, parts: Sequence[StageResult]) -> StageResult:
        load_id = parts[0].load_id
        errors = [part.error for part in parts if part.error is not None]
        if errors:
            self._loads.pop(load_id, None)
            if len(errors) < len(parts):
                self._left_over.append(load_id)
        slowest = max(part.seconds for part in parts)
        size = sum(part.size_bytes for part in parts)
        ranks = max(part.ranks for part in parts)
        return StageResult(load_id, errors[0] if errors else None, slowest, size, ranks)
