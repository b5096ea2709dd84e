"""How many of a server's connections have a request of one key under way: never all of them.

Waiting and running requests have bounds of their own. But a key may also read its answers slowly, or have
many uploads come: then nobody else would find a connection.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from weakref import WeakKeyDictionary

# What is left to others is a quarter of all connections, however many requests one key has under way.
SHARE = 3 / 4
_CREDENTIALS = frozenset({b"authorization", b"x-api-key"})
_CUSTOMER = b"x-customer-id"

Who = frozenset[int]


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


class Asking:
    """Whose requests are under way on one connection, in the order of their answers.

    The connection counts once for each of them, however many of its requests are theirs.
    """

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._requests: deque[Who] = deque()

    def begin(self, who: Who, limit: int) -> bool:
        """Takes a request of ``who``; False, and nothing changes, where one of them has its share of
        ``limit`` connections and none of this one."""
        new = who - self._all()
        if self._shares.exceeds(new, limit):
            return False
        self._shares.begin(new)
        self._requests.append(who)
        return True

    def end(self) -> None:
        """The first request has its answer; nothing where none is under way."""
        if self._requests:
            who = self._requests.popleft()
            self._shares.end(who - self._all())

    def leave(self) -> None:
        """None of them is under way any more."""
        self._shares.end(self._all())
        self._requests.clear()

    def _all(self) -> Who:
        return frozenset().union(*self._requests)


def who_asks(headers: Iterable[Sequence[bytes]], vouches: Callable[[str], bool]) -> Who:
    """A number for each key in ``headers`` (lowercase name, value), whatever else stands beside it.

    A key that ``vouches``, a gateway's, is the key of all its customers: a number for each one named.
    """
    keys, customers = set[bytes](), set[bytes]()
    for name, value in headers:
        if name in _CREDENTIALS:
            keys.update(value.split()[-1:])
        elif name == _CUSTOMER:
            customers.add(value.strip())
    vouching = {key for key in keys if vouches(key.decode("latin-1"))}
    vouched = {hash((key, customer)) for key in vouching for customer in customers or {b""}}
    return frozenset({hash(key) for key in keys - vouching} | vouched)


_of_servers: WeakKeyDictionary[object, Shares] = WeakKeyDictionary()


def shares_of(server: object) -> Shares:
    """The one of ``server``, an object that all connections of a server have."""
    found = _of_servers.get(server)
    return found if found is not None else _of_servers.setdefault(server, Shares())
