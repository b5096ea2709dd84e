"""Who is next: every tenant's waiting requests, and what each tenant has used so far.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024).
A tenant's counter grows by (input tokens + 2 * output tokens) / weight; of the tenants with a request
that can run now, the one with the lowest counter is next. A tenant that comes back after having had
nothing queued or running starts at the lowest counter of those that have: being away earns no credit.

In a fleet, what other replicas serve a tenant counts too, for as long as it has requests here: a request says
how much that is so far (``Ask.elsewhere``), and what came on top since the last one is charged. Such a charge
takes a tenant no further than ``ELSEWHERE_MOST`` past the lowest counter, or one that was served well
elsewhere for an hour would wait for as long here.

A tenant's requests wait in lanes, one per version, in order of arrival. A lane is open while its
version takes requests (the base model's always is), so a request for an adapter that still has to be
loaded is overtaken and never stands in another's way.

A tenant with nothing queued or running is forgotten once its counter is no higher than where it would start
again; until then its debt is remembered (of the ``REMEMBERED`` tenants with the largest ones).

    TenantQueue  a tenant's counter and its open lanes    Request  one ask on its way, from queue to end
    FairQueue    all of them; the owner of this state
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

from server.scheduling.nouns import Ask
from server.scheduling.ranking import Ranking

INPUT_COST, OUTPUT_COST = 1.0, 2.0
LOOK_PAST = 16  # tenants looked at for a request small enough to pass one that does not fit
RECENT_RUNS = 32  # runs of a tenant from which its pace is estimated
RETRY_SOONEST, RETRY_LATEST = 1.0, 60.0  # seconds
ELSEWHERE_MOST = 20_000.0  # of the counter, see above
REMEMBERED = 4096  # tenants with a debt and without a request


@dataclass(slots=True, eq=False)
class TenantQueue:
    """One tenant's requests and its counter. ``queued`` counts requests, ``running`` sequences.

    ``given`` is that part of the counter which was not served here, and ``elsewhere`` what was served
    elsewhere so far, as the last request said.
    """

    id: str
    counter: float = 0.0
    given: float = 0.0
    elsewhere: float = 0.0
    queued: int = 0
    running: int = 0
    queued_since: float = 0.0
    lanes: Ranking[Lane] = field(default_factory=Ranking)
    runs: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_RUNS))

    @property
    def active(self) -> bool:
        """Whether anything is queued or running."""
        return bool(self.queued or self.running)

    @property
    def served(self) -> float:
        """Tokens, weighted, that the tenant was charged for since this queue remembers it."""
        return self.counter - self.given

    def lift(self, counter: float) -> None:
        """Raise its counter to ``counter``, if it is lower, for what was not served here."""
        if counter > self.counter:
            self.given += counter - self.counter
            self.counter = counter

    @property
    def head(self) -> Request | None:
        """Its next request by arrival, of those whose version takes requests."""
        lane = self.lanes.first()
        return None if lane is None else lane.head

    def may_run(self, request: Request) -> bool:
        """Within the tenant's own limit; a request larger than that runs when nothing else of it does."""
        limit = request.ask.max_running
        return limit is None or not self.running or self.running + request.ask.sequences <= limit


@dataclass(slots=True, eq=False)
class Request:
    """One ask on its way. ``passed_at`` is when a smaller request first ran in its place.

    ``not_preemptible`` once it is known that the engine cannot stop and resume it.
    """

    ask: Ask
    tenant: TenantQueue
    number: int
    arrived: float
    charged: float = 0.0
    output_tokens: int = 0
    passed_at: float | None = None
    not_preemptible: bool = False

    @property
    def tokens_left(self) -> int:
        """The most tokens that the request can still produce."""
        return max(0, self.ask.max_tokens * self.ask.sequences - self.output_tokens)


@dataclass(slots=True, eq=False)
class Lane:
    """One tenant's waiting requests for one version, by arrival."""

    version: str | None
    tenant: TenantQueue
    requests: OrderedDict[int, Request] = field(default_factory=OrderedDict)

    @property
    def head(self) -> Request:
        """The request that has waited longest."""
        return next(iter(self.requests.values()))


