"""A real Prometheus: alerts fire by their causes and end with them, and dashboards get their answers."""

from __future__ import annotations

import asyncio
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from server.publishing.quarantine import quarantine
from tests.support import tiny
from tests.support.dashboards import FOLDER, dashboards, text
from tests.support.fakes import FakeEngine, Times
from tests.support.prometheus import ALERTS, PROGRAM, TOOL, WINDOW_S, Prometheus, hurried, prometheus
from tests.support.proxy import proxy
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")
RUNBOOK = Path(__file__).parents[3] / "docs" / "runbook.md"
needs_prometheus = pytest.mark.skipif(PROGRAM is None, reason="prometheus is not installed")
needs_promtool = pytest.mark.skipif(TOOL is None, reason="promtool is not installed")

# Series that nothing in the test makes: of a fleet, of the real engine, of limits that nobody has.
ELSEWHERE = ("loraplex_replica_", "loraplex_moved_", "loraplex_budget_", "vllm:kv_", "loraplex_preemptions_")


# --- the files --------------------------------------------------------------------------------------


@needs_promtool
@pytest.mark.parametrize("words", [["check", "rules"], ["test", "rules"]])
def test_promtool_takes_the_alerts(words: list[str]) -> None:
    file = ALERTS if words[0] == "check" else ALERTS.with_name("alerts_test.yml")
    done = subprocess.run([str(TOOL), *words, str(file)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_takes_the_configuration() -> None:
    config = ALERTS.parent / "prometheus.yml"
    done = subprocess.run(
        [str(TOOL), "check", "config", str(config)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_leads_into_the_runbook() -> None:
    rules, page = ALERTS.read_text(), RUNBOOK.read_text()
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    }
    links = re.findall(r"runbook_url: .*docs/runbook.md.*#([\w-]+)", rules)
    assert len(links) == rules.count("- alert:")
    assert set(links) <= headings


def test_hurried_rules_are_the_same_ones() -> None:
    short = hurried(ALERTS.read_text())
    assert short.count("- alert:") == ALERTS.read_text().count("- alert:")
    assert f"[{WINDOW_S}s]" in short
    assert "\n        for:" not in short


@pytest.mark.parametrize("name", dashboards())
def test_the_dashboards_are_those_of_the_code(name: str) -> None:
    """To update: ``python -m tests.support.dashboards``."""
    assert (FOLDER / name).read_text() == text(dashboards()[name])
    panels = dashboards()[name]["panels"]
    assert len({panel["title"] for panel in panels}) == len(panels)


# --- a running one ----------------------------------------------------------------------------------


def site_of(folder: Path, **settings: Any) -> Any:
    engine = FakeEngine(tiny.base(), times=Times(step=0.002, start=0.2))
    settings = {"engine_restarts": 1000} | settings
    return fake_site(folder, engine, log_format="text", auth_failures=0, **settings)


async def wrong_keys(site: Site) -> None:
    for _ in range(4 * WINDOW_S):
        await site.http.get("/v1/models", headers=bearer("lp-nobody"))
        await asyncio.sleep(0.05)


@needs_prometheus
async def test_alerts_fire_by_their_causes_and_end(tmp_path: Path) -> None:
    async with site_of(tmp_path / "data") as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)}, limits={"requests_per_minute": 2})
        port = urlsplit(site.url).port
        assert port is not None
        async with proxy("127.0.0.1", port) as way, prometheus(tmp_path / "prometheus", way.port) as watching:
            await site.chat(key, "hi", max_tokens=2)
            await watching.until_calm()

            way.cut()
            await watching.until("LoraplexDown", fires=True)
            await way.mend()
            await watching.until("LoraplexDown", fires=False)

            version = await site.services.publishing.catalog.version("acme", "a", 1)
            await quarantine(site.services.publishing.quarantine, site.services.dispatcher, version, "NaN")
            began = ("LoraplexQuarantined", "LoraplexWrongKeys", "LoraplexCustomerRefused")

            async def refused() -> None:
                asked = (site.chat(key, "hi", model=tiny.NAME) for _ in range(20))
                await asyncio.gather(wrong_keys(site), *asked)

            await watching.fires_while(began, refused)
            other = await site.tenant("zeta")

            async def died() -> None:
                site.services.engine.die()
                met = await site.chat(other, "hi", model=tiny.NAME)
                assert met.status_code in (200, 503), "it may be what met the loss"

            await watching.fires_while(("LoraplexEngineRestarted",), died)

            released = await site.admin.patch(
                "/admin/v1/tenants/acme/adapters/a/versions/1", json={"quarantined": False}
            )
            assert released.status_code == 200
            for alert in (*began, "LoraplexEngineRestarted"):
                await watching.until(alert, fires=False)


def queries(dashboard: dict[str, Any]) -> Iterator[str]:
    """As Grafana would ask them, with everything chosen."""
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield re.sub(r'"\$\w+"', '".*"', target["expr"].replace("$__rate_interval", f"{WINDOW_S}s"))
    for variable in dashboard["templating"]["list"]:
        found = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"])
        assert found is not None
        yield f"count by ({found[2]}) ({found[1]})"


async def unanswered(watching: Prometheus) -> set[str]:
    asked = {query for dashboard in dashboards().values() for query in queries(dashboard)}
    expected = {query for query in asked if not any(name in query for name in ELSEWHERE)}
    empty = {query for query in asked if not await watching.query(query)}
    return empty & expected


@needs_prometheus
async def test_every_query_of_the_dashboards_is_answered(tmp_path: Path) -> None:
    async with site_of(tmp_path / "data") as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        port = urlsplit(site.url).port
        assert port is not None
        async with prometheus(tmp_path / "prometheus", port) as watching:
            left: set[str] | None = None  # pytest's own limit ends it where something stays unanswered
            while left != set():
                said = await site.chat(key, "hi", max_tokens=4, stream=True)
                assert said.status_code == 200
                await asyncio.sleep(0.2)
                left = await unanswered(watching)
            found = await watching.exemplars("loraplex_time_to_first_token_seconds_bucket")
            assert found
            assert all(re.fullmatch("[0-9a-f]{32}", one["labels"]["trace_id"]) for one in found)
