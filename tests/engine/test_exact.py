"""Tokens are limited as the real engine counts them, for every kind of request that it takes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.site import Site, bearer

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

LIMIT = 250
DIGITS = "0123456789" * 30  # tokens: one for each
CHAT = [{"role": "user", "content": DIGITS}]
ROUTES = {
    "/v1/completions": {"prompt": DIGITS, "max_tokens": 4},
    "/v1/completions of two": {"prompt": [DIGITS[:200], DIGITS[:100]], "max_tokens": 4},
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 4},
    "/v1/responses": {"input": DIGITS, "max_output_tokens": 4},
    "/v1/messages": {"messages": CHAT, "max_tokens": 4},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES)
async def test_dense_prompts_are_refused_before_they_run(site: Site, route: str, stream: bool) -> None:
    name = f"dense-{list(ROUTES).index(route)}-{stream}".lower()
    key = await site.tenant(name, base_allowed=True, limits={"tokens_per_minute": LIMIT})
    body: dict[str, Any] = {"model": site.services.engine.base.name, "stream": stream, **ROUTES[route]}
    answer = await site.http.post(route.split()[0], headers=bearer(key), json=body)
    assert answer.status_code == 429, answer.text
    assert answer.headers["content-type"].startswith("application/json")
    rows = (await site.admin.get(f"/admin/v1/usage?tenant={name}")).json()["data"]
    assert sum(row["total_tokens"] for row in rows) == 0
    again = await site.http.post(
        "/v1/completions", headers=bearer(key), json={"model": body["model"], "prompt": "hi", "max_tokens": 2}
    )
    assert again.status_code == 200, again.text
    used = again.json()["usage"]["total_tokens"]
    assert again.headers["x-ratelimit-remaining-tokens"] == str(LIMIT - used)


async def test_an_answer_of_no_given_length_is_cut_to_what_is_left(site: Site) -> None:
    key = await site.tenant("dense-open", base_allowed=True, limits={"tokens_per_minute": LIMIT})
    answer = await site.http.post(
        "/v1/chat/completions",
        headers=bearer(key),
        json={
            "model": site.services.engine.base.name,
            "messages": [{"role": "user", "content": DIGITS[:150]}],
            "logit_bias": {"2": -100},  # no end of its own
            "temperature": 0,
        },
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["total_tokens"] == LIMIT
