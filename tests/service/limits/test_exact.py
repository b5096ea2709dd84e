"""Tokens are limited as the engine counts them, however many a prompt turns out to have."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from server.errors import TooManyRequests
from server.limits.rate import RateMeter
from tests.service.limits.test_limits import ledger_of, limited, most_in_a_minute
from tests.support import tiny
from tests.support.clock import run
from tests.support.fakes import Times
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site
from tests.support.world import World, read

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

DENSE = "a " * 300
ROUTES = {
    "/v1/completions": {"prompt": DENSE, "max_tokens": 5},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": DENSE}], "max_tokens": 5},
    "/v1/responses": {"input": DENSE, "max_output_tokens": 5},
    "/v1/messages": {"messages": [{"role": "user", "content": DENSE}], "max_tokens": 5},
}
LIMITED = {"limits": {"tokens_per_minute": 250}}
BUDGET = {"budgets": {"day": {"tokens": 250}}}


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path) as site:
        yield site


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """For customers who do not meet."""
    async with fake_site(tmp_path_factory.mktemp("shared")) as site:
        yield site


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("url", ROUTES)
@pytest.mark.parametrize(
    ("terms", "code"), [(LIMITED, "rate_limit_exceeded"), (BUDGET, "insufficient_quota")]
)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_prompt_that_does_not_fit_is_refused_before_it_runs(
    shared: Site, url: str, stream: bool, terms: dict[str, Any], code: str
) -> None:
    site = shared
    key = await site.tenant(f"{code}{url}-{stream}".replace("/", "-").replace("_", "-").lower(), **terms)
    body = {"model": tiny.NAME, "stream": stream, **ROUTES[url]}
    answer = await site.http.post(url, headers=bearer(key), json=body)
    assert answer.status_code == 429, answer.text
    assert answer.headers["content-type"].startswith("application/json")
    assert int(answer.headers["retry-after"]) >= 1
    error = answer.json()["error"]
    assert "306" in error["message"]
    if url != "/v1/messages":
        assert error["code"] == code
    assert site.services.dispatcher._leases == {}
    short = body | ({"prompt": "hi"} if "prompt" in body else {})
    if "messages" in body:
        short["messages"] = [{"role": "user", "content": "hi"}]
    if "input" in body:
        short["input"] = "hi"
    fits = await site.http.post(url, headers=bearer(key), json=short | {"stream": False})
    assert fits.status_code == 200, fits.text
    if "limits" in terms:
        assert fits.headers["x-ratelimit-remaining-tokens"] == str(250 - 7)


def test_an_answer_of_no_given_length_is_cut_to_what_the_prompt_leaves() -> None:
    async def scenario() -> None:
        async with World(max_running=2) as world:
            who = limited(world, tokens_per_minute=160)
            dense = [{"role": "user", "content": "a " * 155}]
            opened = await world.open(who, messages=dense, max_tokens=None)
            await read(opened)
            assert opened.lease.prompt_tokens == 156
            assert opened.lease.output_tokens == 4
            assert opened.lease.outcome == "completed"

    run(scenario())


def test_what_was_estimated_too_much_is_given_back_at_once() -> None:
    async def scenario() -> None:
        async with World(max_running=2, times=Times(step=1.0)) as world:
            who = limited(world, tokens_per_minute=500)
            opened = await world.open(
                who, messages=[{"role": "user", "content": "a" * 300}], max_tokens=5, stream=True
            )
            left = int(world.service.quotas.headers(who)["x-ratelimit-remaining-tokens"])
            assert left == 500 - 2 - 5
            await read(opened)

    run(scenario())


def test_each_of_several_sequences_is_counted_with_one_prompt() -> None:
    async def scenario() -> None:
        async with World(max_running=4) as world:
            who = limited(world, tokens_per_minute=171)
            dense = [{"role": "user", "content": "a " * 150}]
            with pytest.raises(TooManyRequests, match="may use 173"):
                await world.open(who, messages=dense, max_tokens=11, n=2)
            opened = await world.open(who, messages=dense, max_tokens=10, n=2)
            await read(opened)
            assert opened.lease.prompt_tokens + opened.lease.output_tokens == 171

    run(scenario())


def test_of_two_at_once_that_do_not_fit_together_one_runs() -> None:
    async def scenario() -> None:
        async with World(max_running=4, times=Times(step=0.1)) as world:
            who = limited(world, tokens_per_minute=250)

            async def ask() -> str:
                return await world.ask(who, messages=[{"role": "user", "content": "a " * 150}], max_tokens=5)

            results = await asyncio.gather(ask(), ask(), return_exceptions=True)
            assert sorted(isinstance(result, TooManyRequests) for result in results) == [False, True]

    run(scenario())


@pytest.mark.parametrize("seed", range(4))
def test_no_minute_has_more_than_the_limit_however_dense_the_prompts(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    most, refused = 400, 0
    events: list[tuple[float, int]] = []
    count = RateMeter.use

    def used(self: RateMeter, tokens: int, of_reserved: int, now: float) -> None:
        events.append((now, tokens))
        count(self, tokens, of_reserved, now)

    monkeypatch.setattr(RateMeter, "use", used)

    async def scenario() -> None:
        nonlocal refused
        rng = random.Random(seed)
        async with World(max_running=8, times=Times(step=0.05)) as world:
            who = limited(world, tokens_per_minute=most)

            async def client() -> None:
                nonlocal refused
                for _ in range(40):
                    await asyncio.sleep(rng.random() * 8)
                    word = rng.choice(["a ", "abc ", "abcdefghijk "])
                    fields: dict[str, Any] = {
                        "max_tokens": rng.randrange(1, 30) if rng.random() < 0.7 else None
                    }
                    try:
                        opened = await world.open(
                            who,
                            messages=[{"role": "user", "content": word * rng.randrange(1, 200)}],
                            stream=rng.random() < 0.5,
                            n=rng.choice([1, 1, 2]),
                            **fields,
                        )
                        await read(opened)
                    except TooManyRequests:
                        refused += 1

            await asyncio.gather(*(client() for _ in range(4)))
            meters = ledger_of(world).meters
            assert all(meter.reserved == 0 and meter.running == 0 for meter in meters.values())

    run(scenario())
    assert refused > 5
    assert len(events) > 20
    assert most_in_a_minute(events) <= most
