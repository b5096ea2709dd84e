"""How much of requests' bodies is in memory: bounded for each customer, and in all.

A body is small beside what it may be, and one connection holds one. But a key may have as many connections as
it likes, on which bodies of megabytes come slowly or wait for their turn.
"""

from __future__ import annotations

from collections import Counter

from server.errors import TooManyRequests, Unavailable

RETRY_AFTER = 1.0  # seconds


class HeldBodies:
    """``each`` bytes of one customer's bodies, ``most`` of all, from their first byte to their answer's last.

    What a customer may hold is far more than his places in the queue take with ordinary prompts.
    """

    def __init__(self, each: int, most: int) -> None:
        self._each, self._most = each, most
        self._held: Counter[str] = Counter()
        self.bytes = 0  # of all customers

    def add(self, owner: str, count: int) -> None:
        """TooManyRequests (``too_much_at_once``) or Unavailable where there is no room."""
        if self._held[owner] + count > self._each:
            raise TooManyRequests(
                f"Your requests under way hold more than {self._each} bytes. Send this one again when some"
                " of them are answered.",
                code="too_much_at_once",
                retry_after=RETRY_AFTER,
            )
        if self.bytes + count > self._most:
            raise Unavailable("Too many large requests are under way.", retry_after=RETRY_AFTER)
        self._held[owner] += count
        self.bytes += count

    def remove(self, owner: str, count: int) -> None:
        self._held[owner] -= count
        self.bytes -= count
        if not self._held[owner]:
            del self._held[owner]
