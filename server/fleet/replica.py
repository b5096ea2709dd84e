"""A replica: announces itself, says how it is, and does in its turn what only one process of a fleet does."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Any, Protocol

from adapters.model import Tier, Version
from adapters.store.replicas import ReplicaInfo, Replicas
from server.fleet.placement import Placement
from server.fleet.reports import Report
from server.fleet.scaling import pressure
from server.fleet.verifying import verify_first
from server.fleet.wire import Kind, framed
from server.http.services import Services
from server.inference.local import LocalAnswers
from server.scheduling.nouns import Snapshot

logger = logging.getLogger(__name__)

BEAT_EVERY_S = 2.0
MOVE_EVERY_S = 1.0
FORGOTTEN = timedelta(minutes=10)  # after which the row of one that died goes
CHORES, CHORES_HELD_S, CHORES_EVERY_S = "chores", 15.0, 3600.0

Chores = Callable[[], Awaitable[None]]


class Relayed(Protocol):
    """A request of a gateway; see ``server.fleet.internal.RelayedCall``."""

    async def tell(self, framed: bytes) -> None: ...
    async def end(self) -> tuple[int, int, int]: ...


class Replica:
    """``chores`` are done by one replica at a time, when its turn begins and every hour; ``remember`` with
    each beat of its turn."""

    def __init__(
        self,
        services: Services,
        answers: LocalAnswers,
        rows: Replicas,
        *,
        key: str,
        url: str,
        chores: Chores,
        remember: Chores,
    ) -> None:
        self.id = uuid.uuid4().hex[:16]
        self.key = key
        self.services = services
        self.answers = answers
        self.calls: dict[str, Relayed] = {}
        self.holds_chores = False
        self._url = url
        self._rows = rows
        self._chores = chores
        self._remember = remember
        self._chores_due = 0.0
        self._numbers = itertools.count(1)
        self._pinned: dict[str, Version] = {}
        self._seen = -1
        self._peers: frozenset[str] = frozenset()
        self._beating: asyncio.Task[None] | None = None
        self._announced = False

    def start(self) -> None:
        """Announces this replica to the gateways, at once and then again and again.

        While ``Services.verifying`` it is shown, and sent nothing.
        """
        logger.info("replica %s at %s", self.id, self._url)
        if self.services.verifying:
            self.services.in_background(self._verify())
        self._beating = asyncio.create_task(self._beat_forever(), name="loraplex-beat")

    async def stop(self) -> None:
        """Leaves the fleet."""
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait([self._beating])
        with contextlib.suppress(Exception):  # then it is forgotten later
            await self._rows.leave(self.id)
            await self._rows.release(self.id)

    @property
    def facts(self) -> dict[str, Any]:
        """What does not change while this replica lives."""
        engine = self.answers.engine
        return {
            "base": engine.base.name,
            "fingerprint": engine.base.fingerprint,
            "pooling": engine.base.pooling,
            "head": asdict(engine.base.head) if engine.base.head is not None else None,
            "max_lora_rank": engine.base.max_lora_rank,
            "max_model_len": engine.max_model_len,
            "max_running": engine.max_running,
            "dtype": engine.lora_dtype,
            "parsers": engine.parsers.as_json(),
            "engine": engine.version,
            "gpu_slots": engine.capacity.gpu_slots,
            "host_slots": engine.capacity.host_slots,
            "slot_bytes": engine.capacity.slot_bytes,
            "entry_bytes": engine.capacity.entry_bytes,
        }

    @property
    def state(self) -> str:
        """``ready``, ``verifying`` (before its first request), ``restarting``, or ``draining``."""
        if self.services.draining:
            return "draining"
        if self.services.dispatcher.is_restarting:
            return "restarting"
        return "verifying" if self.services.verifying else "ready"

    def report(self, now_: Snapshot | None = None) -> Report:
        """The replica's load and tiers now, with a number that grows with each report."""
        engine, now_ = self.answers.engine, now_ or self.services.dispatcher.snapshot()
        base = engine.base.fingerprint or engine.base.name
        in_slots = [
            slot.version for slot in now_.slots if slot.version is not None and slot.state == "active"
        ]
        return Report(
            replica=self.id,
            number=next(self._numbers),
            base=base,
            kind=f"{engine.version} {engine.lora_dtype} {base}",
            state=self.state,
            gpu_slots=len(now_.slots),
            max_running=engine.max_running,
            running=sum(now_.running.values()),
            queued=sum(now_.queued.values()),
            busy_slots=sum(1 for slot in now_.slots if slot.running),
            in_slots=in_slots,
            in_host=[entry.version for entry in now_.host if entry.tier is not Tier.DISK],
            backlog=self.services.metrics.pace.backlog(time.monotonic(), sum(now_.queued.values())),
        )

    async def drain(self) -> None:
        """Lets the gateways know, and asks them to move what runs, until nothing does."""
        with contextlib.suppress(Exception):
            await self._announce()
        while True:
            await self._ask_to_move()
            await asyncio.sleep(MOVE_EVERY_S)

    async def _ask_to_move(self) -> None:
        """Gateways move what another replica can go on with, and leave the rest here."""
        for call in list(self.calls.values()):
            with contextlib.suppress(Exception):  # a gateway that has gone takes its requests along
                await call.tell(framed(Kind.MOVE, {}))

    async def _verify(self) -> None:
        try:
            await verify_first(self.services, self.id)
        except Exception:  # it must not keep a replica away that can answer
            logger.exception("versions could not be verified")
        self.services.verifying = False
        with contextlib.suppress(Exception):  # gateways ask it anyway, and the next beat is soon
            await self._announce()

    # --- beats -----------------------------------------------------------------------------------------

    async def _beat_forever(self) -> None:
        while True:
            try:
                if self.state == "restarting":  # elsewhere they need not wait for the engine
                    await self._ask_to_move()
                await self._beat()
            except Exception as exc:  # the database may be away: gateways that know us still ask us
                logger.warning("this replica cannot announce itself: %s", exc)
            await asyncio.sleep(BEAT_EVERY_S)

    async def _beat(self) -> None:
        await self._announce()
        await self._follow()
        self.holds_chores = not self.services.draining and await self._rows.hold(
            CHORES, self.id, CHORES_HELD_S
        )
        if self.holds_chores:
            await self._remember()
        clock = asyncio.get_running_loop().time()
        if not self.holds_chores:
            self._chores_due = clock
        elif clock >= self._chores_due:
            self._chores_due = clock + CHORES_EVERY_S
            self.services.in_background(self._do_chores())

    async def _announce(self) -> None:
        report = self.report()
        pressed = {"backlog_seconds": round(report.backlog, 3), "pressure": round(pressure(report), 3)}
        load = report.as_json() | {"replica": self.id} | pressed
        others = await self._rows.beat(self.id, self._url, self.state, self.facts, load)
        if others and self._announced:
            logger.warning(
                "replica %s announces itself at %s too: give each a LORAPLEX_REPLICA_URL of its own",
                ", ".join(others),
                self._url,
            )
        elif others:
            logger.info("in place of replica %s at %s", ", ".join(others), self._url)
        self._announced = True

    async def _do_chores(self) -> None:
        try:
            await self._chores()
        except Exception:
            logger.exception("what this replica does for the fleet failed")

    async def _follow(self) -> None:
        """Pins what is this replica's part, and lets go of what nothing links to any more."""
        rows = await self._rows.all()
        if any(row.silent_s > FORGOTTEN.total_seconds() for row in rows):
            await self._rows.forget(FORGOTTEN)
        alive = [row for row in rows if not row.is_lost]
        peers = frozenset(row.id for row in alive if row.state == "ready")
        generation = self.services.database.generation
        if (generation, peers) == (self._seen, self._peers):
            return
        catalog, dispatcher = self.services.publishing.catalog, self.services.dispatcher
        fitness = self.services.publishing.fitness
        wanted = {
            version.key: version
            for version in await catalog.pinned()
            if version.quarantine is None and fitness.problem(version) is None
        }
        placement = Placement()
        for row in alive:
            placement.beat(0.0, _report_of(row))
        mine = set(placement.pins(wanted, 0.0).get(self.id, ()))
        for key in self._pinned.keys() - mine:
            dispatcher.pin(self._pinned.pop(key), False)
        for key in mine - self._pinned.keys():
            self._pinned[key] = wanted[key]
            dispatcher.pin(wanted[key], True)
        linked = await catalog.linked_digests() | set(self.services.publishing.coming)
        for entry in dispatcher.snapshot().host:
            if entry.version.rpartition("@")[2] not in linked:
                dispatcher.retire_key(entry.version)
        self._seen, self._peers = generation, peers


def _report_of(row: ReplicaInfo) -> Report:
    return Report.of(row.id, {**row.load, "state": row.state})
