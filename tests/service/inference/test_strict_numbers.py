"""A number in a request is a JSON number, on every surface: what only looks like one never passes a limit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.service.http.test_api import error
from tests.support import tiny
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.asyncio(loop_scope="module")

TURN = [{"role": "user", "content": "Hello there"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": TURN},
    "/v1/completions": {"prompt": "Hello there"},
    "/v1/responses": {"input": "Hello there"},
    "/v1/messages": {"messages": TURN, "max_tokens": 4},
}
FIELDS = [
    ("/v1/chat/completions", "max_tokens"),
    ("/v1/chat/completions", "max_completion_tokens"),
    ("/v1/chat/completions", "n"),
    ("/v1/chat/completions", "top_logprobs"),
    ("/v1/completions", "max_tokens"),
    ("/v1/completions", "logprobs"),
    ("/v1/completions", "seed"),
    ("/v1/responses", "max_output_tokens"),
    ("/v1/messages", "max_tokens"),
    ("/v1/messages", "top_k"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with fake_site(tmp_path_factory.mktemp("data")) as site:
        yield site


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def key(site: Site) -> str:
    return await site.tenant("acme", {"a": tiny.adapter(1)})


@pytest.mark.parametrize(("url", "field"), FIELDS)
async def test_an_integer_is_an_integer(site: Site, key: str, url: str, field: str) -> None:
    for value in ("2", 2.0, True, [2], {"at": 2}):
        answer = await site.http.post(url, json=BODIES[url] | {field: value}, headers=bearer(key))
        if url == "/v1/messages":
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request"), value
            assert field in answer.json()["error"]["message"]
        else:
            error(answer, 400, "invalid_request", field)


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
async def test_a_temperature_is_a_number(site: Site, key: str, url: str) -> None:
    for value in ("0.5", True, [0.5]):
        answer = await site.http.post(url, json=BODIES[url] | {"temperature": value}, headers=bearer(key))
        error(answer, 400, "invalid_request", "temperature")
    for good in (0, 1, 0.5):
        answer = await site.http.post(url, json=BODIES[url] | {"temperature": good}, headers=bearer(key))
        assert answer.status_code == 200, answer.text
