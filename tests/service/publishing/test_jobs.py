"""Uploads that are answered before their end, refused ones that are kept, downloads, notes, percentiles."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from adapters.database.rows import UploadJobRow, now
from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from adapters.store.upload_jobs import ALIVE, KEPT, UploadJobs
from tests.service.http.test_api import error
from tests.service.http.test_selfservice import owner
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.site import Site
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

ACME = "/admin/v1/tenants/acme"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path, FakeEngine(tiny.base(), times=Times(step=0.05))) as site:
        await site.tenant("acme")
        yield site


def files(seed: int) -> dict[str, bytes]:
    return {n: (tiny.adapter(seed) / n).read_bytes() for n in (CONFIG_FILE, WEIGHTS_FILE)}


async def later(site: Site, given: dict[str, bytes], **options: Any) -> httpx.Response:
    params = options.pop("params", {"wait": "false"})
    return await site.admin.post(f"{ACME}/adapters/a/versions", files=given, params=params, **options)


async def ended(site: Site, place: str) -> dict[str, Any]:
    """The job at its end."""
    async with asyncio.timeout(120):
        while True:
            job: dict[str, Any] = (await site.admin.get(place)).json()
            if job["state"] in ("done", "refused"):
                return job
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "asked", [{"params": {"wait": "false"}}, {"params": {}, "headers": {"Prefer": "respond-async"}}]
)
async def test_an_upload_goes_on_after_its_answer(site: Site, asked: dict[str, Any]) -> None:
    prober, go_on = site.services.publishing.prober, asyncio.Event()
    probe = prober.probe

    async def seen_first(*args: object) -> object:
        await go_on.wait()
        return await probe(*args)

    prober.probe = seen_first
    accepted = await later(site, files(1), **asked)
    assert accepted.status_code == 202, accepted.text
    job = accepted.json()
    async with asyncio.timeout(120):
        while (await site.admin.get(accepted.headers["Location"])).json()["state"] != "probing":
            await asyncio.sleep(0.01)
    go_on.set()
    assert accepted.headers["Location"] == f"{ACME}/adapters/a/uploads/{job['id']}"
    assert job["state"] in ("inspecting", "probing", "linking")
    assert job["received_bytes"] == sum(map(len, files(1).values()))
    done = await ended(site, accepted.headers["Location"])
    assert (done["state"], done["error"], done["by"]) == ("done", None, "admin")
    assert (done["result"]["version"], done["result"]["live"]) == (1, 1)
    assert (await site.admin.get(f"{ACME}/adapters/a")).json()["live"] == 1
    error(await site.admin.get(f"{ACME}/adapters/b/uploads/{job['id']}"), 404, "upload_not_found")
    error(await site.admin.get(f"{ACME}/adapters/a/uploads/nonsense"), 404, "upload_not_found")


async def test_what_is_wrong_with_the_body_is_said_at_once_and_the_rest_later(site: Site) -> None:
    broken = await site.admin.post(
        f"{ACME}/adapters/a/versions", content=b"x", headers={"Content-Type": "text/plain"},
        params={"wait": "false"},
    )  # fmt: skip
    assert broken.status_code == 400
    accepted = await later(site, files(1) | {CONFIG_FILE: b"{}"})
    job = await ended(site, accepted.headers["Location"])
    assert (job["state"], job["result"]) == ("refused", None)
    at_once = await site.admin.post(f"{ACME}/adapters/a/versions", files=files(1) | {CONFIG_FILE: b"{}"})
    told = at_once.json()["error"]
    assert job["error"] == {"code": told["code"], "message": told["message"]}


async def test_refused_uploads_are_kept_with_their_reason(site: Site) -> None:
    async with await owner(site, "zeta") as client:
        for number in range(3):
            answer = await client.post(
                f"/v1/adapters/a{number}/versions", files=files(1) | {CONFIG_FILE: b"{}"}
            )
            assert answer.status_code == 422
        own = (await client.get("/v1/adapters/a0/uploads")).json()["data"]
        assert [row["state"] for row in own] == ["refused"]
        assert own[0]["error"]["code"] == answer.json()["error"]["code"]
        assert own[0]["by"].startswith("key ")
        assert (await client.get(f"/v1/adapters/a0/uploads/{own[0]['id']}")).json() == own[0]
        error(await client.get(f"/v1/adapters/a1/uploads/{own[0]['id']}"), 404, "upload_not_found")
    whole = (await site.admin.get("/admin/v1/uploads", params={"state": "refused"})).json()
    assert [row["adapter"] for row in whole["data"]] == ["a2", "a1", "a0"]
    first = (await site.admin.get("/admin/v1/uploads", params={"limit": 2})).json()
    rest = (await site.admin.get("/admin/v1/uploads", params={"limit": 2, "after": first["next"]})).json()
    assert [*first["data"], *rest["data"]] == whole["data"]
    assert (await site.admin.get("/admin/v1/uploads", params={"tenant": "acme"})).json()["data"] == []
    a0, a1 = (f"/admin/v1/tenants/zeta/adapters/{name}/uploads" for name in ("a0", "a1"))
    for url, after in (
        ("/admin/v1/uploads", "x"),
        ("/admin/v1/uploads", "0" * 32),
        ("/admin/v1/uploads?tenant=acme", first["next"]),
        (a1.replace("zeta", "acme"), own[0]["id"]),
        (a1, own[0]["id"]),
    ):
        strange = await site.admin.get(url, params={"after": after, **dict(httpx.URL(url).params)})
        error(strange, 404, "upload_not_found", "after")
    assert (await site.admin.get(a0, params={"after": own[0]["id"]})).json()["data"] == []


async def test_no_more_than_so_many_are_kept_and_a_lost_one_says_so(site: Site) -> None:
    jobs: UploadJobs = site.services.publishing.jobs
    for number in range(KEPT + 5):
        await jobs.refused("acme", f"a{number}", "some_code", "some\0 reason")
    found = (await site.admin.get("/admin/v1/uploads", params={"limit": 1000})).json()["data"]
    assert len(found) == KEPT
    assert found[0]["adapter"] == f"a{KEPT + 4}"
    lost = await jobs.begin("acme", "b")
    assert (await jobs.get("acme", "b", lost))["state"] == "receiving"
    async with site.services.database.append() as session:
        old = now() - 2 * ALIVE
        await session.execute(update(UploadJobRow).where(UploadJobRow.id == lost).values(updated_at=old))
    told = await jobs.get("acme", "b", lost)
    assert (told["state"], told["error"]["code"]) == ("refused", "upload_interrupted")
    with jobs.worked_on(lost):
        assert (await jobs.get("acme", "b", lost))["state"] == "receiving", "it stood still, and goes on"
        found = (await site.admin.get("/admin/v1/uploads", params={"limit": 1})).json()["data"]
        assert found[0]["state"] == "receiving"


async def test_who_uploaded_and_a_note_are_kept_with_a_version(site: Site) -> None:
    async with await owner(site, "zeta") as client:
        key = (await client.get("/v1/me")).json()["key"]["id"]
        made = await client.post("/v1/adapters/a/versions", files=files(1), params={"note": "first try"})
        assert made.status_code == 201
        (version,) = (await client.get("/v1/adapters/a")).json()["versions"]
        assert (version["uploader"], version["note"]) == (f"key {key}", "first try")
        changed = await client.patch("/v1/adapters/a/versions/1", json={"note": "the good one"})
        assert changed.json()["versions"][0]["note"] == "the good one"
        error(
            await client.patch("/v1/adapters/a/versions/1", json={"quarantined": False}),
            403, "permission_denied", "quarantined",
        )  # fmt: skip
        error(await client.patch("/v1/adapters/a/versions/9", json={"note": "x"}), 404, "version_not_found")
    path = "/admin/v1/tenants/zeta/adapters/a/versions/1"
    assert (await site.admin.patch(path, json={"note": None})).json()["versions"][0]["note"] is None
    assert (await site.admin.patch(path, json={})).status_code == 422
    noted = (await site.admin.get("/admin/v1/audit", params={"action": "version.note"})).json()["data"]
    assert [(entry["before"]["note"], entry["after"]["note"]) for entry in noted] == [
        ("the good one", None), ("first try", "the good one")
    ]  # fmt: skip


async def test_a_version_is_downloaded_as_it_was_uploaded(site: Site) -> None:
    async with await owner(site, "zeta") as client:
        await client.post("/v1/adapters/a/versions", files=files(1))
        answer = await client.get("/v1/adapters/a/versions/1/download")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-tar")
        assert int(answer.headers["content-length"]) == len(answer.content)
        with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
            found = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        assert found[WEIGHTS_FILE] == files(1)[WEIGHTS_FILE]
        assert json.loads(found[CONFIG_FILE])["r"] == 2
        again = await client.post(
            "/v1/adapters/b/versions", content=answer.content, headers={"Content-Type": "application/x-tar"}
        )
        assert again.status_code == 201, "what is downloaded can be uploaded"
        error(await client.get("/v1/adapters/a/versions/2/download"), 404, "version_not_found")
    error(await site.admin.get(f"{ACME}/adapters/a/versions/1/download"), 404, "adapter_not_found")
    admins = await site.admin.get("/admin/v1/tenants/zeta/adapters/a/versions/1/download")
    assert admins.content == answer.content


async def test_customers_warm_and_verify_one_at_a_time(site: Site) -> None:
    async with await owner(site, "zeta") as client:
        await client.post("/v1/adapters/a/versions", files=files(1))
        warmed = await client.post("/v1/adapters/a/warm")
        assert warmed.json()["tier"] in ("host", "gpu")
        error(await client.post("/v1/adapters/a/warm", json={"slot": True}), 403, "permission_denied", "slot")
        error(await client.post("/v1/adapters/a/verify"), 404, "probes_not_found")
        site.services.busy.add("zeta")
        error(await client.post("/v1/adapters/a/warm"), 429, "rate_limit_exceeded")


async def test_usage_tells_how_long_requests_took(site: Site) -> None:
    key = await site.tenant("zeta")
    for tokens in (1, 1, 1, 6):
        await site.chat(key, "hi", model=tiny.NAME, max_tokens=tokens)
    asked = {"percentiles": "true", "by": "tenant"}
    (row,) = (await site.admin.get("/admin/v1/usage", params=asked)).json()["data"]
    single = (await site.admin.get("/admin/v1/requests", params={"tenant": "zeta"})).json()["data"]
    took = sorted(one["seconds"] for one in single)
    assert took[0] > 0.04, "a step"
    assert took[-1] > 0.24, "six"
    assert row["seconds_p50"] == pytest.approx(took[1], abs=2e-3)
    assert row["seconds_p95"] == row["seconds_p99"] == pytest.approx(took[-1], abs=2e-3)
    assert row["queue_seconds_p50"] <= row["first_token_seconds_p50"] <= row["seconds_p50"]
    csv = await site.admin.get("/admin/v1/usage", params={**asked, "format": "csv"})
    assert "seconds_p95" in csv.text.splitlines()[0]
    (plain,) = (await site.admin.get("/admin/v1/usage", params={"by": "tenant"})).json()["data"]
    assert "seconds_p50" not in plain
    by_day = (await site.admin.get("/admin/v1/usage", params={**asked, "by": "day,tenant"})).json()["data"]
    assert by_day[0]["seconds_p50"] == row["seconds_p50"]


async def test_residency_names_versions_and_comes_as_a_stream(site: Site) -> None:
    key = await site.tenant("zeta", {"a": tiny.adapter(1)})
    await site.chat(key, "hi", max_tokens=1)
    found = (await site.admin.get("/admin/v1/residency")).json()
    assert ("zeta", "a@1") in [(slot["tenant"], slot["name"]) for slot in found["slots"]]
    assert [(entry["tenant"], entry["name"]) for entry in found["host"]] == [("zeta", "a@1")]
    events = []
    async with site.admin.stream(
        "GET", "/admin/v1/residency", params={"every": 0.2}, headers={"Accept": "text/event-stream"}
    ) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        async for line in stream.aiter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line.removeprefix("data: ")))
                if len(events) == 1:
                    await site.upload("zeta", "b", tiny.adapter(2))
                elif {"a@1", "b@1"} <= {entry["name"] for entry in events[-1]["host"]}:
                    break
                assert len(events) < 50
    for look in (found, *events):
        assert look.pop("rates")["seconds"] >= 0
    assert events[0] == found
