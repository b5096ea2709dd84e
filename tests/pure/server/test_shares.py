"""Whose requests count on a server's connections, and that what was counted is given back."""

from __future__ import annotations

import random

import pytest

from server.http.shares import Asking, Shares, Who, who_asks

GATEWAY = "a gateway's key"
Headers = list[tuple[bytes, bytes]]


def who(headers: Headers) -> Who:
    return who_asks(headers, lambda key: key == GATEWAY.split()[-1])


def bearer(key: str) -> tuple[bytes, bytes]:
    return (b"authorization", f"Bearer {key}".encode())


ACME, GLOBEX = (b"x-customer-id", b"acme"), (b"x-customer-id", b"globex")


@pytest.mark.parametrize(
    ("one", "other", "are_same"),
    [
        ([bearer("lp-1")], [(b"x-api-key", b" lp-1 ")], True),
        ([bearer("lp-1")], [bearer("lp-1"), ACME], True),
        ([bearer("lp-1"), ACME], [bearer("lp-1"), GLOBEX], True),
        ([bearer("lp-1")], [bearer("lp-2")], False),
        ([bearer(GATEWAY), ACME], [ACME, (b"x-api-key", GATEWAY.encode())], True),
        ([bearer(GATEWAY), ACME], [bearer(GATEWAY), (b"x-customer-id", b"  acme ")], True),
        ([bearer(GATEWAY), ACME], [bearer(GATEWAY), GLOBEX], False),
        ([bearer(GATEWAY), ACME], [bearer(GATEWAY)], False),
        ([bearer(GATEWAY)], [bearer(GATEWAY), (b"x-customer-id", b"")], True),
    ],
)
def test_a_tenants_key_is_one_and_a_gateways_one_for_each_customer(
    one: Headers, other: Headers, are_same: bool
) -> None:
    assert len(who(one)) == len(who(other)) == 1
    assert (who(one) == who(other)) is are_same


def test_all_that_are_named_count() -> None:
    assert who([ACME, (b"authorization", b" "), (b"host", b"x")]) == frozenset()
    assert who([bearer("lp-1"), (b"x-api-key", b"lp-2")]) == who([bearer("lp-1")]) | who([bearer("lp-2")])
    both = who([bearer(GATEWAY), ACME, GLOBEX])
    assert both == who([bearer(GATEWAY), ACME]) | who([bearer(GATEWAY), GLOBEX])


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_the_connections_with_a_request_under_way(seed: int) -> None:
    """Of keys, and of tenants once they are known: key 0 and 1 are one tenant's, 2 and 3 another's."""
    rng = random.Random(seed)
    shares, limit = Shares(), 8
    lines = [(Asking(shares), list[Who]()) for _ in range(12)]
    keys, tenants = range(4), {name: hash(("tenant", name)) for name in ("even", "odd")}
    everybody = (*keys, *tenants.values())
    for _ in range(500):
        asking, under_way = rng.choice(lines)
        counted = {one: sum(any(one in each for each in told) for _, told in lines) for one in everybody}
        here = frozenset[int]().union(*under_way)
        match rng.choice(("begin", "begin", "join", "join", "end", "end", "leave")):
            case "begin":
                asked = frozenset(rng.sample(keys, rng.randrange(3)))
                fits = all(counted[one] < 6 for one in asked - here)
                assert asking.begin(asked, limit) is fits
                under_way.extend([asked] * fits)
            case "join":
                name = "even" if under_way and under_way[0] & {0, 1} else "odd"
                counts = bool(under_way and under_way[0])
                fits = not counts or tenants[name] in here or counted[tenants[name]] < 6
                assert asking.join(name) is fits
                if fits and counts:
                    under_way[0] |= {tenants[name]}
            case "end":
                asking.end()
                del under_way[:1]
            case _:
                asking.leave()
                under_way.clear()
        now = [sum(any(one in each for each in told) for _, told in lines) for one in everybody]
        assert str(shares) == f"<Shares {sorted((count for count in now if count), reverse=True)}>"
        assert max(now) <= 6


def test_all_keys_of_a_tenant_have_one_share() -> None:
    shares, limit = Shares(), 8
    lines = [Asking(shares) for _ in range(8)]
    for number, asking in enumerate(lines[:7]):
        assert asking.begin(frozenset({number}), limit), "another key each"
        assert asking.join("acme") is (number < 6)
    assert lines[7].begin(frozenset({7}), limit)
    assert lines[7].join("globex")
    lines[0].leave()
    assert lines[6].join("acme")
    assert Asking(shares).join("acme"), "nothing is under way on it"
