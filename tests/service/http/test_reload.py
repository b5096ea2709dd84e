"""SIGHUP: which settings a running server takes over, and which it leaves."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server import __main__ as command_line
from server import logs
from server.http.reload import take_over
from server.settings import Settings
from tests.support.site import ADMIN_KEY, SERVICE_KEY, Site, bearer
from tests.support.tiny import fake_site, settings

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