class FairQueue:
    """Every tenant's requests, and whose turn it is. ``counted`` is told of a tenant whose counter has
    changed.
    """

    def __init__(self, counted: Callable[[str], None] = lambda _: None) -> None:
        self._counted = counted
        self._tenants: dict[str, TenantQueue] = {}
        self._lanes: dict[str | None, dict[TenantQueue, Lane]] = {}
        self._open: set[str | None] = {None}
        self._ready: Ranking[TenantQueue] = Ranking()  # with a request that its own limits let run
        self._active: Ranking[TenantQueue] = Ranking()  # with anything queued or running
        self._away: Ranking[TenantQueue] = Ranking()  # with nothing queued or running, by what they have had
        self._level = 0.0  # the counter of the last tenant to leave
        self._numbers = count(1)

    def push(self, ask: Ask, now: float) -> Request:
        """Line up a new request of a tenant at ``now``."""
        tenant = self._tenants.get(ask.tenant)
        if tenant is None:
            tenant = self._tenants[ask.tenant] = TenantQueue(ask.tenant)
        if not tenant.active:
            self._away.drop(tenant)
            tenant.lift(self._floor())
            tenant.elsewhere = ask.elsewhere  # being served elsewhere before makes no debt
            self._counted(tenant.id)
        elif ask.elsewhere > tenant.elsewhere:
            self._charge_elsewhere(tenant, ask.elsewhere)
        elif ask.elsewhere < tenant.elsewhere / 2:  # a replica has gone; a bit less is an older report
            tenant.elsewhere = ask.elsewhere
        if not tenant.queued:
            tenant.queued_since = now
            tenant.runs.clear()
        request = Request(ask, tenant, next(self._numbers), now, not_preemptible=not ask.resumable)
        self._rank_lane(self._line_up(request))
        return request

    def put_back(self, request: Request) -> None:
        """The request ran and waits again, at the place that its arrival gives it."""
        lane = self._line_up(request)
        lane.requests = OrderedDict(sorted(lane.requests.items()))
        request.tenant.running -= request.ask.sequences
        self._rank_lane(lane)

    def remove(self, request: Request) -> None:
        """It leaves the queue and will not run."""
        self._take_out(request)
        self._rank(request.tenant)

    def start(self, request: Request, now: float) -> None:
        """It leaves the queue to run. What it is expected to read is charged."""
        request.tenant.running += request.ask.sequences  # first, or for a moment the tenant had nothing
        self._take_out(request)
        request.tenant.runs.append(now)
        self.charge(request, request.ask.prompt_tokens, 0)

    def charge(self, request: Request, prompt_tokens: int, output_tokens: int) -> None:
        """Charge for what it has used in all. What an estimate was too high by pays for later tokens."""
        cost = INPUT_COST * prompt_tokens + OUTPUT_COST * output_tokens
        if cost > request.charged:
            request.tenant.counter += (cost - request.charged) / request.ask.weight
            request.charged = cost
            self._counted(request.tenant.id)
        self._rank(request.tenant)

    def _charge_elsewhere(self, tenant: TenantQueue, total: float) -> None:
        more, tenant.elsewhere = total - tenant.elsewhere, total
        tenant.lift(min(tenant.counter + more, self._floor() + ELSEWHERE_MOST))
        self._counted(tenant.id)

    def served(self) -> dict[str, float]:
        """What each tenant with requests here has been charged for, in the units of the counter.

        For other replicas (``Ask.elsewhere``). It starts again at 0 when the tenant was forgotten.
        """
        return {tenant.id: tenant.served for tenant in self._tenants.values() if tenant.active}

    def end(self, request: Request) -> None:
        """It was running and is no more."""
        request.tenant.running -= request.ask.sequences
        self._rank(request.tenant)

    def gate(self, version: str, is_open: bool) -> None:
        """Whether requests for ``version`` can run."""
        if is_open == (version in self._open):
            return
        (self._open.add if is_open else self._open.discard)(version)
        for lane in self._lanes.get(version, {}).values():
            self._rank_lane(lane)

    def first(self, accept: Callable[[Request], bool] | None = None) -> Request | None:
        """The request whose turn it is; with ``accept`` the first acceptable one of those leading."""
        if accept is None:
            tenant = self._ready.first()
            return None if tenant is None else tenant.head
        heads = (tenant.head for tenant in self._ready.leading(LOOK_PAST))
        return next((head for head in heads if head is not None and accept(head)), None)

    def waits(self, version: str | None) -> bool:
        """Whether a request waits for ``version``."""
        return version in self._lanes

    def waiting(self, version: str | None) -> list[Request]:
        """What waits for ``version``, by arrival."""
        lanes = self._lanes.get(version, {}).values()
        return sorted((r for lane in lanes for r in lane.requests.values()), key=lambda r: r.number)

    def counter(self, tenant_id: str) -> float:
        """What a tenant has had; of one that was forgotten, where it would start again."""
        tenant = self._tenants.get(tenant_id)
        return self._floor() if tenant is None else tenant.counter

    def queued(self, tenant_id: str) -> int:
        """How many requests of a tenant wait."""
        tenant = self._tenants.get(tenant_id)
        return 0 if tenant is None else tenant.queued

    def retry_after(self, tenant_id: str, now: float) -> float:
        """Seconds until what the tenant has queued will have run at its recent pace, 1 to 60.

        While nothing has run yet the guess is that it takes as long again as it took so far.
        """
        tenant = self._tenants.get(tenant_id)
        if tenant is None:
            return RETRY_SOONEST
        start = tenant.runs[0] if len(tenant.runs) == RECENT_RUNS else tenant.queued_since
        backlog = tenant.queued / len(tenant.runs) if tenant.runs else 1.0
        return min(max((now - start) * backlog, RETRY_SOONEST), RETRY_LATEST)

    def tenants(self) -> Iterator[TenantQueue]:
        """Every tenant that is remembered."""
        return iter(self._tenants.values())

    def open_versions(self) -> frozenset[str | None]:
        """The versions whose requests can run; None is the base model's."""
        return frozenset(self._open)

    def _line_up(self, request: Request) -> Lane:
        """Put the request at the end of its lane; returns the lane, which needs a new rank."""
        tenant, version = request.tenant, request.ask.version
        lane = self._lanes.setdefault(version, {}).setdefault(tenant, Lane(version, tenant))
        lane.requests[request.number] = request
        tenant.queued += 1
        return lane

    def _take_out(self, request: Request) -> None:
        tenant, version = request.tenant, request.ask.version
        lanes = self._lanes[version]
        lane = lanes[tenant]
        del lane.requests[request.number]
        tenant.queued -= 1
        if not lane.requests:
            del lanes[tenant]
        if not lanes:
            del self._lanes[version]
        self._rank_lane(lane)

    def _rank_lane(self, lane: Lane) -> None:
        if lane.requests and lane.version in self._open:
            lane.tenant.lanes.set(lane, lane.head.number)
        else:
            lane.tenant.lanes.drop(lane)
        self._rank(lane.tenant)

    def _rank(self, tenant: TenantQueue) -> None:
        head = tenant.head
        if head is not None and tenant.may_run(head):
            self._ready.set(tenant, (tenant.counter, head.number))
        else:
            self._ready.drop(tenant)
        if tenant.active:
            self._active.set(tenant, tenant.counter)
        elif tenant in self._active:
            self._active.drop(tenant)
            self._level = tenant.counter
            self._away.set(tenant, tenant.counter)
            self._forget_who_owes_nothing()

    def _floor(self) -> float:
        """The counter at which a tenant starts that is not remembered. It never goes down."""
        lowest = self._active.first()
        return self._level if lowest is None else lowest.counter

    def _forget_who_owes_nothing(self) -> None:
        floor = self._floor()
        while (tenant := self._away.first()) is not None and (
            tenant.counter <= floor or len(self._away) > REMEMBERED
        ):
            self._away.drop(tenant)
            del self._tenants[tenant.id]

    def check(self) -> None:
        """Assert that every index says what the lanes say."""
        for _ in self.check_steps():
            pass

    def check_steps(self) -> Iterator[None]:
        """The same, with a small piece of work between two steps."""
        queued: dict[TenantQueue, int] = {}
        for version, lanes in self._lanes.items():
            assert lanes, f"no lanes for {version}"
            for tenant, lane in lanes.items():
                assert self._tenants[tenant.id] is tenant
                assert lane.requests, f"empty lane of {tenant.id}"
                assert (lane in tenant.lanes) == (version in self._open)
                queued[tenant] = queued.get(tenant, 0) + len(lane.requests)
                yield
                before = 0
                for number in lane.requests:
                    assert number > before, f"{tenant.id} is out of order"
                    before = number
                    yield
        active = 0
        for tenant in self._tenants.values():
            waiting = queued.get(tenant, 0)
            assert tenant.queued == waiting, f"{tenant.id}: {tenant.queued} queued, {waiting} in lanes"
            assert tenant.running >= 0
            assert (tenant in self._active) == tenant.active
            assert (tenant in self._away) != tenant.active
            head = tenant.head
            ready = head is not None and tenant.may_run(head)
            assert (tenant in self._ready) == ready
            if head is not None and ready:
                assert self._ready.rank(tenant) == (tenant.counter, head.number)
            if tenant.active:
                assert self._active.rank(tenant) == tenant.counter
            active += tenant.active
            yield
        assert len(self._active) == active
        assert len(self._away) == len(self._tenants) - active <= REMEMBERED
