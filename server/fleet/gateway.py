"""A gateway: all that a server is, but for the engine, which its replicas have.

Imports neither vLLM nor torch. What routes ask of the engine and the dispatcher is answered from what the
replicas say of themselves, or asked of the best of them.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Collection
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import aiohttp

from adapters.database.audit import ACTOR
from adapters.errors import AdapterError
from adapters.model import BaseModel, Quota, Tier, Version, Waivers
from adapters.store.blobs import BlobStore
from server.engine.parsers import Parsers
from server.engine.sizing import EngineCapacity
from server.errors import Unavailable
from server.fleet.directory import Directory, Unreachable
from server.fleet.remote import RemoteAnswers
from server.fleet.wire import PREFIX, Kind, as_json, frame, framed, piece, version_of
from server.metrics import Gauges, ReplicaGauges
from server.publishing.publish import Published
from server.scheduling.lease import Lease
from server.scheduling.nouns import Snapshot, by_tenant

logger = logging.getLogger(__name__)


class FleetEngine:
    """What routes ask of an engine, of those of the fleet."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    @property
    def base(self) -> BaseModel:
        return self._directory.facts.base

    @property
    def parsers(self) -> Parsers:
        return self._directory.facts.parsers

    @property
    def lora_dtype(self) -> str:
        return self._directory.facts.dtype

    @property
    def version(self) -> str:
        return self._directory.facts.engine

    @property
    def max_model_len(self) -> int:
        return self._directory.facts.max_model_len

    @property
    def max_running(self) -> int:
        return self._directory.facts.max_running

    @property
    def capacity(self) -> EngineCapacity:
        """The capacity of one replica."""
        return self._directory.facts.capacity

    async def check(self) -> None:
        """Unavailable unless a replica is ready."""
        await self._directory.check()


