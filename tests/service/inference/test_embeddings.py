"""``/v1/embeddings`` over HTTP, by OpenAI's own client, on a fake engine."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import openai
import pytest
import pytest_asyncio

from adapters.inspection.logprobs import Shift, finite_vectors, shift
from server.app import drain
from tests.service.http.test_api import engine_of, error
from tests.support import tiny
from tests.support.embedding_suite import EmbeddingSuite, ask, used
from tests.support.fakes import FakeEngine, Times
from tests.support.site import Site
from tests.support.tiny import fake_site

EMBEDDING = replace(tiny.base(), pooling=True)


@pytest.fixture
def adapters() -> list[Path]:
    return [tiny.adapter(1), tiny.adapter(2)]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path, FakeEngine(EMBEDDING, times=Times(step=0.001))) as site:
        yield site


@pytest.fixture
async def key(site: Site, adapters: list[Path]) -> str:
    return await site.tenant("acme", {"a": adapters[0], "b": adapters[1]})


@pytest.mark.asyncio(loop_scope="class")
class TestEmbeddings(EmbeddingSuite):
    """All on one server, as on the real engine."""

    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    async def site(self, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
        engine = FakeEngine(EMBEDDING, times=Times(step=0.001))
        async with fake_site(tmp_path_factory.mktemp("data"), engine) as site:
            yield site

    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    async def key(self, site: Site) -> str:
        return await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2)})


async def test_a_base_that_makes_text_makes_no_embeddings(tmp_path: Path) -> None:
    async with fake_site(tmp_path) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        with pytest.raises(openai.BadRequestError, match="no embeddings") as caught:
            await site.openai(key).embeddings.create(model="a", input="why")
        assert caught.value.code == "not_supported_by_base"


async def test_a_long_list_leaves_places_to_others(site: Site, key: str) -> None:
    engine = engine_of(site)
    before, engine.most_running = len(engine.calls), 0
    assert (await ask(site, key, ["why"] * 9)).status_code == 200
    assert engine.most_running == engine.max_running // 4 == 2
    calls = engine.calls[before:]
    assert len({call.id for call in calls}) == len(calls) == 5
    assert {(call.kind, call.resumable) for call in calls} == {("embedding", False)}
    (salt,) = {call.cache_salt for call in calls}
    assert salt


async def test_limits_hold(site: Site) -> None:
    key = await site.tenant("zeta", limits={"tokens_per_minute": 20, "base": True})
    assert (await ask(site, key, "why", tiny.NAME)).status_code == 200
    too_long = "why " * 60
    assert (
        "20 tokens per minute"
        in error(await ask(site, key, too_long, tiny.NAME), 429, "rate_limit_exceeded")["message"]
    )
    none = await site.tenant("none", base_allowed=False)
    error(await ask(site, none, "why", tiny.NAME), 404, "model_not_found", "model")


async def test_who_leaves_gives_its_places_back(tmp_path: Path) -> None:
    async with fake_site(tmp_path, FakeEngine(EMBEDDING, times=Times(step=0.3))) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        asking = asyncio.create_task(ask(site, key, ["why"] * 40))
        async with asyncio.timeout(60):
            while not engine_of(site).running:
                await asyncio.sleep(0.01)
            asking.cancel()
            while engine_of(site).running or site.services.dispatcher.open_leases():
                await asyncio.sleep(0.01)
        assert (await used(site, "acme"))["requests"] == 1


async def test_what_a_drain_cuts_is_no_answer(tmp_path: Path) -> None:
    async with fake_site(tmp_path, FakeEngine(EMBEDDING, times=Times(step=8.0)), drain_timeout=0.1) as site:
        key = await site.tenant("acme")
        asking = asyncio.create_task(ask(site, key, "why", tiny.NAME))
        async with asyncio.timeout(60):
            while not engine_of(site).running:
                await asyncio.sleep(0.01)
        await drain(site.app)
        error(await asking, 503, "shutting_down")


async def test_an_answer_that_is_not_a_number_is_an_error(
    site: Site, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> list[float]:
        return [math.nan, 1.0]

    monkeypatch.setattr("tests.support.fakes.log_probs", broken)
    for encoding in ("float", "base64"):
        error(await ask(site, key, "why", encoding_format=encoding), 500, "internal_error")


def test_a_shift_is_told_by_its_size() -> None:
    assert shift([[3.0, 4.0]], [[3.0, 4.0]]) == Shift(0.0, 0.0)
    assert shift([[1.0, 0.0], [2.0, 0.0]], [[1.0, 0.0], [0.0, 2.0]]) == Shift(math.sqrt(2), 1.0)
    assert shift([[0.0, 0.0]], [[1.0, 0.0]]).change == 1.0
    assert not Shift(1e-4, 0.0).exceeds(Shift(0.0, 0.0))
    assert Shift(2e-4, 0.0).exceeds(Shift(0.0, 0.0))
    assert not Shift(2e-3, 0.0).exceeds(Shift(1e-3, 0.0))
    assert finite_vectors([[1.0]])
    assert not finite_vectors([[1.0], [math.inf]])
