"""Rollouts over real HTTP and a real database, on the fake engine: what happens to the requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from server.rollouts.judge import Judge
from server.rollouts.runner import Runner
from tests.service.http.test_api import error
from tests.support import tiny
from tests.support.fakes import FakeEngine
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

ADAPTER = "/admin/v1/tenants/acme/adapters/a"
ROLLOUTS = f"{ADAPTER}/rollouts"
ALL = "/admin/v1/rollouts"
# Certain after some dozens of requests, so that a test takes seconds.
QUICK = {"version": 2, "steps": [50, 100], "hold": 0, "guards": {
    "errors": 0.3, "refusals": 0.3, "finish": 0.4, "min_samples": 5,
    "first_token": None, "tokens_per_second": None,
}}  # fmt: skip


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path, FakeEngine(tiny.base())) as site:
        yield site


async def two_versions(site: Site, **fields: Any) -> str:
    """Version 1 is live, 2 is there; the customer's key."""
    key = await site.tenant("acme", {"a": tiny.adapter(1)}, **fields)
    await site.upload("acme", "a", tiny.adapter(2))
    await site.admin.patch(ADAPTER, json={"live": 1})
    return key


async def begun(site: Site, **body: Any) -> str:
    made = await site.admin.post(ROLLOUTS, json=QUICK | body)
    assert made.status_code == 201, made.text
    assert (made.json()["state"], made.json()["share"], made.json()["decisions"]) == ("running", 0, [])
    return str(made.json()["id"])


async def until(site: Site, id_: str, is_so: Callable[[dict[str, Any]], object], ask: Any = None) -> Any:
    """The rollout once ``is_so``; ``ask`` makes requests meanwhile."""
    async with asyncio.timeout(240):
        while True:
            if ask is not None:
                await asyncio.gather(*(ask(number) for number in range(10)))
            found = (await site.admin.get(f"{ROLLOUTS}/{id_}")).json()
            if is_so(found):
                return found
            await asyncio.sleep(0.2)


def has_ended(found: dict[str, Any]) -> bool:
    return found["state"] in ("completed", "rolled_back")


async def adapter(site: Site) -> Any:
    found = (await site.admin.get(ADAPTER)).json()
    return found["live"], found["split"]


async def test_an_equal_version_goes_live_by_itself(site: Site) -> None:
    key = await two_versions(site)

    async def ask(number: int) -> None:
        await site.chat(key, "hi", model="a", max_tokens=2)

    id_ = await begun(site)
    await until(site, id_, lambda found: found["share"] == 50)
    assert await adapter(site) == (1, {"1": 50, "2": 50})
    error(await site.admin.post(ROLLOUTS, json=QUICK), 409, "rollout_running")
    error(await site.admin.patch(ADAPTER, json={"split": {"1": 1, "2": 99}}), 409, "rollout_running")
    error(await site.admin.patch(ADAPTER, json={"split": None}), 409, "rollout_running")
    ended = await until(site, id_, has_ended, ask)
    assert (ended["state"], ended["share"], ended["step"]) == ("completed", 100, 1)
    assert await adapter(site) == (2, None)
    assert [decision["action"] for decision in ended["decisions"]] == ["start", "complete"]
    numbers = ended["decisions"][-1]["numbers"]
    assert numbers["new"]["requests"] >= 5
    assert numbers["new"]["cut_short"] == numbers["live"]["cut_short"] == 1.0, "why answers ended is known"
    assert {test["verdict"] for test in numbers["tests"] if test["applies"]} == {"safe"}
    audit = (await site.admin.get("/admin/v1/audit?tenant=acme")).json()["data"]
    assert [entry["action"] for entry in audit[:3]] == ["rollout.complete", "rollout.start", "rollout.create"]
    assert audit[0]["before"] == {"live": 1, "split": {"1": 50, "2": 50}}
    assert audit[0]["after"] == {"live": 2, "split": None}
    error(await site.admin.patch(f"{ROLLOUTS}/{id_}", json={"action": "pause"}), 409, "rollout_ended")
    metrics = (await site.http.get("/metrics")).text
    assert 'loraplex_rollouts{state="completed"} 1.0' in metrics


