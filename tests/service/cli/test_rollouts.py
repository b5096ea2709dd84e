"""``loraplex rollouts`` against a served app."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.service.cli.test_commands import document, push, run, shown
from tests.support import tiny
from tests.support.fakes import FakeEngine
from tests.support.site import Site
from tests.support.tiny import fake_site


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path, FakeEngine(tiny.base())) as site:
        yield site


async def test_a_rollout_from_a_terminal(site: Site) -> None:
    await document(site, "tenants", "create", "acme")
    for seed in (1, 2):
        await push(site, tiny.adapter(seed))
    await document(site, "adapters", "live", "acme", "a", "1")
    which = ("acme", "a")
    result = await run(site, "rollouts", "show", *which)
    assert (result.exit_code, "has had no rollout" in result.stderr) == (2, True)
    options = ("--steps", "5,50,100", "--hold", "1h", "--guards", '{"length": null}')
    made = await document(site, "rollouts", "start", *which, "2", *options)
    assert (made["steps"], made["hold"], made["guards"]["length"]) == ([5, 50, 100], 3600, None)
    assert (await run(site, "rollouts", "start", *which, "2", "--steps", "some")).exit_code == 2
    assert (await document(site, "rollouts", "forward", *which))["share"] > 0
    assert (await document(site, "rollouts", "pause", *which))["state"] == "held"
    assert (await document(site, "rollouts", "resume", *which))["state"] == "running"
    watched = await run(site, "rollouts", "watch", *which, "--interval", "0.2", "--count", "3", "--json")
    seen = json.loads(watched.stdout)
    assert (seen["id"], seen["state"]) == (made["id"], "running")
    assert watched.stderr.count("version 2 beside 1") == 2, "each look but the last, as it comes"
    for wrong in (("--interval", "-1"), ("--interval", "0"), ("--count", "0")):
        assert (await run(site, "rollouts", "watch", *which, *wrong)).exit_code == 2
    assert (await document(site, "rollouts", "back", *which, "--rollout", made["id"]))[
        "state"
    ] == "rolled_back"
    first, *rows = await shown(site, "rollouts", "show", *which)
    assert first[0].startswith("version 2 beside 1: rolled_back at 0 % (steps 5, 50, 100)")
    assert ["errors", "open"] in [row[:2] for row in rows]
    assert [row[-1] for row in rows if row[1:2] == ["roll_back"]] == ["rolled back by hand"]
    headings, row = await shown(site, "rollouts", "list", *which)
    assert headings[:4] == ["rollout", "version", "state", "share"]
    assert row[1:4] == ["2", "rolled_back", "0 %"]
    assert (await run(site, "rollouts", "list", *which, "--state", "held")).exit_code == 2
    assert (await document(site, "rollouts", "watch", *which))["state"] == "rolled_back"


async def test_which_of_all_customers_rollouts_run_or_are_held(site: Site) -> None:
    for tenant in ("acme", "zeta"):
        await site.tenant(tenant, {"a": tiny.adapter(1)})
        await site.upload(tenant, "a", tiny.adapter(2))
        await document(site, "adapters", "live", tenant, "a", "1")
        await document(site, "rollouts", "start", tenant, "a", "2", "--hold", "1h")
    await document(site, "rollouts", "pause", "zeta", "a")
    headings, *rows = await shown(site, "rollouts", "list")
    assert headings[:7] == ["tenant", "adapter", "version", "beside", "state", "share", "held by"]
    assert [row[:5] for row in rows] == [["zeta", "a", "2", "1", "held"], ["acme", "a", "2", "1", "running"]]
    (held,) = (await document(site, "rollouts", "list", "--state", "held"))["data"]
    assert (held["tenant"], held["held_by"]) == ("zeta", "admin")
    assert [one["tenant"] for one in (await document(site, "rollouts", "list", "acme"))["data"]] == ["acme"]
    await document(site, "rollouts", "back", "acme", "a")
    assert len((await document(site, "rollouts", "list"))["data"]) == 1
    (back,) = (await document(site, "rollouts", "list", "--state", "rolled_back"))["data"]
    assert back["tenant"] == "acme"
    assert await shown(site, "rollouts", "list", "--state", "completed") == [["none"]]
    own = (await site.admin.post("/admin/v1/tenants/acme/keys", json={"scopes": ["adapters:write"]})).json()
    mine = await run(site, "rollouts", "list", "a", "--json", LORAPLEX_KEY=own["key"])
    assert [one["id"] for one in json.loads(mine.stdout)["data"]] == [back["id"]]
    refused = await run(site, "rollouts", "list", LORAPLEX_KEY=own["key"])
    assert "operator_only: " in refused.stderr


async def test_a_push_that_goes_live_by_a_rollout(site: Site) -> None:
    await document(site, "tenants", "create", "acme")
    await push(site, tiny.adapter(1))
    words = ("adapters", "push", str(tiny.adapter(2)), "--tenant", "acme", "--name", "a", "--rollout")
    pushed = await run(site, *words, "--json")
    made = json.loads(pushed.stdout)
    assert (made["version"], made["live"], made["rollout"]["version"]) == (2, 1, 2)
    assert f"{made['rollout']['id']}: running at" in pushed.stderr
