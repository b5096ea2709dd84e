"""Headers that say who asks: never two of one kind, and no end of wrong ones."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from adapters.database.database import Database
from server.accounts.authentication import Authentication
from tests.service.http.test_api import CHAT, CHAT_URL, error
from tests.support import tiny
from tests.support.site import ADMIN_KEY, SERVICE_KEY, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

WRONG = "lp-" + "x" * 43
METRICS_KEY = "metrics-key-of-the-tests"
ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/adapters"),
    ("GET", "/v1/usage"),
    ("GET", "/admin/v1/tenants"),
    ("POST", "/admin/v1/tenants/acme/adapters/a/versions"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
]


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("Authorization", f"Bearer {ADMIN_KEY}", f"Bearer {ADMIN_KEY}"),
        ("X-Customer-ID", "acme", "globex"),
        ("X-API-Key", "a", "a"),
        ("Idempotency-Key", "a", "b"),
        ("Content-Type", "application/json", "text/plain"),
    ],
)
async def test_a_second_header_of_a_kind_is_refused_on_every_route(
    tmp_path: Path, name: str, first: str, second: str
) -> None:
    async with fake_site(tmp_path) as site:
        for method, url in ROUTES:
            headers = [(name, first), (name.lower(), second)]
            answer = await site.http.request(method, url, headers=headers)
            error(answer, 400, "duplicate_header", name)
        answer = await site.http.post("/v1/messages", headers=[(name, first), (name, second)], json={})
        assert (answer.status_code, answer.json()["type"]) == (400, "error")


async def test_a_gateway_that_appends_lets_nobody_name_another_customer(tmp_path: Path) -> None:
    async with fake_site(tmp_path) as site:
        await site.tenant("acme", {"a": tiny.adapter(1)})
        await site.tenant("globex", {"a": tiny.adapter(2)})
        headers = [("X-Customer-ID", "globex"), ("X-Customer-ID", "acme"), *bearer(SERVICE_KEY).items()]
        error(
            await site.http.post(CHAT_URL, json=CHAT, headers=headers),
            400,
            "duplicate_header",
            "X-Customer-ID",
        )
        joined = {**bearer(SERVICE_KEY), "X-Customer-ID": "globex, acme"}
        error(
            await site.http.post(CHAT_URL, json=CHAT, headers=joined),
            403,
            "unknown_customer",
            "X-Customer-ID",
        )
        assert (await site.http.post(CHAT_URL, json=CHAT, headers=headers[1:])).status_code == 200


async def test_wrong_keys_are_slowed_and_right_ones_are_not(tmp_path: Path) -> None:
    async with fake_site(tmp_path, auth_failures=5) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        urls = ["/v1/models", "/admin/v1/tenants", "/v1/usage"]
        answers = [await site.http.get(urls[i % 3], headers=bearer(WRONG)) for i in range(8)]
        assert [answer.status_code for answer in answers] == [401] * 5 + [429] * 3
        error(answers[-1], 429, "too_many_wrong_keys")
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
        for headers in (bearer("short"), {"X-Forwarded-For": "192.0.2.7", **bearer("lp-other")}):
            answer = await site.http.get("/v1/models", headers=headers)
            assert answer.status_code in (401, 429), "the proxy on this host may name another address"
        anthropic = await site.http.post("/v1/messages", headers={"x-api-key": WRONG}, json={})
        assert (anthropic.status_code, anthropic.json()["error"]["type"]) == (429, "rate_limit_error")
        assert (await site.http.get("/v1/models", headers=bearer(key))).status_code == 200
        assert (await site.admin.get("/admin/v1/tenants")).status_code == 200
        error(await site.http.get("/v1/models"), 401, "invalid_api_key")
        error(await site.http.get("/admin/v1/tenants", headers=bearer(key)), 403, "permission_denied")
        page = (await site.http.get("/metrics")).text
        assert "loraplex_wrong_keys_total 11.0" in page


async def test_metrics_behind_a_key(tmp_path: Path) -> None:
    async with fake_site(tmp_path / "open") as site:
        assert (await site.http.get("/metrics")).status_code == 200
    async with fake_site(tmp_path / "closed", metrics_key=METRICS_KEY) as site:
        key = await site.tenant("acme")
        for headers in ({}, bearer("x"), bearer(key), bearer(ADMIN_KEY), bearer(SERVICE_KEY)):
            error(await site.http.get("/metrics", headers=headers), 401, "invalid_api_key")
        answer: httpx.Response = await site.http.get("/metrics", headers=bearer(METRICS_KEY))
        assert (answer.status_code, "loraplex_adapters" in answer.text) == (200, True)
        for url in ("/v1/models", "/admin/v1/tenants"):
            error(await site.http.get(url, headers=bearer(METRICS_KEY)), 401, "invalid_api_key")


@pytest.mark.parametrize("same", [ADMIN_KEY, SERVICE_KEY])
def test_the_metrics_key_is_none_of_the_others(same: str) -> None:
    database = Database("sqlite:///unused.db")
    with pytest.raises(ValueError, match="must differ"):
        Authentication(database, admin_key=ADMIN_KEY, service_key=SERVICE_KEY, metrics_key=same)