async def test_all_customers_rollouts_come_by_the_page(site: Site) -> None:
    await two_versions(site)
    made = []
    for _ in range(3):
        made.insert(0, await begun(site))
        await site.admin.patch(f"{ROLLOUTS}/{made[0]}", json={"action": "roll_back"})
    made.insert(0, await begun(site, hold=600))
    seen, after = [], None
    while after is not None or not seen:
        page = await site.admin.get(ALL, params={"limit": 3} | ({"after": after} if after else {}))
        seen += [one["id"] for one in page.json()["data"]]
        after = page.json()["next"]
    assert seen == made, "newest first, each once"
    for asked, found in (
        ({"state": "active"}, made[:1]),
        ({"state": "rolled_back"}, made[1:]),
        ({"tenant": "acme", "state": "held"}, []),
        ({"tenant": "nobody"}, []),
        ({"tenant": "no body\0"}, []),
    ):
        assert [one["id"] for one in (await site.admin.get(ALL, params=asked)).json()["data"]] == found
    for wrong in ({"after": "0" * 32}, {"after": made[0], "tenant": "zeta"}):
        error(await site.admin.get(ALL, params=wrong), 404, "rollout_not_found", "after")
    error(await site.admin.get(ALL, params={"state": "gone"}), 422, "invalid_request", "query.state")


