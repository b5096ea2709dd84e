"""SIGHUP: which settings a running server takes over, and which it leaves."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server import __main__ as command_line
from server import logs
from server.http.reload import TAKEN_OVER, take_over
from server.settings import Settings
from tests.support import tiny
from tests.support.collector import collector
from tests.support.site import ADMIN_KEY, SERVICE_KEY, Site, bearer
from tests.support.tiny import fake_site, settings

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")
NEW = "another-admin-key-of-the-tests"


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The configurations of the log that were asked for: a real one would be the other tests', too."""
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(logs, "configure", lambda form, level: asked.append((form, level)))
    return asked


def loading(site: Site, folder: Path, **changes: Any) -> Callable[[], Settings]:
    return lambda: settings(folder, **changes)


async def status(site: Site, key: str) -> int:
    return (await site.http.get("/admin/v1/me", headers=bearer(key))).status_code


async def test_a_rotated_key_counts_at_once(
    tmp_path: Path, told: list[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    async with fake_site(tmp_path) as site:
        with caplog.at_level(logging.INFO):
            changes = {"admin_key": NEW, "log_level": "debug", "max_queued": 7}
            take_over(site.services, loading(site, tmp_path, **changes))
        assert (await status(site, ADMIN_KEY), await status(site, NEW)) == (401, 200)
        assert told == [("json", "debug")]
        assert "taken over: ADMIN_KEY, LOG_LEVEL; after a restart: MAX_QUEUED" in caplog.text
        assert NEW not in caplog.text
        shown = (await site.http.get("/admin/v1/server", headers=bearer(NEW))).json()["settings"]
        assert (shown["log_level"], shown["max_queued"]) == ("debug", 256)


async def test_keys_that_are_empty_are_unset_as_at_the_start(
    tmp_path: Path, told: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fake_site(tmp_path) as site:
        for name, value in {"MODEL": "/m", "DATA_DIR": str(tmp_path), "ADMIN_KEY": ADMIN_KEY}.items():
            monkeypatch.setenv(f"LORAPLEX_{name}", value)
        for name in ("SERVICE_KEY", "METRICS_KEY", "ROLLOUT_KEY", "LIMITS_REDIS_URL"):
            monkeypatch.setenv(f"LORAPLEX_{name}", "")
        monkeypatch.setenv("LORAPLEX_LOG_LEVEL", "debug")
        take_over(site.services, Settings.load)
        assert (told, await status(site, ADMIN_KEY)) == ([("json", "debug")], 200)


@pytest.mark.parametrize(
    "changes", [{"admin_key": SERVICE_KEY}, {"admin_key": "short"}, {"gpu_slots": "many"}]
)
async def test_what_is_not_valid_changes_nothing(
    tmp_path: Path, told: list[tuple[str, str]], caplog: pytest.LogCaptureFixture, changes: dict[str, str]
) -> None:
    async with fake_site(tmp_path) as site:
        take_over(site.services, loading(site, tmp_path, **({"log_level": "debug"} | changes)))
        assert "the settings stay as they are" in caplog.text
        assert (await status(site, ADMIN_KEY), told) == (200, [])


def test_the_signal_reads_the_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("model: /m\nlog_level: info\n")
    found: list[str] = []
    monkeypatch.setattr("server.http.reload.take_over", lambda _, load: found.append(load().log_level))

    def run(server: Any) -> None:
        server.config.app.state.services = object()
        file.write_text("model: /m\nlog_level: debug\n")
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr("server.http.connection.DrainingServer.run", run)
    monkeypatch.setattr(logs, "configure_children", lambda *_: None)
    before = signal.getsignal(signal.SIGHUP)
    try:
        command_line._serve(Settings.load(file), file)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert found == ["debug"]


def test_the_page_names_all_that_is_taken_over() -> None:
    page = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| `LOG_LEVEL`, `LOG_FORMAT`"))
    assert set(re.findall(r"`([A-Z_]+)`", row)) - {"TRACES_URL"} == {name.upper() for name in TAKEN_OVER}


async def test_each_counts_from_the_next_request_on(tmp_path: Path) -> None:
    """Those that nobody reads again are told to who holds them; what each does is seen from outside."""
    page = "https://app.example"
    with collector() as store:
        beside = {"traces_url": store.url}
        async with fake_site(tmp_path, **beside, traces_share=1.0, metrics_tenants=0) as site:
            key = await site.tenant("acme", {"a": tiny.adapter(1)})

            async def ask() -> tuple[str | None, bool, float]:
                """The origin that is let in, whether the trace is kept, and what all requests cost."""
                body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
                headers = bearer(key) | {"Origin": page}
                said = await site.http.post("/v1/chat/completions", json=body, headers=headers)
                assert said.status_code == 200
                await site.services.usage_writer.flush()
                (row,) = (await site.admin.get("/admin/v1/usage")).json()["data"]
                origin = said.headers.get("access-control-allow-origin")
                return origin, bool(int(said.headers["traceparent"][-2:], 16) & 1), row["cost"]

            def is_named(metrics: httpx.Response) -> bool:
                return 'loraplex_output_tokens_total{tenant="acme"}' in metrics.text

            assert await ask() == (None, True, 0)
            assert not is_named(await site.http.get("/metrics"))
            changes = {
                "cors_origins": [page], "traces_share": 0.0, "metrics_tenants": 5, "metrics_adapters": 0,
                "auth_failures": 1, "max_uploads": 3, "max_uploads_each": 2, "disk_reserve": 1 << 60,
                "keep_usage_days": 7, "sse_keepalive": 3.0, "import_prefixes": ["https://models.example/"],
                "drain_timeout": 2.0,
            }  # fmt: skip
            prices = {"*": {"input": 1000, "output": 1000}}
            take_over(site.services, loading(site, tmp_path, **beside, **changes, prices=prices))
            shown = (await site.admin.get("/admin/v1/server")).json()["settings"]
            assert {name: shown[name] for name in changes} == changes
            origin, kept, cost = await ask()
            assert (origin, kept, cost > 0) == (page, False, True)
            assert is_named(await site.http.get("/metrics"))
            assert (await site.upload("acme", "b", tiny.adapter(2))).status_code == 507
            assert [await status(site, "lp-nobody") for _ in range(3)][-1] == 429
            intake, writer = site.services.intake, site.services.usage_writer
            assert (intake.most, intake.each, writer.keep_days) == (3, 2, 7)
            take_over(site.services, loading(site, tmp_path, **beside, traces_share=1.0))
            assert (await ask())[:2] == (None, True)
