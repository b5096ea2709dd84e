"""Orders that can be changed while they are used, all without scanning.

``Ranking``     members by a rank of their own
``RoundRobin``  members by tenant: tenants take turns, each sends its longest-waiting member
``FairShare``   members by tenant: the tenant with the lowest rank sends its longest-waiting member
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Any, Generic, TypeVar

Member = TypeVar("Member", bound=Hashable)

SLACK = 16  # stale entries a heap may carry beside twice its members


class Ranking(Generic[Member]):
    """A priority queue whose members can be ranked anew and dropped, in O(log n) amortised.

    Lowest rank first, equal ranks in the order in which they were set. An entry that was replaced or
    dropped stays in the heap until it surfaces, or until stale entries outnumber the others.
    """

    __slots__ = ("_entries", "_heap", "_serial")

    def __init__(self) -> None:
        self._entries: dict[Member, tuple[Any, int, Member]] = {}
        self._heap: list[tuple[Any, int, Member]] = []
        self._serial = count()

    def set(self, member: Member, rank: Any) -> None:
        """Add ``member``, or give it another rank."""
        old = self._entries.get(member)
        if old is not None and old[0] == rank:
            return
        entry = self._entries[member] = (rank, next(self._serial), member)
        heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + SLACK:
            self._heap = list(self._entries.values())
            heapify(self._heap)

    def drop(self, member: Member) -> None:
        """Forget ``member``; nothing happens if it is not here."""
        self._entries.pop(member, None)

    def first(self) -> Member | None:
        """The member with the lowest rank."""
        heap, entries = self._heap, self._entries
        while heap:
            entry = heap[0]
            if entries.get(entry[2]) is entry:
                return entry[2]
            heappop(heap)
        return None

    def leading(self, limit: int) -> list[Member]:
        """The first ``limit`` members, in order."""
        taken: list[tuple[Any, int, Member]] = []
        while len(taken) < limit and self.first() is not None:
            taken.append(heappop(self._heap))
        for entry in taken:
            heappush(self._heap, entry)
        return [member for _, _, member in taken]

    def rank(self, member: Member) -> Any:
        """The rank of ``member``, which must be here."""
        return self._entries[member][0]

    def __contains__(self, member: object) -> bool:
        return member in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Ranking({[member for _, _, member in sorted(self._entries.values())]})"


class RoundRobin(Generic[Member]):
    """Who gets the next of something scarce, so that a tenant with many members delays no other.

    A tenant's place is the later of two times: since when its first member waits, and its own last
    turn. Where every tenant has one member that is simply the longest-waiting one.
    """

    __slots__ = ("_last", "_lines", "_order", "_serial", "_tenants")

    def __init__(self) -> None:
        self._lines: dict[str, Ranking[Member]] = {}
        self._order: Ranking[str] = Ranking()
        self._tenants: dict[Member, str] = {}
        self._last: dict[str, tuple[float, int]] = {}
        self._serial = count(1)

    def add(self, member: Member, tenant: str, since: float) -> None:
        """Let ``member`` wait; if it does already, nothing changes."""
        if member in self._tenants:
            return
        self._tenants[member] = tenant
        self._lines.setdefault(tenant, Ranking()).set(member, since)
        self._rank(tenant)

    def drop(self, member: Member) -> None:
        """``member`` waits no more; nothing happens if it did not."""
        tenant = self._tenants.pop(member, None)
        if tenant is not None:
            self._lines[tenant].drop(member)
            self._rank(tenant)

    def take(self, member: Member, now: float) -> None:
        """``member`` gets what it waits for, which is its tenant's turn."""
        self._last[self._tenants[member]] = (now, next(self._serial))
        self.drop(member)

    def forget(self, tenant: str) -> None:
        """Drop the memory of ``tenant``'s last turn. Nothing of it may wait that was there before it."""
        assert tenant not in self._lines, f"something of {tenant} still waits"
        self._last.pop(tenant, None)

    def forget_turns(self) -> None:
        """Drop the memory of every turn: what was got by them is lost."""
        self._last.clear()
        for tenant in list(self._lines):
            self._rank(tenant)

    def firsts(self) -> Iterator[Member]:
        """Each tenant's next member, in no order."""
        for line in self._lines.values():
            first = line.first()
            if first is not None:
                yield first

    def first(self) -> Member | None:
        """The member whose turn it is; None if nothing waits."""
        return self._first_of(self._order.first())

    def _first_of(self, tenant: str | None) -> Member | None:
        return None if tenant is None else self._lines[tenant].first()

    def _rank(self, tenant: str) -> None:
        line = self._lines[tenant]
        first = line.first()
        if first is None:
            del self._lines[tenant]
            self._order.drop(tenant)
            return
        last, serial = self._last.get(tenant, (float("-inf"), 0))
        self._order.set(tenant, (max(line.rank(first), last), serial))

    def __contains__(self, member: object) -> bool:
        return member in self._tenants

    def __len__(self) -> int:
        return len(self._tenants)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._lines})"


class FairShare(RoundRobin[Member]):
    """Members by a rank of their tenant, which is ``rank`` of the tenant's longest-waiting member.

    Call ``rerank`` after a tenant's rank has changed by itself. ``next`` bounds how long a tenant waits whose
    rank never is the lowest.
    """

    __slots__ = ("_rank_of", "_shares")

    def __init__(self, rank: Callable[[Member], Any]) -> None:
        super().__init__()
        self._rank_of = rank
        self._shares: Ranking[str] = Ranking()

    def rerank(self, tenant: str) -> None:
        """Ask for the rank of ``tenant`` again."""
        if tenant in self._lines:
            self._rank(tenant)

    def next(self, too_long: float) -> Member | None:
        """The first by rank, or of a tenant that has waited for its turn since ``too_long``."""
        tenant = self._order.first()
        if tenant is None or self._order.rank(tenant)[0] > too_long:
            tenant = self._shares.first()
        return self._first_of(tenant)

    def leading(self, limit: int) -> list[Member]:
        """The longest-waiting members of the first ``limit`` tenants by rank, in order."""
        firsts = map(self._first_of, self._shares.leading(limit))
        return [member for member in firsts if member is not None]

    def rank(self, member: Member) -> Any:
        """The rank of its tenant."""
        return self._shares.rank(self._tenants[member])

    def _rank(self, tenant: str) -> None:
        super()._rank(tenant)
        first = self._first_of(tenant) if tenant in self._lines else None
        if first is None:
            self._shares.drop(tenant)
        else:
            self._shares.set(tenant, self._rank_of(first))