async def test_a_look_reads_the_adapter_again_once_something_was_written(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    await two_versions(site)
    id_ = await begun(site, hold=600)
    await until(site, id_, lambda found: found["share"] == 50)
    judge, reads = site.services.judge, 0
    read = judge.rows.adapted_now

    async def counted(*asked: Any) -> Any:
        nonlocal reads
        reads += 1
        return await read(*asked)

    monkeypatch.setattr(judge.rows, "adapted_now", counted)
    for _ in range(10):
        (stored,) = await judge.rows.active()
        await judge.look(stored)
    assert reads < 5, "nothing was written since the share was given"
    await site.admin.patch(ADAPTER, json={"live": 2})
    ended = await until(site, id_, has_ended)
    assert (ended["state"], ended["decisions"][-1]["by"]) == ("completed", "hand")


async def test_a_version_that_refuses_some_prompts_goes_back(site: Site) -> None:
    """Refused after its version is known, as by a template of its own: a bad temperature stands for that."""
    key = await two_versions(site)
    id_ = await begun(site, steps=[5, 50, 100])
    await until(site, id_, lambda found: found["share"] == 5)

    async def ask(number: int) -> None:
        answer = await site.chat(key, "hi", model="a", max_tokens=1, user=str(number))
        if answer.headers["x-loraplex-version"] == "a@2":
            bad = await site.chat(key, "hi", model="a", max_tokens=1, user=str(number), temperature=9)
            assert bad.status_code == 400

    async def more(number: int) -> None:
        for user in range(number, 200, 10):
            await ask(user)

    ended = await until(site, id_, has_ended, more)
    assert (ended["state"], ended["reason"]) == ("rolled_back", "the new version refuses more often")
    assert await adapter(site) == (1, None)


async def test_requests_that_name_a_version_are_not_compared(site: Site) -> None:
    key = await two_versions(site)
    id_ = await begun(site)
    await until(site, id_, lambda found: found["share"] == 50)
    for _ in range(5):
        assert (await site.chat(key, "hi", model="a@2", max_tokens=1)).status_code == 200
    await site.chat(key, "hi", model="a", max_tokens=1)

    def compared(found: dict[str, Any]) -> int:
        return (
            sum(found["numbers"][which]["requests"] for which in ("new", "live")) if found["numbers"] else 0
        )

    assert compared(await until(site, id_, compared)) == 1


async def test_people_pause_resume_go_on_and_back(site: Site) -> None:
    await two_versions(site)
    id_ = await begun(site, steps=[5, 50, 100])
    await until(site, id_, lambda found: found["share"] == 5)
    one = f"{ROLLOUTS}/{id_}"
    paused = (await site.admin.patch(one, json={"action": "pause"})).json()
    assert (paused["state"], paused["held_by"]) == ("held", "admin")
    going = (await site.admin.patch(one, json={"action": "resume"})).json()
    assert (going["state"], going["held_by"]) == ("running", None)
    further = (await site.admin.patch(one, json={"action": "forward"})).json()
    assert (further["step"], further["share"]) == (1, 50)
    assert await adapter(site) == (1, {"1": 50, "2": 50})
    back = (await site.admin.patch(one, json={"action": "roll_back"})).json()
    assert (back["state"], back["share"]) == ("rolled_back", 0)
    assert await adapter(site) == (1, None)
    listed = (await site.admin.get(ROLLOUTS)).json()["data"]
    assert [(found["id"], found["numbers"]) for found in listed] == [(id_, None)]


async def test_a_customer_rolls_out_its_own_and_nobody_elses(site: Site) -> None:
    await two_versions(site)
    scopes = {"scopes": ["adapters:write"]}
    key = (await site.admin.post("/admin/v1/tenants/acme/keys", json=scopes)).json()["key"]
    await site.tenant("other", {"a": tiny.adapter(3)})
    theirs = (await site.admin.post("/admin/v1/tenants/other/keys", json=scopes)).json()["key"]
    mine = "/v1/adapters/a/rollouts"
    made = await site.http.post(mine, json={"version": 2}, headers=bearer(key))
    assert made.status_code == 201, made.text
    assert (made.json()["steps"], made.json()["hold"]) == ([5, 25, 100], 600)
    one = f"{mine}/{made.json()['id']}"
    assert (await site.http.get(one, headers=bearer(key))).json()["version"] == 2
    error(await site.http.get(one, headers=bearer(theirs)), 404, "rollout_not_found")
    nobodys = one.replace("/a/", "/b/")
    error(await site.http.get(nobodys, headers=bearer(theirs)), 404, "adapter_not_found")
    act = {"action": "back"}
    error(await site.http.patch(one, json=act, headers=bearer(theirs)), 404, "rollout_not_found")
    assert (await site.http.patch(one, json=act, headers=bearer(key))).json()["state"] == "rolled_back"


REFUSED: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"version": 9}, 404, "version_not_found", "version"),
    ({"version": 1}, 409, "adapter_conflict", "version"),
    ({"version": 0}, 422, "invalid_request", "version"),
    ({}, 422, "invalid_request", "version"),
    ({"version": 2, "steps": []}, 422, "invalid_request", "steps"),
    ({"version": 2, "hold": "soon"}, 422, "invalid_request", "hold"),
    ({"version": 2, "hold": -1}, 422, "invalid_request", "hold"),
    ({"version": 2, "hold": "99d"}, 422, "invalid_request", "hold"),
    ({"version": 2, "guards": {"errors": 2}}, 422, "invalid_request", "guards.errors"),
    ({"version": 2, "guards": {"unknown": 1}}, 422, "invalid_request", "guards.unknown"),
]


async def test_what_cannot_be_rolled_out_is_refused(site: Site) -> None:
    await two_versions(site)
    for body, status, code, param in REFUSED:
        error(await site.admin.post(ROLLOUTS, json=body), status, code, param)
    for steps in ([5, 25], [25, 5, 100], [5, 5, 100], [0, 100], [101]):
        refused = await site.admin.post(ROLLOUTS, json={"version": 2, "steps": steps})
        assert refused.status_code == 422, refused.text
    assert (await site.admin.get(ROLLOUTS)).json()["data"] == []


async def test_more_that_is_refused_and_what_a_hold_may_be(site: Site) -> None:
    await two_versions(site)
    for path in (f"{ADAPTER}x/rollouts", f"{ADAPTER}x/rollouts/1"):
        assert (await site.admin.get(path)).status_code == 404
    await site.admin.patch(ADAPTER, json={"split": {"1": 50, "2": 50}})
    error(await site.admin.post(ROLLOUTS, json={"version": 2}), 409, "adapter_conflict")
    await site.admin.patch(ADAPTER, json={"split": None})
    made = await site.admin.post(ROLLOUTS, json={"version": 2, "hold": "1h30m"})
    assert made.json()["hold"] == 5400
    wrong = await site.admin.patch(f"{ROLLOUTS}/{made.json()['id']}", json={"action": "dance"})
    error(wrong, 422, "invalid_request", "action")


