"""``Idempotency-Key`` over real HTTP: an upload that is repeated happens once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select, update

from adapters.database import rows
from adapters.database.rows import UploadRow, now
from adapters.store import catalog, idempotency
from tests.service.http.test_api import engine_of, error
from tests.service.publishing.test_upload import URL, blobs, files
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.site import Site
from tests.support.tiny import fake_site

ADAPTER = URL.removesuffix("/versions")

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path, FakeEngine(tiny.base(), times=Times(step=0.005))) as site:
        await site.admin.post("/admin/v1/tenants", json={"id": "acme"})
        yield site


async def upload(site: Site, key: str, seed: int = 1, url: str = URL, **changes: bytes) -> httpx.Response:
    sent: dict[str, Any] = {**files(seed), **changes}
    return await site.admin.post(url, files=sent, headers={"Idempotency-Key": key})


async def versions(site: Site, name: str = "a") -> list[int]:
    shown = (await site.admin.get(f"/admin/v1/tenants/acme/adapters/{name}")).json()
    return [version["version"] for version in shown.get("versions", [])]


async def test_the_same_key_and_body_get_the_same_answer(site: Site, tmp_path: Path) -> None:
    first = await upload(site, "one")
    calls = len(engine_of(site).calls)
    again = await upload(site, "one")
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json()
    assert await versions(site) == [1]
    assert len(engine_of(site).calls) == calls, "nothing was done"
    assert len(blobs(tmp_path)) == 1
    await upload(site, "two", seed=2)
    assert (await upload(site, "one")).json()["live"] == 1, "what was said then, not what is now"
    other = await upload(site, "three")
    assert other.json()["version"] == 3, "another key is another upload"


@pytest.mark.parametrize("jump", [timedelta(days=1, minutes=1), timedelta(days=-1)])
async def test_a_clock_that_jumps_repeats_no_upload(
    site: Site, jump: timedelta, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await upload(site, "one")

    def jumped() -> datetime:
        return datetime.now(UTC) + jump

    for module in (rows, catalog):
        monkeypatch.setattr(module, "now", jumped)
    again = await upload(site, "one")
    assert again.json() == first.json()
    assert (await upload(site, "two", seed=2)).status_code == 201, "what is kept then goes by age"
    assert (await upload(site, "one")).json() == first.json()
    assert await versions(site) == [1, 2]


async def test_the_same_key_for_something_else_is_a_conflict(site: Site) -> None:
    await upload(site, "one")
    for other in (
        await upload(site, "one", seed=2),
        await upload(site, "one", url=URL.replace("/a/", "/b/")),
        await upload(site, "one", url=f"{URL}?allow_no_effect=true"),
        await upload(site, "one", url=f"{URL}?note=second"),
        await upload(site, "one", url=f"{URL}?rollout=standard"),
    ):
        said = error(other, 409, "idempotency_conflict", "Idempotency-Key")
        assert "new" in said["message"]
    await upload(site, "two", seed=2, url=f"{URL}?note=first")
    error(await upload(site, "two", seed=2), 409, "idempotency_conflict", "Idempotency-Key")
    assert await versions(site) == [1, 2]
    assert await versions(site, "b") == []


@pytest.mark.parametrize("asked", ["note=first", "rollout=standard", "note=first&rollout=standard"])
async def test_what_an_earlier_release_kept_is_answered(site: Site, asked: str) -> None:
    """Its receipts are as those of an upload without note and rollout; the version tells of both."""
    await upload(site, "first")
    await upload(site, "bare", seed=2)
    made = await upload(site, "one", seed=2, url=f"{URL}?{asked}")
    bare = select(UploadRow.fingerprint).where(UploadRow.key == "bare").scalar_subquery()
    async with site.services.database.write() as session:
        await session.execute(update(UploadRow).where(UploadRow.key == "one").values(fingerprint=bare))
    again = await upload(site, "one", seed=2, url=f"{URL}?{asked}")
    assert (made.status_code, again.status_code) == (201, 201)
    progress = {"rollout": None}  # which goes on
    assert again.json() | progress == made.json() | progress
    for other in ("note=second", "note=second&rollout=standard", f"{asked}&allow_no_effect=true"):
        refused = await upload(site, "one", seed=2, url=f"{URL}?{other}")
        error(refused, 409, "idempotency_conflict", "Idempotency-Key")
    assert await versions(site) == [1, 2, 3]


async def test_keys_are_each_tenants_own(site: Site) -> None:
    await site.admin.post("/admin/v1/tenants", json={"id": "zeta"})
    await upload(site, "one")
    other = await upload(site, "one", seed=2, url=URL.replace("acme", "zeta"))
    assert other.status_code == 201
    assert other.json()["digest"] != (await upload(site, "one")).json()["digest"]
    await site.admin.delete("/admin/v1/tenants/zeta")
    await site.admin.post("/admin/v1/tenants", json={"id": "zeta"})
    anew = await upload(site, "one", seed=3, url=URL.replace("acme", "zeta"))
    assert (anew.status_code, anew.json()["version"]) == (201, 1)


async def test_a_refusal_may_be_tried_again(site: Site) -> None:
    refused = await upload(site, "one", **{"README.md": b"x"})
    assert refused.status_code == 422
    assert (await upload(site, "one")).status_code == 201


async def test_several_at_once_are_one(site: Site) -> None:
    made = await asyncio.gather(*(upload(site, "one") for _ in range(4)))
    assert [one.status_code for one in made] == [201] * 4
    assert all(one.json() == made[0].json() for one in made)
    assert await versions(site) == [1]
    both = await asyncio.gather(upload(site, "two", seed=2), upload(site, "two", seed=3))
    assert sorted(one.status_code for one in both) == [201, 409]
    assert await versions(site) == [1, 2]


async def test_a_day_later_it_is_forgotten(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    await upload(site, "old")
    await upload(site, "young", seed=2)
    database = site.services.database
    async with database.write() as session:
        past = update(UploadRow).where(UploadRow.key == "old")
        await session.execute(
            past.values(created_at=now() - idempotency.IDEMPOTENCY_TTL - timedelta(minutes=1))
        )
    anew = await upload(site, "old", seed=3)
    assert (anew.status_code, anew.json()["version"]) == (201, 3)
    assert (await upload(site, "young", seed=2)).json()["version"] == 2
    async with database.write() as session:
        await session.execute(update(UploadRow).values(created_at=now() - 2 * idempotency.IDEMPOTENCY_TTL))
    await upload(site, "new", seed=4)
    async with database.read() as session:
        assert await session.scalar(select(func.count()).select_from(UploadRow)) == 1, "the rest is pruned"


async def test_it_outlives_a_restart(tmp_path: Path) -> None:
    async with fake_site(tmp_path) as site:
        await site.admin.post("/admin/v1/tenants", json={"id": "acme"})
        first = (await upload(site, "one")).json()
    async with fake_site(tmp_path) as site:
        assert (await upload(site, "one")).json() == first
        assert await versions(site) == [1]


async def test_what_is_deleted_comes_again(site: Site) -> None:
    first = await upload(site, "one")
    assert (await site.admin.delete(ADAPTER)).status_code == 204
    again = await upload(site, "one")
    assert (again.status_code, again.json()["version"]) == (201, 2)
    assert again.json()["digest"] == first.json()["digest"]
    assert await versions(site) == [2]
    assert (await upload(site, "one")).json() == again.json(), "which is now kept"
    assert await versions(site) == [2]
    refused = await upload(site, "one", seed=2)
    error(refused, 409, "idempotency_conflict", "Idempotency-Key")


async def test_a_version_that_is_deleted_comes_again(site: Site) -> None:
    await upload(site, "one")
    await upload(site, "two", seed=2)
    assert (await site.admin.delete(f"{ADAPTER}/versions/1")).status_code == 204
    assert (await upload(site, "one")).json()["version"] == 3
    assert (await upload(site, "two", seed=2)).json()["version"] == 2
    assert await versions(site) == [2, 3]


async def test_a_version_that_made_room_comes_again(site: Site) -> None:
    await upload(site, "one")
    await site.admin.patch(ADAPTER, json={"keep_versions": 1})
    await upload(site, "two", seed=2)
    assert await versions(site) == [2]
    assert (await upload(site, "one")).json()["version"] == 3
    assert await versions(site) == [3]


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "ä".encode("latin-1").decode("latin-1")])
async def test_keys_that_cannot_be(site: Site, key: str) -> None:
    sent = [(b"Idempotency-Key", key.encode("latin-1"))]
    refused = await site.admin.post(URL, files=files(), headers=sent)
    error(refused, 422, "invalid_request", "header.idempotency-key")
    assert await versions(site) == []
