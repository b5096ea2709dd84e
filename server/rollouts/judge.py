"""The use case: rollouts are begun, looked at, decided on, and ended by people or by themselves.

Whatever is decided is written together with what answers to the adapter, in one transaction, by whoever was
first (``adapters.store.rollouts``). A process that is killed in between has decided nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from adapters.database.audit import ACTOR
from adapters.database.rows import now
from adapters.errors import AdapterConflict, AdapterError, AdapterNotFound, AdapterRejected
from adapters.store.rollouts import PAGE, Adapted, Record, Rollouts, Stored
from server.errors import ServerError, Unprocessable
from server.publishing.publish import Publishing, move_pin, verify
from server.rollouts.guards import Evidence, Guards
from server.rollouts.late import Window
from server.rollouts.plan import (
    GUARDS,
    STANDARD_GUARDS,
    STANDARD_HOLD_S,
    STANDARD_STEPS,
    Probes,
    Rollout,
    back,
    forward,
    looked,
    overtaken,
    pause,
    probed,
    resume,
)
from server.rollouts.replay import Replayer
from server.rollouts.stored import answering, document, rollout_of, seen_of, some

logger = logging.getLogger(__name__)

Act = Literal["pause", "resume", "forward", "roll_back", "back"]
# Who holds a rollout whose live version is out of service.
SERVER = "server"
NO_REPLAYS = "replayed prompts, which are no longer kept: take it further by hand, or back"


@dataclass(frozen=True, slots=True)
class Wish:
    """How a rollout is to go; what is not said is as in a standard one. ``hold`` is in seconds."""

    steps: Sequence[int] = STANDARD_STEPS
    hold: float = STANDARD_HOLD_S
    guards: Guards = STANDARD_GUARDS


STANDARD = Wish()


@dataclass(frozen=True, slots=True)
class _Read:
    """Requests that were read, the newest row of usage, and what may still come below it."""

    records: Sequence[Record]
    newest: int
    window: Window | None


@dataclass(frozen=True, slots=True)
class _Taken:
    """The evidence with what a look has taken in; ``replays`` are rows of the prompts' store."""

    evidence: Evidence
    read: _Read
    replays: Sequence[int]

    def is_new(self, before: Stored) -> bool:
        return bool(self.read.records or self.replays) or self.read.newest != before.seen

    def as_json(self) -> dict[str, Any]:
        window = self.read.window
        return self.evidence.as_json() | ({"late": window.as_json()} if window is not None else {})