async def test_whoever_sets_a_version_live_ends_it(site: Site) -> None:
    await two_versions(site)
    id_ = await begun(site)
    await until(site, id_, lambda found: found["share"] == 50)
    assert (await site.admin.patch(ADAPTER, json={"live": 1})).status_code == 200
    ended = await until(site, id_, has_ended)
    assert (ended["state"], ended["decisions"][-1]["by"]) == ("rolled_back", "hand")
    assert await adapter(site) == (1, None)
    id_ = await begun(site)
    await until(site, id_, lambda found: found["share"] == 50)
    await site.admin.patch(ADAPTER, json={"live": 2})
    split = await site.admin.patch(ADAPTER, json={"split": {"1": 50, "2": 50}})
    assert split.status_code == 200, "nobody has to wait until that was noticed"
    assert (await until(site, id_, has_ended))["state"] == "completed"


async def test_an_upload_or_the_end_of_the_adapter_ends_it_too(site: Site) -> None:
    await two_versions(site)
    id_ = await begun(site)
    await until(site, id_, lambda found: found["share"] == 50)
    await site.upload("acme", "a", tiny.adapter(3))
    assert (await until(site, id_, has_ended))["state"] == "rolled_back"
    assert await adapter(site) == (3, None)
    id_ = await begun(site)
    await until(site, id_, lambda found: found["share"] == 50)
    error(await site.admin.delete(f"{ADAPTER}/versions/2"), 409, "adapter_conflict")
    await site.admin.delete(ADAPTER)
    assert (await until(site, id_, has_ended))["reason"] == "the adapter was deleted"


async def test_a_quarantined_version_goes_back_and_a_quarantined_live_one_holds(site: Site) -> None:
    await two_versions(site)
    id_ = await begun(site)
    await until(site, id_, lambda found: found["share"] == 50)
    catalog, quarantine = site.services.publishing.catalog, site.services.publishing.quarantine
    await quarantine.put(await catalog.version("acme", "a", 1), "it made NaN")
    held = await until(site, id_, lambda found: found["state"] == "held")
    assert (held["held_by"], held["share"]) == ("server", 50)
    await quarantine.release("acme", "a", 1)
    await quarantine.put(await catalog.version("acme", "a", 2), "it made NaN")
    ended = await until(site, id_, has_ended)
    assert ended["reason"] == "the new version is out of service: it made NaN"
    assert await adapter(site) == (1, None)


async def upload(site: Site, seed: int, key: str = "", **query: str) -> Any:
    files = {path.name: path.read_bytes() for path in tiny.adapter(seed).iterdir() if "adapter" in path.name}
    headers = {"Idempotency-Key": key} if key else {}
    return await site.admin.post(f"{ADAPTER}/versions", params=query, files=files, headers=headers)


async def test_an_upload_begins_one(site: Site) -> None:
    await site.tenant("acme")
    first = (await upload(site, 1, rollout="standard")).json()
    assert (first["live"], first["rollout"]) == (1, None), "there is nothing to compare it with"
    second = (await upload(site, 2, rollout="standard")).json()
    assert (second["live"], second["rollout"]["version"], second["rollout"]["state"]) == (1, 2, "running")
    error(await upload(site, 3, rollout="standard"), 409, "rollout_running")
    await site.admin.patch(f"{ROLLOUTS}/{second['rollout']['id']}", json={"action": "roll_back"})
    later = (await upload(site, 3, rollout="standard", wait="false")).json()

    async def job() -> Any:
        return (await site.admin.get(f"{ADAPTER}/uploads/{later['id']}")).json()

    async with asyncio.timeout(120):
        while (done := await job())["state"] != "done":
            await asyncio.sleep(0.1)
    assert (done["result"]["live"], done["result"]["rollout"]["version"]) == (1, 3)
    error(await upload(site, 4, rollout="daring"), 422, "invalid_request", "query.rollout")


