"""Runs batches: which ones, line by line, until each has ended.

    look     every few seconds: which batches have not ended; starts as many as may run at once
    _run     one batch: checks its lines, answers those without a result, makes files of the results

A line passes the same use case as every other request, as of the tenant and with the key that asked for the
batch, at the priority ``batch`` and in a queue apart. What refuses it for a while (limits, a queue, an engine
that starts again) makes it wait; everything else is its answer. Whoever is killed leaves lines without a
result, which are answered again by whoever goes on.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from adapters.database.database import Database
from adapters.database.rows import now
from adapters.errors import AdapterError
from adapters.store.batches import Batch, Batches, Result, State
from adapters.store.files import Files, StoredFile
from adapters.store.replicas import Replicas
from adapters.tasks import run_in_thread
from server.accounts.authentication import Authentication
from server.accounts.tenants import Tenant
from server.batches.lines import (
    ENDPOINTS,
    BadLine,
    Checker,
    Line,
    again_after,
    answered,
    parse,
    refused,
    split,
    unanswered,
)
from server.batches.pace import Pace
from server.batches.writer import Writer
from server.errors import BadRequest, Internal, ServerError
from server.inference.completion import Asked, Completions, new_request_id, open_completion
from server.inference.embeddings import embed
from server.inference.long_documents import written
from server.limits.permissions import counted_scopes
from server.settings import Settings

logger = logging.getLogger(__name__)

LOOK_S = 5.0
IDLE_LOOK_S = 60.0  # while there is none, in a process of its own
WATCH_S = 1.0  # how soon a cancelled batch stops
CHORES_S = 600.0
# A process of a fleet holds a batch for so long; it says every third of it that it is still there.
LEASE_S = 30.0
# Of a limit by minute batches leave this part to other requests.
LEAVE = 0.5
TOGETHER = 200


@dataclass(frozen=True, slots=True)
class Fleet:
    """Where processes agree who runs which batch: rows of ``replicas``, in the name of ``holder``."""

    replicas: Replicas
    holder: str

    async def hold(self, batch: str) -> bool:
        """Takes or keeps ``batch``; False while another process has it."""
        return await self.replicas.hold(batch, self.holder, LEASE_S)

    async def release(self, batch: str | None = None) -> None:
        """Gives ``batch`` up, or all that it holds, so that another process need not wait for it."""
        try:
            await self.replicas.release(self.holder, batch)
        except Exception as exc:  # it runs out by itself
            logger.warning("the lease of %s could not be given up: %s", batch or "batches", exc)


class Runner:
    """``start`` once the server answers requests; it has to stop before the engine does.

    At most ``running`` lines are in the engine at once, of at most so many batches. ``most_bytes`` bounds a
    line. ``fleet`` is None where no other process runs batches of this database.
    """

    def __init__(
        self,
        batches: Batches,
        files: Files,
        completions: Completions,
        authentication: Authentication,
        foreground: Callable[[], int],
        *,
        running: int,
        most_bytes: int,
        fleet: Fleet | None = None,
    ) -> None:
        self.batches = batches
        self.files = files
        self.running = running
        self.completions = completions
        self._authentication = authentication
        self._metrics = completions.metrics
        self._most_bytes = most_bytes
        self._fleet = fleet
        self._pace = Pace(running, foreground)
        self._active: dict[str, tuple[str, asyncio.Task[None]]] = {}  # (tenant, task)
        self._wake = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []

    def start(self, stack: AsyncExitStack) -> None:
        """``stack`` stops it."""
        stack.push_async_callback(self.stop)
        self._loops = [asyncio.create_task(self._tidy_forever(), name="loraplex-files")]
        if self.running:
            self._loops += [
                asyncio.create_task(self._look_forever(), name="loraplex-batches"),
                asyncio.create_task(self._pace.watch(), name="loraplex-pace"),
            ]

    async def stop(self) -> None:
        """Ends what runs, and gives it up; what was answered is kept."""
        tasks = [*self._loops, *(task for _, task in self._active.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._fleet is not None:
            await self._fleet.release()

    def wake(self) -> None:
        """There is a new batch."""
        self._wake.set()

    async def _look_forever(self) -> None:
        pause = LOOK_S
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            self._wake.clear()
            pause = LOOK_S
            try:
                # What is new in this process wakes it, and a look wakes a busy process.
                if not await self._look() and self._fleet is None:
                    pause = IDLE_LOOK_S
            except Exception as exc:  # the database is away, perhaps
                logger.warning("batches cannot be looked for: %s", exc)

    async def _look(self) -> bool:
        """Begins what there is room for. Whether any batch has not ended."""
        unfinished = await self.batches.unfinished()
        waiting = [batch for batch in unfinished if batch.id not in self._active]
        busy = [tenant for tenant, _ in self._active.values()]
        for batch in next_ones(waiting, busy, self.running - len(busy)):
            if self._fleet is None or await self._fleet.hold(batch.id):
                task = asyncio.create_task(self._run(batch), name=f"loraplex-{batch.id}")
                self._active[batch.id] = batch.tenant, task
        return bool(unfinished)

    async def _tidy_forever(self) -> None:
        while True:
            with suppress(Exception):  # the next time it may go
                while await self.files.expire():
                    pass
                await self.batches.forget()
            await asyncio.sleep(CHORES_S)

    # --- one batch -------------------------------------------------------------------------------

    async def _run(self, batch: Batch) -> None:
        try:
            await self._one(batch)
            if self._fleet is not None:
                await self._fleet.release(batch.id)
        except Exception:
            logger.exception("the batch %s was interrupted; it goes on", batch.id)
            await asyncio.sleep(LOOK_S)
        finally:
            del self._active[batch.id]
            self.wake()

    async def _one(self, batch: Batch) -> None:
        """Either all of it, or what can be said of it once it is cancelled, has expired or is gone."""
        stopping = asyncio.create_task(self._stopped(batch))
        working = asyncio.create_task(self._work(batch))
        try:
            await asyncio.wait({stopping, working}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
                return
        finally:
            stopping.cancel()
            working.cancel()
            await asyncio.wait({stopping, working})
        end = stopping.result()
        if end is not None:
            await self._give_up(batch, end)
            await self._end(batch, end)

    async def _stopped(self, batch: Batch) -> State | None:
        """Returns when it must stop, with how it ends then; None where it is another's or gone."""
        clock = asyncio.get_running_loop().time  # leases go by the database's clock: the time of day may jump
        beat, held_until = 0.0, clock() + LEASE_S
        while True:
            state: State | None = "in_progress"
            with suppress(AdapterError):  # the database may be back a second later
                state = await self.batches.state(batch.id)
            if state == "cancelling":
                return "cancelled"
            if state not in ("validating", "in_progress"):
                return None
            if now() >= batch.expires_at:
                return "expired"
            if self._fleet is not None and (beat := beat + WATCH_S) >= LEASE_S / 3:
                beat = 0.0
                with suppress(AdapterError):
                    if not await self._fleet.hold(batch.id):
                        return None
                    held_until = clock() + LEASE_S
                if clock() >= held_until:
                    return None
            await asyncio.sleep(WATCH_S)

    async def _work(self, batch: Batch) -> None:
        if batch.state == "cancelling":
            await asyncio.Event().wait()  # until that is noticed
        if batch.state == "validating":
            checker = await self._check(batch)
            if checker.errors:
                await self.batches.fail(batch.id, checker.errors)
                self._metrics.batch_ended(batch.tenant, "failed")
                return
            await self.batches.begin(batch.id, checker.lines)
        await self._answer(batch)
        await self._end(batch, "completed")

    async def _check(self, batch: Batch) -> Checker:
        checker = Checker(batch.endpoint, self._most_bytes)
        async for lines in self._lines(batch):
            await run_in_thread(checker.look, lines)
            if checker.full:
                break
        checker.finish()
        return checker

    async def _lines(self, batch: Batch) -> AsyncIterator[list[tuple[int, bytes | None]]]:
        file = await self.files.read_by_batch(batch.input_file)
        async for lines in split(self.files.content(file), self._most_bytes):
            yield lines

    async def _end(self, batch: Batch, state: State) -> None:
        await self.batches.end(batch.id, state)
        self._metrics.batch_ended(batch.tenant, state)
        logger.info("the batch %s of %s is %s", batch.id, batch.tenant, state)

    async def _give_up(self, batch: Batch, end: State) -> None:
        """Says of each line without an answer that there is none; nothing of a batch that has not begun."""
        found = await self.batches.get(batch.tenant, batch.id)
        if not found.total:
            return
        done = await self.batches.done(batch.id)
        async for lines in self._lines(batch):
            rest = await run_in_thread(self._unanswered, batch, lines, done, end)
            for at in range(0, len(rest), TOGETHER):
                await self.batches.record(batch.id, rest[at : at + TOGETHER])

    def _unanswered(
        self, batch: Batch, lines: Sequence[tuple[int, bytes | None]], done: Collection[int], end: State
    ) -> list[Result]:
        found = []
        for number, raw in lines:
            if number not in done:
                line = parse(number, raw, batch.endpoint, self._most_bytes)
                found.append(Result(number, True, unanswered(new_request_id(), line.custom_id, end)))
        return found

    # --- its lines -------------------------------------------------------------------------------

    async def _answer(self, batch: Batch) -> None:
        """Answers every line that has no result."""
        done = await self.batches.done(batch.id)
        writer = Writer(lambda results: self.batches.record(batch.id, results))
        room = asyncio.Semaphore(await self._at_once(batch))
        tasks: set[asyncio.Task[None]] = set()
        try:
            async for lines in self._lines(batch):
                for number, raw in lines:
                    if number in done:
                        continue
                    await room.acquire()
                    task = asyncio.create_task(self._line(batch, number, raw, writer))
                    tasks.add(task)
                    task.add_done_callback(lambda _: room.release())
                    await _look_at(tasks)
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await writer.close()

    async def _at_once(self, batch: Batch) -> int:
        """Lines of it at once: a limit on requests at once is half for batches."""
        most = self.running
        with suppress(ServerError, AdapterError):
            tenant = await self._authentication.acting(batch.tenant, batch.key)
            for scope in counted_scopes(tenant):
                if (limit := scope.limits.requests_at_once) is not None:
                    most = min(most, max(1, int(limit * LEAVE)))
        return most

    async def _line(self, batch: Batch, number: int, raw: bytes | None, writer: Writer) -> None:
        try:
            line = parse(number, raw, batch.endpoint, self._most_bytes)
        except BadLine as exc:  # it was looked at before it ran, by a version with other rules
            error = BadRequest(str(exc))
            await writer.write(Result(number, True, refused(new_request_id(), "", error)))
            return
        result = await self._result(batch, line)
        await writer.write(result)
        self._metrics.batch_line(batch.tenant, "failed" if result.failed else "completed")

    async def _result(self, batch: Batch, line: Line) -> Result:
        tries = 0
        while True:
            id_, tries = new_request_id(), tries + 1
            asked: Asked | None = None
            try:
                tenant = await self._authentication.acting(batch.tenant, batch.key)
                await self._room_in_limits(tenant)
                asked = Asked(id_, tenant.in_background(), ENDPOINTS[batch.endpoint])
                async with self._pace:
                    return await self._ask(line, asked)
            except (ServerError, AdapterError) as exc:
                left = (batch.expires_at - now()).total_seconds()
                wait = again_after(exc, tries, left)
                if wait is None:
                    told = refused(id_, line.custom_id, exc, asked.version if asked else None)
                    return Result(line.number, True, told)
            except Exception:
                logger.exception("line %d of the batch %s", line.number, batch.id)
                error = Internal("The server failed on this request.")
                return Result(
                    line.number, True, refused(id_, line.custom_id, error, asked.version if asked else None)
                )
            await asyncio.sleep(wait)

    async def _ask(self, line: Line, asked: Asked) -> Result:
        if line.body.get("stream"):
            raise BadRequest("A line of a batch cannot be streamed.", param="stream")
        use_case = embed if asked.dialect.pools else open_completion
        opened = await use_case(self.completions, asked, line.body)
        used, parts = opened.lease, opened.parts
        if parts is None:
            parts = await written(opened.document)
        document = answered(asked.id, line.custom_id, b"".join(parts).decode(), asked.version)
        return Result(
            line.number, False, document, used.prompt_tokens, used.cached_tokens, used.output_tokens
        )

    async def _room_in_limits(self, tenant: Tenant) -> None:
        """Waits until a line leaves others their part of the limits by minute."""
        ledger = self.completions.quotas.ledger
        while True:
            left = [each for scope in counted_scopes(tenant) for each in ledger.remaining(scope).values()]
            used_up = [each.reset for each in left if each.remaining <= each.limit * LEAVE]
            if not used_up or max(used_up) <= 0:
                return
            await asyncio.sleep(min(max(used_up), WATCH_S))


