"""Customers with adapters on many replicas beside customers with one: who gets how much when all want more.

Every replica is fair among those who ask there. A customer who asks everywhere would get a share of each.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tests.bench.fleet_simulation import LONGEST, Crowd, Engine, Fleet, Request
from tests.bench.stats import jain
from tests.bench.workload import gamma_arrivals, log_normal_lengths

ENGINE = Engine(gpu_slots=16, host_slots=64, max_running=32)
ADAPTERS = {f"wide-{n}": [f"wide-{n}/a{k}@x" for k in range(8)] for n in range(4)} | {
    f"narrow-{n}": [f"narrow-{n}/a@x"] for n in range(12)
}
RATE = 260.0  # requests a second; four replicas can do about 146


def requests(seconds: float, rng: random.Random) -> Iterator[Request]:
    """All customers want the same."""
    inputs, outputs = log_normal_lengths(64, 0.8, 1024, rng), log_normal_lengths(32, 0.6, LONGEST, rng)
    for number, at in enumerate(gamma_arrivals(RATE, 1.0, rng)):
        if at > seconds:
            return
        tenant = rng.choice(list(ADAPTERS))
        yield Request(str(number), at, tenant, rng.choice(ADAPTERS[tenant]), next(inputs), next(outputs))


def shares(shared_counters: bool) -> list[float]:
    """Tokens of each customer."""
    crowd = Crowd(replicas=4, seconds=40.0, warm=15.0, shared_counters=shared_counters)
    fleet = Fleet(crowd, ENGINE, "placement")
    fleet.remember([version for versions in ADAPTERS.values() for version in versions])
    outcome = fleet.run(requests(crowd.seconds, random.Random(1)))
    return [float(outcome.served[tenant]) for tenant in ADAPTERS]


def test_tokens_served_elsewhere_count() -> None:
    alone, together = shares(False), shares(True)
    assert jain(together) >= 0.97
    assert jain(together) > jain(alone) + 0.03
    assert min(together) > 1.3 * min(alone)
    assert sum(together) > 0.95 * sum(alone), "nothing is lost by it"
