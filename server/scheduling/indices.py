"""The orders in which residency looks for its next version and its next victim.

All of them follow from loads, claims and pins; they exist so that no decision has to scan those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from server.scheduling.loads import Claim, Load
from server.scheduling.nouns import State
from server.scheduling.ranking import FairShare, Ranking, RoundRobin


class Indices:
    """Versions by what they wait for and by what may be taken from them.

    ``for_host``      claims on disk, by turns of their tenants
    ``for_slot``      claims on the host, by what their tenants have had: ``share`` gives a version's rank
    ``patient``       claims without a slot that are not overdue, longest-waiting first
    ``overdue``       claims on the host that are, longest-waiting first
    ``young``         claims on the host that are not, latest first; pinned ones last
    ``idle_on_host``  without claim, least recently used first; pinned ones last
    ``idle_in_slot``  the same, of those in a slot with nothing running
    ``staging``, ``draining``   sets
    """

    def __init__(self, share: Callable[[str], Any]) -> None:
        self.for_host: RoundRobin[str] = RoundRobin()
        self.for_slot: FairShare[str] = FairShare(share)
        self.patient: Ranking[str] = Ranking()
        self.overdue: Ranking[str] = Ranking()
        self.young: Ranking[str] = Ranking()
        self.idle_on_host: Ranking[str] = Ranking()
        self.idle_in_slot: Ranking[str] = Ranking()
        self.staging: set[str] = set()
        self.draining: set[str] = set()

    def update(self, version: str, load: Load | None, claim: Claim | None, pinned: bool) -> None:
        """Bring every index up to date with one version's load, claim and pin."""
        state = State.DISK if load is None else load.state
        overdue = claim is not None and claim.overdue
        for index, where in ((self.for_host, State.DISK), (self.for_slot, State.HOST)):
            if claim is not None and state is where:
                index.add(version, claim.tenant, claim.since)
            else:
                index.drop(version)
        since = 0.0 if claim is None else claim.since
        waits = claim is not None and state not in (State.ACTIVATING, State.ACTIVE)
        _rank(self.patient, version, waits and not overdue, since)
        on_host = claim is not None and state is State.HOST
        _rank(self.overdue, version, on_host and overdue, since)
        _rank(self.young, version, on_host and not overdue, (pinned, -since))
        idle = load is not None and claim is None and not load.running
        rank = (pinned, 0.0 if load is None else load.used)
        _rank(self.idle_on_host, version, idle and state is State.HOST, rank)
        _rank(self.idle_in_slot, version, idle and state is State.ACTIVE, rank)
        _keep(self.staging, version, state is State.STAGING)
        _keep(self.draining, version, load is not None and load.draining)

    def is_idle(self, version: str) -> bool:
        """Whether ``version`` is in memory, and nothing runs on it or waits for it."""
        return version in self.idle_on_host or version in self.idle_in_slot

    def forget(self, tenant: str) -> None:
        """No version of ``tenant``'s waits any more: its last turns count no longer."""
        self.for_host.forget(tenant)
        self.for_slot.forget(tenant)

    def check(self, version: str, load: Load | None, claim: Claim | None) -> None:
        """Assert that one version stands in the indices where its load and claim put it."""
        state = State.DISK if load is None else load.state
        idle = load is not None and claim is None and not load.running
        waits = claim is not None and state in (State.DISK, State.STAGING, State.HOST)
        overdue = claim is not None and claim.overdue
        assert (version in self.for_host) == (waits and state is State.DISK)
        assert (version in self.for_slot) == (waits and state is State.HOST)
        assert (version in self.patient) == (waits and not overdue)
        assert (version in self.overdue) == (overdue and state is State.HOST)
        assert (version in self.young) == (waits and not overdue and state is State.HOST)
        assert (version in self.idle_on_host) == (idle and state is State.HOST)
        assert (version in self.idle_in_slot) == (idle and state is State.ACTIVE)
        assert (version in self.staging) == (state is State.STAGING)
        assert (version in self.draining) == (load is not None and load.draining)

    def check_shares(self, share: Callable[[str], Any]) -> Iterator[None]:
        """Assert that every tenant that waits for a slot has the rank it should; one step each."""
        for version in self.for_slot.firsts():
            assert self.for_slot.rank(version) == share(version)
            yield


def _rank(ranking: Ranking[str], version: str, member: bool, rank: Any) -> None:
    if member:
        ranking.set(version, rank)
    else:
        ranking.drop(version)


def _keep(members: set[str], member: str, wanted: bool) -> None:
    (members.add if wanted else members.discard)(member)
