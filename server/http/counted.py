"""What the page of metrics has from the database, kept for when that does not answer."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from adapters.awake import AwakeTimeout

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Counted:
    """Versions in all, and of those the ones that are not served as they should be; rollouts by state."""

    versions: int
    quarantined: int
    unfit: int
    damaged: int
    differing: int
    rollouts: Mapping[str, int]


class LastCounted:
    """The counts when last they could be made: a page without them would lose all that is known in memory."""

    def __init__(self) -> None:
        self._last: Counted | None = None

    async def count(self, look: Callable[[], Awaitable[Counted]], seconds: float) -> Counted:
        """What ``look`` says; the counts before it, if there are any, where it fails or takes longer."""
        if self._last is None:
            self._last = await look()
            return self._last
        try:
            async with AwakeTimeout(seconds):
                self._last = await look()
        except Exception as exc:  # any reason is a reason
            logger.warning("/metrics shows the last counts: the database failed with %s", type(exc).__name__)
        return self._last
