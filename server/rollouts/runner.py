"""Looks at every rollout again and again; in a fleet one process does it for all."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from adapters.errors import AdapterError
from adapters.store.replicas import Replicas
from adapters.store.rollouts import Stored
from server.errors import Unavailable
from server.rollouts.judge import Judge

logger = logging.getLogger(__name__)

# A look takes some 20 ms of processor time: a hundredth of one core while a rollout runs.
LOOK_EVERY_S = 2.0
IDLE_LOOK_EVERY_S, IDLE_IN_FLEET_S = 30.0, 10.0  # while there is none; what begins in this process is told
# Who holds the lease decides; when it dies, another one does after so long.
LEASE = "rollouts"
LEASE_S = 15.0


@asynccontextmanager
async def looking(judge: Judge, replicas: Replicas | None = None) -> AsyncIterator[Runner]:
    """A runner that looks until the block ends."""
    runner = Runner(judge, replicas)
    try:
        await judge.replayer.sampler.open()
    except AdapterError as exc:  # what is left is removed, or cannot be read, when it is come to
        logger.warning("prompts of another key could not be removed: %s", exc)
    runner.start()
    try:
        yield runner
    finally:
        await runner.stop()
        await judge.replayer.sampler.stop()


class Runner:
    """Looks at the rollouts of ``judge``. ``replicas`` keep the lease; None where there is one process."""

    def __init__(
        self, judge: Judge, replicas: Replicas | None = None, *, every: float = LOOK_EVERY_S
    ) -> None:
        self._judge = judge
        self._replicas = replicas
        self._every = every
        self._id = f"rollouts-{secrets.token_hex(8)}"
        self._looking: dict[str, asyncio.Task[None]] = {}
        self._replaying: dict[str, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None
        self.decides = False

    def start(self) -> None:
        """Begins to look; ``stop`` ends it."""
        self._task = asyncio.create_task(self._forever(), name="loraplex-rollouts")

    async def stop(self) -> None:
        """Ends every look, and gives the lease up."""
        at_work = (self._task, *self._looking.values(), *self._replaying.values())
        tasks = [task for task in at_work if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._replicas is not None:
            try:
                await self._replicas.release(self._id)
            except Exception as exc:  # it runs out by itself
                logger.warning("the lease of rollouts could not be given up: %s", exc)

    async def _forever(self) -> None:
        while True:
            pause = self._every
            try:
                # What begins in this process is told, and a look wakes a busy process.
                if not await self.look():
                    idle = IDLE_LOOK_EVERY_S if self._replicas is None else IDLE_IN_FLEET_S
                    pause = max(pause, idle)
            except Exception as exc:  # the database may be away
                logger.warning("rollouts cannot be looked at: %s", exc)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._judge.begun.wait()
            self._judge.begun.clear()

    async def look(self) -> bool:
        """Begins a look at every rollout, each beside the others: probes may take minutes.

        Whether there are any.
        """
        active = await self._judge.rows.active()
        self._judge.replayer.sampler.watch(active)
        if not active:
            self.decides = False
            return False
        if self._replicas is not None:
            self.decides = await self._replicas.hold(LEASE, self._id, LEASE_S)
            if not self.decides:
                return True
        for stored in active:
            if stored.id not in self._looking:
                task = asyncio.create_task(self._look(stored), name=f"loraplex-rollout-{stored.id}")
                self._looking[stored.id] = task
            if self._judge.replayer.possible and stored.id not in self._replaying:
                task = asyncio.create_task(self._replay(stored), name=f"loraplex-replay-{stored.id}")
                self._replaying[stored.id] = task
        return True

    async def _replay(self, stored: Stored) -> None:
        try:
            await self._judge.replayer.replay(stored)
        except Exception as exc:  # without its text, which may quote a prompt
            logger.error("replays of the rollout %s failed: %s", stored.id, type(exc).__name__)
        finally:
            self._replaying.pop(stored.id, None)

    async def _look(self, stored: Stored) -> None:
        try:
            await self._judge.look(stored)
        except Unavailable:
            pass  # the server is stopping
        except Exception:
            logger.exception("rollout %s of %s/%s failed", stored.id, stored.tenant, stored.adapter)
        finally:
            self._looking.pop(stored.id, None)
