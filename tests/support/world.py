"""A dispatcher on a ``FakeEngine``, without files, database or HTTP, for scenarios in virtual time."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prometheus_client.parser import text_string_to_metric_families

from adapters.errors import AdapterNotFound
from adapters.model import BaseModel, ModuleShape, Version
from server.accounts.tenants import Tenant
from server.engine.calls import EngineDied, PageOp, PageReport
from server.engine.restarts import Restarts
from server.inference.completion import Asked, Completion, Completions, open_completion
from server.inference.dialects.registry import DIALECTS
from server.inference.embeddings import embed
from server.inference.local import LocalAnswers
from server.metrics import Metrics
from server.scheduling.dispatcher import Dispatcher
from server.scheduling.lease import Lease
from server.scheduling.nouns import Ask, Capacity
from tests.support.fakes import FakeEngine, Times

BASE = BaseModel("base-model", {"model.layers.0.mlp.up_proj": ModuleShape(8, 8)}, max_lora_rank=8)
SOME_TIME = Times(stage=0.05, activate=0.01, step=0.02, page=0.001)


def version(tenant: str, adapter: str = "a") -> Version:
    name = f"{tenant}-{adapter}"
    return Version(tenant, adapter, 1, name, Path("/blobs") / name, rank=8)


def tenant(id_: str, **fields: Any) -> Tenant:
    settings: dict[str, Any] = {"weight": 1.0, "base_allowed": True, "max_queued": None, "max_running": None}
    made = datetime.now(UTC)
    return Tenant(id=id_, name=id_, created_at=made, cache_salt=f"salt-{id_}", **(settings | fields))


class _Catalog:
    """Every tenant has every adapter, after a turn of the loop."""

    async def resolve(self, tenant: str, model: str | None, unit: str = "") -> Version:
        await asyncio.sleep(0)
        if model == "nobody":
            raise AdapterNotFound("The model does not exist.")
        return version(tenant, model or "a")


class Pager(FakeEngine):
    """A FakeEngine whose ``page`` can be made to raise."""

    raises: Exception | None = None

    async def page(self, ops: Sequence[PageOp]) -> PageReport:
        if self.raises is not None:
            raise self.raises
        return await super().page(ops)


@dataclass
class World:
    gpu_slots: int = 1
    host_slots: int = 2
    max_running: int = 4
    times: Times = field(default_factory=lambda: SOME_TIME)
    limits: dict[str, Any] = field(default_factory=dict)
    make_engine: Callable[..., Any] = Pager
    restarts: int = 0
    stall: float = 60.0
    base: BaseModel = BASE

    def __post_init__(self) -> None:
        self._ids = itertools.count()
        slots = {"gpu_slots": self.gpu_slots, "host_slots": self.host_slots, "max_running": self.max_running}
        self.engine = self.make_engine(self.base, **slots, times=self.times, read=lambda _: 1000)
        self.metrics = Metrics()
        self.deaths: list[EngineDied] = []
        self.faults: list[str] = []
        self.dispatcher = Dispatcher(
            self.engine,
            Capacity(**slots, **self.limits),
            self.metrics,
            on_death=self.deaths.append,
            stall=self.stall,
            restarts=Restarts(self.restarts),
            on_fault=lambda version, _: self.faults.append(version),
        )
        self.plan = self.dispatcher._plan
        answers = LocalAnswers(self.engine, self.dispatcher, self.metrics)
        self.service = Completions(answers, _Catalog(), self.metrics)  # type: ignore[arg-type]

    async def __aenter__(self) -> Self:
        self.dispatcher.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.dispatcher.stop()
        if error is None:
            self.plan.check()
            assert self.engine.violations == []

    def lose(self, how: str) -> None:
        """The engine is lost by its "death" or by a "hang"."""
        if how == "death":
            self.engine.die()
        else:
            self.engine.hang()

    def check_idle(self) -> None:
        """Nothing waits, runs or is held for a request, in any of the places that could."""
        snapshot = self.dispatcher.snapshot()
        assert (snapshot.queued, snapshot.running) == ({}, {})
        assert not any(slot.running for slot in snapshot.slots)
        assert self.dispatcher._leases == {}
        assert self.dispatcher._waiting == {}
        assert self.engine.running == []
        self.plan.check()

    async def open(self, who: str | Tenant, *, n: int = 1, **fields: Any) -> Completion:
        """A streamed completion unless ``stream`` says otherwise; of an embedding model, three embeddings."""
        asker = tenant(who) if isinstance(who, str) else who
        if self.base.pooling:
            given = {"input": ["hello"] * 3}
            wanted = Asked(f"r{next(self._ids)}", asker, DIALECTS["embedding"])
            return await embed(self.service, wanted, given)
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "stream": True, "n": n}
        chat = DIALECTS["chat"]
        return await open_completion(self.service, Asked(f"r{id(body)}", asker, chat), {**body, **fields})

    async def ask(self, who: str | Tenant, **fields: Any) -> str:
        """All chunks of the answer, or its document, as the routes read them."""
        return await read(await self.open(who, **fields))

    async def lease(self, who: str) -> Lease:
        """A lease on the version of ``who``, for one token of a prompt and five of an answer."""
        wanted = version(who)
        ask = Ask(self.dispatcher.new_id(who), who, wanted.key, prompt_tokens=1, max_tokens=5)
        return await self.dispatcher.submit(ask, wanted)

    def outcomes(self) -> dict[str, int]:
        """outcome -> requests, as the metrics have it."""
        total: Counter[str] = Counter()
        lines = self.metrics.render().decode().splitlines(keepends=True)
        # Not the whole page, which takes longer to parse than most tests to run.
        counted = "".join(line for line in lines if "loraplex_requests_total" in line)
        for family in text_string_to_metric_families(counted):
            for sample in family.samples:
                if sample.name == "loraplex_requests_total":
                    total[sample.labels["outcome"]] += int(sample.value)
        return {outcome: count for outcome, count in total.items() if count}

    @asynccontextmanager
    async def busy(self, who: str, tokens: int = 100) -> Any:
        """A stream of ``who`` that has begun and goes on."""
        reading = asyncio.create_task(self.ask(who, max_tokens=tokens))
        while not any(run.call.model.startswith(who) for run in self.engine.running):
            await asyncio.sleep(0.01)
        try:
            yield reading
        finally:
            reading.cancel()
            await asyncio.wait([reading])


async def read(opened: Completion) -> str:
    if opened.stream is None:
        return str(opened.body)
    try:
        return "".join([chunk async for chunk in opened.stream])
    finally:
        await opened.stream.aclose()