async def test_an_upload_that_is_repeated_has_the_rollout_that_it_began(site: Site) -> None:
    await site.tenant("acme", {"a": tiny.adapter(1)})
    begun = await upload(site, 2, "once", rollout="standard")
    assert begun.json()["rollout"]["state"] == "running"
    again = await upload(site, 2, "once", rollout="standard")
    assert again.status_code == 201, again.text
    assert again.json()["rollout"]["id"] == begun.json()["rollout"]["id"]
    error(await upload(site, 3, "once", rollout="standard"), 409, "idempotency_conflict", "Idempotency-Key")
    error(await upload(site, 3, "twice", rollout="standard"), 409, "rollout_running")


async def test_an_upload_whose_version_is_gone_begins_none_beside_another(site: Site) -> None:
    await site.tenant("acme", {"a": tiny.adapter(1)})
    first = (await upload(site, 2, "once", rollout="standard")).json()
    await site.admin.patch(f"{ROLLOUTS}/{first['rollout']['id']}", json={"action": "roll_back"})
    assert (await site.admin.delete(f"{ADAPTER}/versions/2")).status_code == 204
    other = (await upload(site, 3, "twice", rollout="standard")).json()
    error(await upload(site, 2, "once", rollout="standard"), 409, "rollout_running")
    await site.admin.patch(f"{ROLLOUTS}/{other['rollout']['id']}", json={"action": "roll_back"})
    again = (await upload(site, 2, "once", rollout="standard")).json()
    assert (again["version"], again["rollout"]["version"], again["rollout"]["state"]) == (4, 4, "running")


async def test_of_two_who_decide_one_does(site: Site) -> None:
    """Both have seen the same state; what the second one wants would overwrite what the first one did."""
    await two_versions(site)
    id_ = await begun(site)
    await until(site, id_, lambda found: found["share"] == 50)
    judge: Judge = site.services.judge
    rows = judge.rows
    stored = await rows.get("acme", "a", id_)
    one, two = await asyncio.gather(
        *(judge.act("acme", "a", id_, action) for action in ("roll_back", "forward")), return_exceptions=True
    )
    refused = [found for found in (one, two) if isinstance(found, Exception)]
    assert [getattr(found, "code", None) for found in refused] in ([], ["rollout_ended"])
    assert await judge.look(stored) is None, "it was looked at as it is no more"
    ended = await rows.get("acme", "a", id_)
    assert await adapter(site) == ((2, None) if ended.state == "completed" else (1, None))


async def test_it_goes_on_after_a_restart(tmp_path: Path) -> None:
    async with fake_site(tmp_path, FakeEngine(tiny.base())) as site:
        key = await two_versions(site)
        id_ = await begun(site)
        await until(site, id_, lambda found: found["share"] == 50)

        for _ in range(10):  # too few to decide
            await site.chat(key, "hi", model="a", max_tokens=2)
        before = await until(site, id_, lambda found: found["numbers"]["new"]["requests"])
        assert before["state"] == "running"
    async with fake_site(tmp_path, FakeEngine(tiny.base())) as site:

        async def again(number: int) -> None:
            await site.chat(key, "hi", model="a", max_tokens=2)

        ended = await until(site, id_, has_ended, again)
    assert ended["state"] == "completed"
    assert ended["numbers"]["new"]["requests"] > before["numbers"]["new"]["requests"]
    assert [decision["action"] for decision in ended["decisions"]] == ["start", "complete"]


async def test_of_several_gateways_one_decides_until_it_is_gone(site: Site) -> None:
    await two_versions(site)
    await begun(site)
    judge, replicas = site.services.judge, site.services.replicas
    first, second = Runner(judge, replicas), Runner(judge, replicas)
    await first.look()
    await second.look()
    assert (first.decides, second.decides) == (True, False)
    await first.stop()
    await second.look()
    assert second.decides
    await second.stop()