class Judge:
    """Decides on rollouts; ``clock`` says what time it is. ``begun`` is set when there is a new one.

    ``replayer`` has the prompts that rollouts keep.
    """

    def __init__(
        self,
        rows: Rollouts,
        publishing: Publishing,
        replayer: Replayer,
        *,
        clock: Callable[[], datetime] = now,
    ) -> None:
        self.rows = rows
        self.replayer = replayer
        self._publishing = publishing
        self._clock = clock
        self.begun = asyncio.Event()

    async def start(self, tenant: str, adapter: str, version: int, wish: Wish = STANDARD) -> Stored:
        """Begins a rollout, whose first share waits for probes; raises as ``Rollouts.start``.

        Unprocessable for guards that need replayed prompts where there are none.
        """

        def made(live: int) -> Mapping[str, Any]:
            hold = timedelta(seconds=wish.hold)
            new = Rollout(version, live, self._clock(), tuple(wish.steps), hold, wish.guards)
            return document(replace(new, waits_for="golden probes"))

        if wish.guards.replays:
            await self._check_replays(tenant, wish.guards)
        await self._settle(tenant, adapter)
        stored = await self.rows.start(tenant, adapter, version, made)
        logger.info("rollout of %s/%s@%d begins", tenant, adapter, version)
        self.begun.set()
        return stored

    async def _check_replays(self, tenant: str, guards: Guards) -> None:
        why = None
        if not self.replayer.possible:
            why = "this server replays no prompts: LORAPLEX_ROLLOUT_KEY is not set, or it makes embeddings"
        elif not await self.rows.samples(tenant):
            why = (
                "this customer's prompts are not kept: the operator sets `sample_prompts` once it has agreed"
            )
        if why is not None:
            raise Unprocessable(
                f"This guard needs replayed prompts, and {why}.", param=f"guards.{guards.replays[0]}"
            )

    async def check_idle(self, tenant: str, adapter: str) -> None:
        """AdapterConflict (``rollout_running``) while a rollout of the adapter is under way."""
        if await self._settle(tenant, adapter):
            raise AdapterConflict(
                f"A rollout of `{adapter}` is under way and sets its split. Pause it, take it further or roll"
                " it back; a version that you set live ends it.",
                code="rollout_running",
            )

    async def _settle(self, tenant: str, adapter: str) -> bool:
        """Whether a rollout of the adapter is under way, once what was changed by hand has ended it."""
        for stored in await self.rows.active(tenant, adapter):
            rollout = rollout_of(stored)
            ended = self._ended(stored, rollout, await self.rows.adapted_now(stored, rollout.live))
            if ended is None or not ended.ended or await self._save(stored, ended) is None:
                return True
        return False

    async def act(self, tenant: str, adapter: str, id_: str, action: Act) -> Stored:
        """What a person wants of it; the audit knows who. AdapterConflict for one that has ended."""
        by = ACTOR.get().name
        for _ in range(10):
            stored = await self.rows.get(tenant, adapter, id_)
            rollout = rollout_of(stored)
            if rollout.ended:
                raise AdapterConflict(
                    f"This rollout is {rollout.state.replace('_', ' ')}; begin another one.",
                    code="rollout_ended",
                )
            done = await self._save(stored, self._acted(stored, rollout, action, by))
            if done is not None:
                return done
            await self.look(stored)  # the guards were first, or somebody changed what answers
        raise AdapterConflict("The rollout changes all the time. Try again.", code="rollout_running")

    def _acted(self, stored: Stored, rollout: Rollout, action: Act, by: str) -> Rollout:
        at = self._clock()
        numbers = _evidence(stored, rollout).numbers()
        match action:
            case "pause":
                return pause(rollout, by, at)
            case "resume":
                return resume(rollout, by, at)
            case "forward":
                return forward(rollout, by, at, numbers)
            case _:
                return back(rollout, "rolled back by hand", by, at, numbers)

    async def look(self, stored: Stored) -> Stored | None:
        """What has become of it: takes in what ended since, asks for probes that are due, and decides.

        None where somebody else has changed it meanwhile; the next look sees that.
        """
        rollout = rollout_of(stored)
        adapted = await self.rows.adapted(stored, rollout.live)
        ended = self._ended(stored, rollout, adapted)
        if ended is not None:
            return await self._save(stored, ended)
        assert adapted is not None
        evidence = _evidence(stored, rollout)
        read = await self._read(stored, rollout)
        samples = rollout.samples
        for record in some(read.records):
            if (request := seen_of(record)) is not None:
                is_new = record.version == rollout.version
                evidence.see(request, is_new=is_new)
                samples += is_new and not request.unanswered
        found = await self.replayer.sampler.prompts.results(stored.id) if self.replayer.possible else []
        for _, result in found:
            evidence.see_replay(result)
        rollout = looked(replace(rollout, samples=samples), evidence, self._clock())
        if rollout.guards.replays and not rollout.ended and not await self._replays(stored):
            rollout = replace(rollout, waits_for=NO_REPLAYS)
        if rollout.wants_probes:
            rollout = await self._probed(stored, rollout, adapted)
        return await self._save(stored, rollout, _Taken(evidence, read, [row for row, _ in found]))

    async def _replays(self, stored: Stored) -> bool:
        return self.replayer.possible and await self.rows.samples(stored.tenant)

    async def _read(self, stored: Stored, rollout: Rollout) -> _Read:
        """The requests that have ended since the last look, and those that were committed late."""
        versions = rollout.live, rollout.version
        kept = (stored.evidence or {}).get("late") if self.rows.late else None
        window, newest = Window.from_json(kept, stored.seen), stored.seen
        records: list[Record] = []
        if self.rows.late and window.floor < newest:
            records = await self.rows.late_requests(stored, versions, window.floor, newest, window.counted)
        while page := await self.rows.requests(stored, versions, newest):
            records += page
            newest = page[-1].id
            if len(page) < PAGE:
                break
        if not self.rows.late:
            return _Read(records, newest, None)
        at = self._clock().timestamp()
        return _Read(records, newest, window.after(newest, [record.id for record in records], at))

    def _ended(self, stored: Stored, rollout: Rollout, adapted: Adapted | None) -> Rollout | None:
        """The rollout where something other than its guards ends or holds it; None otherwise."""
        at = self._clock()
        if adapted is None:
            return overtaken(rollout, None, "the adapter was deleted", at)
        if adapted.answering != stored.answering:
            why = "live or split was changed by hand, or a version uploaded"
            return overtaken(rollout, adapted.answering.live, why, at)
        if rollout.version not in adapted.quarantined:
            return overtaken(rollout, rollout.live, "the new version was deleted", at)
        if (reason := adapted.quarantined[rollout.version]) is not None:
            return back(rollout, f"the new version is out of service: {reason}", SERVER, at, {})
        if adapted.quarantined.get(rollout.live) is not None and rollout.held_by in (None, GUARDS):
            return pause(rollout, SERVER, at, "the live version is out of service; nothing to compare with")
        return None

    async def _probed(self, stored: Stored, rollout: Rollout, adapted: Adapted) -> Rollout:
        """``rollout`` after its probes; as it was, with the reason, where the engine cannot say now."""
        if not rollout.guards.probes:
            return probed(rollout, Probes(), self._clock())
        new, live = (
            (adapted.reports.get(number, {}).get("probe") or {}).get("effect", True)
            for number in (rollout.version, rollout.live)
        )
        try:
            found = await verify(self._publishing, stored.tenant, stored.adapter, rollout.version)
            matches, numbers = bool(found["matches"]), {"probes": found}
        except AdapterNotFound as exc:
            if exc.code != "probes_not_found":
                return replace(rollout, waits_for=f"golden probes: {exc.message}")
            matches, numbers = None, {}
        except AdapterRejected as exc:
            matches, numbers = False, {"probes": {"code": exc.code, "message": exc.message}}
        except (AdapterError, ServerError) as exc:
            return replace(rollout, waits_for=f"golden probes: {exc.message}")
        return probed(rollout, Probes(matches, new, live, numbers), self._clock())

    async def _save(self, before: Stored, after: Rollout, taken: _Taken | None = None) -> Stored | None:
        """Writes what has changed; see ``Rollouts.save``."""
        was = rollout_of(before)
        if after == was and (taken is None or not taken.is_new(before)):
            return before
        decided = after.decisions[-1] if after.decisions[-1:] != was.decisions[-1:] else None
        by_hand = decided is not None and decided.by == "hand"
        saved = await self.rows.save(
            before,
            state=after.state,
            answering=before.answering if by_hand else answering(after),
            document=document(after),
            evidence=taken.as_json() if taken is not None else before.evidence,
            seen=before.seen if taken is None else taken.read.newest,
            action=decided.action if decided is not None else None,
            replays=taken.replays if taken is not None else (),
        )
        if saved is not None and decided is not None:
            about = {"tenant": before.tenant, "adapter": before.adapter, "version": before.version}
            name = f"{before.tenant}/{before.adapter}@{before.version}"
            what = (name, decided.action.replace("_", " "), decided.share, decided.reason)
            logger.info("rollout of %s: %s at %d %%: %s", *what, extra=about)
            await self._follow(before)
        return saved

    async def _follow(self, stored: Stored) -> None:
        """Pins of the adapter go where its requests go; in a fleet replicas see to that themselves."""
        if not self._publishing.shared:
            try:
                adapter = await self._publishing.catalog.adapter(stored.tenant, stored.adapter)
            except AdapterNotFound:
                return
            move_pin(self._publishing.dispatcher, adapter)


def _evidence(stored: Stored, rollout: Rollout) -> Evidence:
    return Evidence.from_json(rollout.guards, dict(stored.evidence) if stored.evidence else None)
