"""How many of a server's connections have a request of one key, or one tenant, under way: never all of them.

Waiting and running requests have bounds of their own. But a key may also read its answers slowly, or have
many uploads come: then nobody else would find a connection. Headers say the key; whose it is, is known once
it has been looked up, and all keys of one tenant have one share from then on.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

# What is left to others is a quarter of all connections, however many requests one tenant has under way.
SHARE = 3 / 4
_NAME = "loraplex.asking"
_CREDENTIALS = frozenset({b"authorization", b"x-api-key"})
_CUSTOMER = b"x-customer-id"

Who = frozenset[int]


class Shares:
    """The connections on which a request is under way, by the key that it came with and by its tenant."""

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
        """Whether one more request of ``who`` would be beyond what one of them may have of ``limit``."""
        return any(self._of[one] >= max(1, int(limit * SHARE)) for one in who)


class Asking:
    """Whose requests are under way on one connection, in the order of their answers.

    The connection counts once for each of them, however many of its requests are theirs.
    """

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._requests: deque[Who] = deque()
        self._limit = 0

    def begin(self, who: Who, limit: int) -> bool:
        """Takes a request of ``who``; False, and nothing changes, where one of them has its share of
        ``limit`` connections and none of this one."""
        self._limit = limit
        if not self._takes(who):
            return False
        self._requests.append(who)
        return True

    def join(self, tenant: str) -> bool:
        """The first request, whose turn it is, turns out to be of ``tenant``; False as ``begin``.

        One that does not count for its key counts for nobody.
        """
        if not self._requests or not self._requests[0]:
            return True
        who = frozenset({hash(("tenant", tenant))})
        if not self._takes(who):
            return False
        self._requests[0] |= who
        return True

    def _takes(self, who: Who) -> bool:
        new = who - self._all()
        if self._shares.exceeds(new, self._limit):
            return False
        self._shares.begin(new)
        return True

    def offer(self, scope: dict[str, Any]) -> None:
        """Lets whoever finds out whose request that of ``scope`` is say so: ``joined``."""
        scope.setdefault("extensions", {})[_NAME] = ref(self)

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


def joined(scope: Mapping[str, Any], tenant: str) -> bool:
    """Whether the request of ``scope`` has a place in the share of ``tenant``, whose it is; True where
    another server took it, or its connection is gone."""
    offered = scope.get("extensions", {}).get(_NAME)
    asking: Asking | None = offered() if offered is not None else None
    return asking is None or asking.join(tenant)


_of_servers: WeakKeyDictionary[object, Shares] = WeakKeyDictionary()


def shares_of(server: object) -> Shares:
    """The one of ``server``, an object that all connections of a server have."""
    found = _of_servers.get(server)
    return found if found is not None else _of_servers.setdefault(server, Shares())
