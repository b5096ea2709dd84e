"""What uploads may take while their bytes come: places, a customer's bytes, and room on the disk.

    async with intake.enter(tenant, quota) as place:
        place.counted(body), place.written(files)     raise while they are read

A quota is looked at again when a version is linked; without this, uploads that never end could fill the disk
of everybody. The reserve is for the database and for what an upload is turned into.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from adapters.awake import AwakeClock
from adapters.errors import QuotaExceeded, StorageFull
from server.errors import RequestTimeout, TooManyRequests, Unavailable

LOOK_EVERY = 4 << 20  # bytes between two looks at the disk
FORM_BYTES = 128 << 10  # of a body that are no file's: boundaries, heads of parts
SLOW_AFTER_S = 5.0
SLOW_BYTES_S = 16 << 10  # below this an upload gives way to another one
RETRY_S = 5.0
TICK_S = 1.0  # of the clock that uploads are judged by


class Place:
    """One upload that is coming. Bytes of the body and of its files: an archive has both."""

    def __init__(self, intake: Intake, tenant: str, most: int | None, used: int) -> None:
        self.tenant = tenant
        self._intake = intake
        self._most = most
        self._used = used
        self._stored_before = intake.stored[tenant]
        self._came = self._wrote = self._looked = 0
        self._mark = intake.clock.now(), 0
        self.scope = asyncio.timeout(None)
        self.gives_way = False
        self.received = False  # and goes on in the background
        self._until: asyncio.Future[Any] | None = None

    def keep_until(self, done: asyncio.Future[Any]) -> None:
        """The upload is answered before it is linked: its place and its bytes count until ``done``."""
        self._until = done
        done.add_done_callback(lambda _: self._intake.leave(self))

    @property
    def goes_on(self) -> bool:
        return self._until is not None and not self._until.done()

    @property
    def size(self) -> int:
        return max(self._came - FORM_BYTES, self._wrote)

    async def counted(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """``body``; raises QuotaExceeded and StorageFull."""
        async for chunk in body:
            self._came += len(chunk)
            await self._look()
            yield chunk

    async def written(self, files: AsyncIterator[tuple[str, bytes]]) -> AsyncIterator[tuple[str, bytes]]:
        """``files``; raises QuotaExceeded and StorageFull."""
        async for name, chunk in files:
            self._wrote += len(chunk)
            await self._look()
            yield name, chunk

    async def _look(self) -> None:
        coming = self._intake.coming(self.tenant)
        stored = self._used + self._intake.stored[self.tenant] - self._stored_before
        if self._most is not None and stored + coming > self._most:
            raise QuotaExceeded(
                f"What you store takes {stored} bytes, the uploads that are coming {coming}, and you may have"
                f" {self._most}. Delete versions or files that you do not need, or ask for more."
            )
        if self._came + self._wrote - self._looked >= LOOK_EVERY:
            self._looked = self._came + self._wrote
            await self._intake.check_disk()

    def pace(self, now: float) -> float:
        """Bytes a second, of late; many for one that has only begun."""
        if self.received:
            return float("inf")
        since, before = self._mark
        if now - since < SLOW_AFTER_S:
            return float("inf")
        pace = (self._came + self._wrote - before) / (now - since)
        if now - since > 2 * SLOW_AFTER_S:
            self._mark = now, self._came + self._wrote
        return pace

    def end(self) -> None:
        """Ends it where it waits, with RequestTimeout."""
        self.gives_way = True
        self.scope.reschedule(asyncio.get_running_loop().time())


class Intake:
    """At most ``most`` uploads at once, ``each`` of one customer; ``reserve`` bytes stay free beside each of
    ``folders``, where adapters and the database are kept.

    All three numbers may be changed: what has begun goes on.
    """

    def __init__(
        self,
        folders: Collection[Path],
        used: Callable[[str], Awaitable[int]],
        *,
        most: int,
        each: int,
        reserve: int,
    ) -> None:
        self._folders = folders
        self._used = used
        self.most = most
        self.each = each
        self.reserve = reserve
        self._places: dict[str, list[Place]] = {}
        self.stored: Counter[str] = Counter()  # bytes linked, by tenant, while it has uploads
        # What came while this process stood still waits to be read: no upload is slow for that.
        self.clock = AwakeClock(TICK_S)
        self._ticking: asyncio.Task[None] | None = None

    def coming(self, tenant: str) -> int:
        """Bytes of all uploads of ``tenant`` that are coming."""
        return sum(place.size for place in self._places.get(tenant, ()))

    @asynccontextmanager
    async def enter(self, tenant: str, most_bytes: int | None = None) -> AsyncIterator[Place]:
        """A place for one upload; the block is left when the version is linked, or by an error.

        Raises TooManyRequests where the customer has too many under way, Unavailable where all have (an
        upload that hardly comes gives way first), StorageFull; RequestTimeout in one that gave way.
        """
        await self.check_disk()
        used = 0 if most_bytes is None else await self._used(tenant)
        own = self._places.get(tenant, [])
        if len(own) >= self.each:
            raise TooManyRequests(
                f"{self.each} uploads are under way, as many as one customer may have at once.",
                retry_after=RETRY_S,
            )
        if sum(map(len, self._places.values())) >= self.most and not self._make_room():
            raise Unavailable("Too many uploads are under way.", retry_after=RETRY_S)
        place = Place(self, tenant, most_bytes, used)
        self._places.setdefault(tenant, []).append(place)
        self._ticking = self._ticking or asyncio.create_task(self.clock.run())
        try:
            async with place.scope:
                yield place
            place.received = True
            if not place.goes_on:
                self.stored[tenant] += place.size
        except TimeoutError as exc:
            if not place.gives_way:
                raise
            raise RequestTimeout("The upload came too slowly while others waited; send it again.") from exc
        finally:
            if not place.goes_on:
                self.leave(place)

    def leave(self, place: Place) -> None:
        if place in (own := self._places.get(place.tenant, [])):
            own.remove(place)
            if not own:
                del self._places[place.tenant]
                del self.stored[place.tenant]
        if self._ticking is not None and not self._places:
            self._ticking.cancel()
            self._ticking = None

    def _make_room(self) -> bool:
        """Ends the slowest upload, if it is slow."""
        now = self.clock.now()
        coming = [place for own in self._places.values() for place in own]
        pace, slowest = min(((place.pace(now), place) for place in coming), key=lambda pair: pair[0])
        if pace >= SLOW_BYTES_S:
            return False
        self.leave(slowest)
        slowest.end()
        return True

    async def check_disk(self) -> None:
        """StorageFull where less than the reserve is free."""
        free = [(await asyncio.to_thread(shutil.disk_usage, folder)).free for folder in self._folders]
        if min(free) < self.reserve:
            raise StorageFull(
                "There is no room to store adapters or files. Remove some, or ask the operator to free space"
                " in LORAPLEX_DATA_DIR and where the database is."
            )