async def _look_at(tasks: set[asyncio.Task[None]]) -> None:
    """Forgets those that have ended; raises what one raised."""
    for task in [task for task in tasks if task.done()]:
        tasks.discard(task)
        task.result()


def next_ones(waiting: Sequence[Batch], busy: Sequence[str], most: int) -> list[Batch]:
    """At most ``most`` of ``waiting``, which are by age: of the tenants with the fewest, the oldest first.

    ``busy`` names a tenant once for each batch of it that runs.
    """
    running = Counter(busy)
    ranked: list[tuple[int, int, Batch]] = []
    for batch in waiting:
        ranked.append((running[batch.tenant], len(ranked), batch))
        running[batch.tenant] += 1
    return [batch for _, _, batch in sorted(ranked, key=lambda each: each[:2])][: max(0, most)]


async def create(
    runner: Runner,
    tenant: Tenant,
    endpoint: str,
    file: StoredFile,
    *,
    notes: dict[str, str] | None,
    keep: timedelta,
) -> Batch:
    """A new batch of the lines of ``file``, which begins soon. QuotaExceeded as ``Batches.create``."""
    key = tenant.key.id if tenant.key else None
    batch = await runner.batches.create(file, endpoint, key=key, notes=notes, keep=keep)
    runner.wake()
    return batch


class Foreground(Protocol):
    """A dispatcher, of this process's engine or of a fleet."""

    def foreground(self) -> int: ...


def runner_of(
    settings: Settings,
    database: Database,
    completions: Completions,
    authentication: Authentication,
    dispatcher: Foreground,
) -> Runner:
    """The one of this process; the gateways of a fleet agree on who runs which batch."""
    return Runner(
        Batches(database),
        Files(database),
        completions,
        authentication,
        dispatcher.foreground,
        running=settings.batch_running,
        most_bytes=settings.max_body_bytes,
        fleet=None if settings.role == "all" else Fleet(Replicas(database), uuid.uuid4().hex),
    )