class FleetDispatcher:
    """What routes ask of a dispatcher. Pins and retirements need no telling: replicas read the database."""

    is_restarting = False
    is_silent = False
    restarts = 0

    def __init__(self, directory: Directory, answers: RemoteAnswers) -> None:
        self._directory = directory
        self._answers = answers
        self._draining = False

    def snapshot(self) -> Snapshot:
        """What waits here and at replicas by tenant, and runs there, as they last said, within a second; and
        no slots, which ``server.fleet.residency`` asks them for."""
        queued: Counter[str] = Counter(self._answers.places.waiting())
        running: Counter[str] = Counter()
        for one in self._directory.all():
            if not one.lost:
                queued.update(one.queued)
                running.update(one.running)
        return Snapshot(
            slots=(),
            host=(),
            queued=queued,
            running=running,
            counters={},
            aside=0,
            drains=0,
            preemptions=0,
            draining=self._draining,
        )

    def version(self, key: str) -> Version | None:
        """What a key of the engines' stands for, if this gateway was asked for it."""
        return self._answers.versions.get(key)

    def numbered(self, version: Version) -> None:
        """Replicas read it."""

    def tier_of(self, version: Version) -> Tier:
        """The fastest tier that the version is in at any replica."""
        return self._directory.tier_of(version.key)

    def resident(self) -> dict[str, tuple[Version, Tier]]:
        """What is in memory at some replica, of the versions that this gateway was asked for."""
        found: dict[str, tuple[Version, Tier]] = {}
        for key, version in self._answers.versions.items():
            tier = self._directory.tier_of(key)
            if tier is not Tier.DISK:
                found[key] = version, tier
        return found

    async def warm(self, version: Version, *, slot: bool, timeout: float) -> Tier:
        """At the replica that its requests go to. Raises as a dispatcher does."""
        sent = {"version": as_json(version), "slot": slot, "timeout": timeout}
        return Tier((await self._directory.ask("warm", sent, version))["tier"])

    def pin(self, version: Version, pinned: bool) -> None:
        """Replicas read it."""

    def retire(self, version: Version) -> None:
        """Replicas read it."""

    def in_use(self, keys: Collection[str]) -> bool:
        """As far as this gateway knows."""
        leases = self._answers.leases.values()
        return any(lease.version is not None and lease.version.key in keys for lease in leases)

    def gauges(self, versions_on_disk: int) -> Gauges:
        """Of all replicas together, and of each."""
        known = self._directory.all()
        said = [one.said for one in known if one.said and not one.lost]
        gpu = {key for one in said for key in one["in_slots"]}
        host = {key for one in said for key in one["in_host"]} - gpu
        facts = [one.facts for one in known if one.facts is not None and not one.lost]
        return Gauges(
            adapters={
                Tier.DISK: max(0, versions_on_disk - len(host) - len(gpu)),
                Tier.HOST: len(host),
                Tier.GPU: len(gpu),
            },
            slots=sum(one["gpu_slots"] for one in said),
            slots_used=sum(len(one["in_slots"]) for one in said),
            host_slots=sum(one.capacity.host_slots for one in facts),
            queued=by_tenant(self._answers.places.waiting()),
            running=Counter(lease.tenant for lease in self._answers.leases.values()),
            in_step_loads=0,
            replicas=[
                ReplicaGauges(
                    id=one.id,
                    up=not one.lost and one.said.get("state") == "ready",
                    running=one.said.get("running", 0),
                    queued=one.said.get("queued", 0),
                    slots_used=len(one.said.get("in_slots", ())),
                    backlog=one.backlog,
                    verifying=not one.lost and one.said.get("state") == "verifying",
                )
                for one in known
            ],
        )

    def drain(self) -> None:
        """Take no more requests; those that run go on to their end."""
        self._draining = True
        self._answers.places.drain()

    async def wait_until_idle(self, timeout: float) -> bool:
        """True once nothing of this gateway runs; False if that is not so after ``timeout`` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self._answers.leases:
                    await asyncio.sleep(0.02)
        return not self._answers.leases

    def foreground(self) -> int:
        """How many requests run for this gateway that are not in the background."""
        return sum(not lease.background for lease in self._answers.leases.values())

    def open_leases(self) -> list[Lease]:
        """What runs for this gateway."""
        return list(self._answers.leases.values())


class RemotePublisher:
    """``server.publishing.publish.Elsewhere``: a replica receives, inspects, tries and links an upload."""

    def __init__(self, directory: Directory, blobs: BlobStore) -> None:
        self._directory = directory
        self._blobs = blobs

    async def publish(
        self,
        tenant: str,
        name: str,
        files: AsyncIterator[tuple[str, bytes]],
        *,
        waived: Waivers,
        key: str | None,
        quota: Quota | None,
        annotation: str | None,
        keep_reason: bool,
        make_live: bool,
    ) -> Published:
        """As ``server.publishing.publish.publish``; Unavailable where no replica can take it."""
        options = {
            "tenant": tenant,
            "adapter": name,
            "waived": asdict(waived),
            "key": key,
            "quota": [quota.adapters, quota.size_bytes] if quota is not None else None,
            "note": annotation,
            "keep_reason": keep_reason,
            "make_live": make_live,
            "actor": [ACTOR.get().name, ACTOR.get().request_id],
        }
        wrong: list[Exception] = []

        async def body() -> AsyncIterator[bytes]:
            yield framed(Kind.OPTIONS, options)
            try:
                async for file, data in files:
                    yield piece(file, data)
            except Exception as exc:  # the client's fault or its leaving: the replica sees no END
                wrong.append(exc)
                return
            yield frame(Kind.END, b"")

        replica = self._directory.choose_for_upload(tenant, name)
        if replica is None:
            raise self._directory.nobody()
        try:
            async with self._directory.while_heard(replica):
                response = await self._directory.stream(replica, f"{PREFIX}/publish", body())
                told = json.loads(await response.read())
        except (Unreachable, aiohttp.ClientError, OSError, ValueError) as exc:
            raise wrong[0] if wrong else _broke_off() from exc
        except AdapterError as exc:
            raise wrong[0] if wrong else exc from None
        if digest := told["answer"].get("digest"):
            self._directory.uploaded(replica, f"{tenant}/{name}@{digest}")
        gone = [version_of(version, self._blobs.path) for version in told["gone"]]
        return Published(told["answer"], gone)

    async def verify(self, tenant: str, name: str, number: int | None) -> dict[str, Any]:
        """As ``server.publishing.publish.verify``."""
        sent = {"tenant": tenant, "adapter": name, "number": number}
        return await self._directory.ask("verify", sent)

    async def unfit(self) -> list[dict[str, Any]]:
        """What any ready replica does not serve, each version once. Unavailable where none is ready, and
        where one does not answer: nothing would be said of what it finds.
        """
        replicas = self._directory.ready()
        if not replicas:
            raise self._directory.nobody()
        told = await asyncio.gather(*(self._directory.post(one, "unfit", {}) for one in replicas))
        found: dict[tuple[str, str, int], dict[str, Any]] = {}
        for one in (each for answer in told for each in answer["unfit"]):
            found.setdefault((one["tenant"], one["adapter"], one["version"]), one)
        return [found[key] for key in sorted(found)]


def _broke_off() -> Unavailable:
    return Unavailable(
        "The replica that took the upload is gone; send it again.", code="replica_lost", retry_after=1
    )
