"""How many of a server's connections have a request of one key under way: never all of them.

Waiting and running requests have bounds of their own. But a key may also read its answers slowly, or have
many uploads come: then nobody else would find a connection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

# What is left to others is a quarter of all connections, however many requests one key has under way.
SHARE = 3 / 4
_CREDENTIALS = frozenset({b"authorization", b"x-api-key"})

Who = tuple[int, ...]


class Shares:
    """The connections on which a request is under way, by the key that it came with."""

    def __init__(self) -> None:
        self._of: Counter[int] = Counter()

    def __repr__(self) -> str:
        return f"<Shares {sorted(self._of.values(), reverse=True)}>"

    def begin(self, who: Who) -> None:
        self._of.update(who)

    def end(self, who: Who) -> None:
        for one in who:
            self._of[one] -= 1
            if not self._of[one]:
                del self._of[one]

    def exceeds(self, who: Who, limit: int) -> bool:
        """Whether one more request of ``who`` would be beyond what one key may have of ``limit``."""
        return any(self._of[one] >= max(1, int(limit * SHARE)) for one in who)


def who_asks(headers: Iterable[Sequence[bytes]]) -> Who:
    """A number for each key in ``headers`` (lowercase name, value), whatever else stands beside it."""
    found = {hash(words[-1]) for name, value in headers if name in _CREDENTIALS and (words := value.split())}
    return tuple(found)


_of_servers: WeakKeyDictionary[object, Shares] = WeakKeyDictionary()


def shares_of(server: object) -> Shares:
    """The one of ``server``, an object that all connections of a server have."""
    found = _of_servers.get(server)
    return found if found is not None else _of_servers.setdefault(server, Shares())
