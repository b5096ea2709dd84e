"""The fake engine's memory of adapters: what it reads, holds and has in slots, and how that fails."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from server.engine.calls import PageOp, PageResult, StageResult
from tests.support.fake_answers import Run


def read_adapter(folder: Path) -> int:
    """Bytes of the adapter in ``folder``; raises what is wrong with it."""
    json.loads((folder / CONFIG_FILE).read_bytes())
    with safe_open(folder / WEIGHTS_FILE, "np") as file:
        return sum(len(bytes(file.get_tensor(name))) for name in file.keys())  # noqa: SIM118


@dataclass
class Times:
    """Seconds: to read an adapter, to activate one, between two tokens, until a page call begins.

    ``in_step`` if all that runs has its tokens at the same moments, as in an engine.
    """

    stage: float = 0.0
    activate: float = 0.0
    step: float = 0.0
    page: float = 0.0
    start: float = 20.0
    in_step: bool = False

    def until_next(self) -> float:
        """Seconds until the next token."""
        if not self.in_step:
            return self.step
        now = time.monotonic()
        return (round(now / self.step) + 1) * self.step - now


class FakeSlots:
    """Carries paging operations out, on the event loop's clock, and notes who takes what is in use."""

    def __init__(self, *, gpu_slots: int, host_slots: int, times: Times, read: Callable[[Path], int]) -> None:
        self.times = times
        self.violations: list[str] = []
        self.running: list[Run] = []
        self.tells = False  # by itself, when a load has been read
        self._read = read
        self._host_slots = host_slots
        self._slots: list[int | None] = [None] * gpu_slots
        self._host: set[int] = set()
        self._loads: dict[int, PageOp] = {}
        self._staging: dict[int, float] = {}
        self._evicted_while_staging: set[int] = set()
        self._failures: Counter[tuple[str, str]] = Counter()
        self._on_notice: Callable[[], None] = lambda: None

    # --- what tests do to it ---------------------------------------------------------------------

    def fail(self, verb: str, name: str, times: int = 1) -> None:
        """The next ``times`` of this operation on this version fail."""
        self._failures[verb, name] += times

    def lose(self, name: str) -> None:
        """Drops what it holds of a version, behind everybody's back."""
        for load_id in [i for i in self._host if self._loads[i].name == name]:
            self._remove(load_id)

    def plant(self, load_id: int) -> None:
        """Holds a load that nobody asked for."""
        self._loads[load_id] = PageOp("stage", load_id, "stray")
        self._host.add(load_id)

    def held(self, name: str) -> bool:
        return any(self._loads[i].name == name for i in self._host)

    # --- paging ----------------------------------------------------------------------------------

    def _carry_out(self, op: PageOp) -> PageResult:
        if op.verb == "stage":
            return PageResult(self._stage(op), 0.0)
        if op.verb == "activate":
            return PageResult(self._activate(op.load_id), self.times.activate)
        if op.verb == "deactivate":
            if op.load_id in self._host and self._fails("deactivate", self._loads[op.load_id]):
                return PageResult("RuntimeError: injected", 0.0)
            self._leave_slot(op.load_id)
        elif op.load_id in self._staging:
            self._evicted_while_staging.add(op.load_id)
        else:
            self._remove(op.load_id)
        return PageResult(None, 0.0)

    def _stage(self, op: PageOp) -> str | None:
        if op.load_id in self._loads:
            self._violated(f"load id {op.load_id} is used twice")
        self._loads[op.load_id] = op
        loop = asyncio.get_running_loop()
        due = self._staging[op.load_id] = loop.time() + self.times.stage
        if self.tells:
            loop.call_at(due, self._on_notice)
        return None

    def _collect(self) -> list[StageResult]:
        now = asyncio.get_running_loop().time()
        staged = []
        for load_id in [i for i, due in self._staging.items() if due <= now]:
            del self._staging[load_id]
            if load_id in self._evicted_while_staging:
                self._evicted_while_staging.discard(load_id)
                continue
            error, size = self._outcome(self._loads[load_id])
            if error is None and len(self._host) >= self._host_slots:
                error = "host memory holds max_cpu_loras adapters already"
            if error is not None:
                staged.append(StageResult(load_id, error, 0.0, 0))
                continue
            self._host.add(load_id)
            staged.append(StageResult(load_id, None, self.times.stage, size))
        return staged

    def _outcome(self, op: PageOp) -> tuple[str | None, int]:
        if self._fails("stage", op):
            return "OSError: injected", 0
        try:
            return None, self._read(Path(op.path))
        except Exception as exc:  # as in a staging thread
            return f"{type(exc).__name__}: {exc}", 0

    def _activate(self, load_id: int) -> str | None:
        if load_id not in self._host:
            return f"LookupError: load {load_id} is not in host memory"
        if load_id in self._slots:
            return None
        if None not in self._slots:
            return "LookupError: no slot is free"
        if self._fails("activate", self._loads[load_id]):
            self._remove(load_id)  # as the worker does: half an adapter must not stay
            return "RuntimeError: injected"
        self._slots[self._slots.index(None)] = load_id
        return None

    def _remove(self, load_id: int) -> None:
        self._leave_slot(load_id)
        self._host.discard(load_id)

    def _leave_slot(self, load_id: int) -> None:
        if load_id in self._slots:
            self._slots[self._slots.index(load_id)] = None
            for run in self.running:
                if run.load_id == load_id:
                    self._violated(f"load {load_id} left its slot under a running request")

    def _fails(self, verb: str, op: PageOp) -> bool:
        if not self._failures[verb, op.name]:
            return False
        self._failures[verb, op.name] -= 1
        return True

    def _violated(self, what: str) -> None:
        self.violations.append(what)
