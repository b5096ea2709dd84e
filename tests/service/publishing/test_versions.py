"""Canaries and retention, over real HTTP: which version answers whom, and which versions go."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from adapters.errors import DatabaseUnavailable
from adapters.split import choose
from server.publishing import publish
from tests.service.http.test_admin import TENANTS, ask_first, eventually, residency
from tests.service.http.test_api import CHAT, CHAT_URL, engine_of, error
from tests.service.publishing.test_upload import blobs
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

ADAPTER = f"{TENANTS}/acme/adapters/a"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    engine = FakeEngine(tiny.base(), gpu_slots=4, host_slots=8, times=Times(step=0.002))
    async with fake_site(tmp_path, engine, gpu_slots=4, host_slots=8) as site:
        yield site


async def upload(site: Site, *seeds: int) -> list[str]:
    """Versions of ``a``; their digests."""
    made = [(await site.upload("acme", "a", tiny.adapter(seed))).json() for seed in seeds]
    return [one["digest"] for one in made]


async def numbers(site: Site) -> list[int]:
    return [version["version"] for version in (await site.admin.get(ADAPTER)).json()["versions"]]


# --- canaries -----------------------------------------------------------------------------------------


async def test_a_split_divides_the_users_and_keeps_each_where_it_is(site: Site) -> None:
    key = await site.tenant("acme")
    digests = await upload(site, 1, 2)
    assert (await site.admin.get(ADAPTER)).json()["split"] is None
    changed = await site.admin.patch(ADAPTER, json={"split": {"1": 70, "2": 30}})
    assert changed.status_code == 200, changed.text
    assert changed.json()["split"] == {"1": 70, "2": 30}
    assert changed.json()["live"] == 2
    assert (await site.admin.get(ADAPTER)).json() == changed.json()

    users = [f"user-{i}" for i in range(60)]
    answered = {user: await ask_first(site, key, model="a", user=user) for user in users}
    assert {await ask_first(site, key, model="default", user=users[0])} == {answered[users[0]]}
    count = Counter(answered.values())
    assert set(count) == set(digests)
    assert 30 <= count[digests[0]] <= 54
    assert answered == {user: await ask_first(site, key, user=user) for user in users}
    for number, digest in enumerate(digests, 1):
        pinned = {await ask_first(site, key, model=f"a@{number}", user=user) for user in users[:5]}
        assert pinned == {digest}

    await site.admin.patch(ADAPTER, json={"split": {"1": 40, "2": 60}})
    grown = {user: await ask_first(site, key, user=user) for user in users}
    assert all(grown[user] == digests[1] for user in users if answered[user] == digests[1])
    assert grown != answered


async def test_without_a_user_each_request_is_one_of_its_own(site: Site) -> None:
    key = await site.tenant("acme")
    digests = await upload(site, 1, 2)
    await site.admin.patch(ADAPTER, json={"split": {"1": 50, "2": 50}})
    assert {await ask_first(site, key) for _ in range(40)} == set(digests)
    error(await site.chat(key, "hi", user=["a"]), 400, "invalid_request", "user")


async def test_a_split_ends_by_null_by_going_live_and_by_an_upload(site: Site) -> None:
    key = await site.tenant("acme")
    digests = await upload(site, 1, 2)
    split = {"split": {"1": 50, "2": 50}}

    async def all_say() -> set[str]:
        return {await ask_first(site, key, user=str(user)) for user in range(20)}

    await site.admin.patch(ADAPTER, json=split)
    assert len(await all_say()) == 2
    assert (await site.admin.patch(ADAPTER, json={"split": None})).json()["split"] is None
    assert await all_say() == {digests[1]}
    await site.admin.patch(ADAPTER, json=split)
    ended = (await site.admin.patch(ADAPTER, json={"live": 1})).json()
    assert (ended["split"], ended["live"]) == (None, 1)
    assert await all_say() == {digests[0]}
    await site.admin.patch(ADAPTER, json=split)
    (third,) = await upload(site, 3)
    assert await all_say() == {third}
    assert (await site.admin.get(ADAPTER)).json()["split"] is None


async def test_a_version_of_a_split_stays(site: Site) -> None:
    await site.tenant("acme")
    await upload(site, 1, 2, 3)
    await site.admin.patch(ADAPTER, json={"split": {"1": 90, "2": 10}})
    said = error(await site.admin.delete(f"{ADAPTER}/versions/1"), 409, "adapter_conflict")
    assert "split" in said["message"]
    error(await site.admin.delete(f"{ADAPTER}/versions/3"), 409, "adapter_conflict")
    await site.admin.patch(ADAPTER, json={"split": None})
    assert (await site.admin.delete(f"{ADAPTER}/versions/1")).status_code == 204


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two_versions(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """A server for calls that change nothing."""
    async with fake_site(tmp_path_factory.mktemp("versions")) as site:
        await site.tenant("acme")
        await upload(site, 1, 2)
        yield site


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"split": {"1": 90, "2": 11}}, 422),
        ({"split": {"1": 101, "2": -1}}, 422),
        ({"split": {"1": 100, "2": 0}}, 422),
        ({"split": {"1": 50.5, "2": 49.5}}, 422),
        ({"split": {"1": "50", "2": "50"}}, 422),
        ({"split": {"1": True, "2": 99}}, 422),
        ({"split": {}}, 422),
        ({"split": {"01": 50, "2": 50}}, 422),
        ({"split": {"one": 50, "2": 50}}, 422),
        ({"split": {"9999999999": 50, "2": 50}}, 422),
        ({"split": [90, 10]}, 422),
        ({"split": {"1": 50, "2": 50}, "live": 1}, 422),
        ({"split": {"1": 50, "3": 50}}, 404),
        ({"keep_versions": -1}, 422),
        ({"keep_versions": "3"}, 422),
        ({"keep_versions": 2**31}, 422),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_splits_that_cannot_be(two_versions: Site, body: dict[str, object], status: int) -> None:
    site = two_versions
    before = (await site.admin.get(ADAPTER)).json()
    refused = await site.admin.patch(ADAPTER, json=body)
    assert refused.status_code == status, refused.text
    assert refused.json()["error"]["code"] == ("version_not_found" if status == 404 else "invalid_request")
    assert (await site.admin.get(ADAPTER)).json() == before


async def test_a_pinned_adapter_has_all_of_its_split_in_memory(tmp_path: Path) -> None:
    async with fake_site(tmp_path, gpu_slots=2, host_slots=8) as site:
        await site.tenant("acme")
        digests = await upload(site, 1, 2, 3)
        await site.admin.patch(ADAPTER, json={"pinned": True, "split": {"1": 50, "2": 50}})
        assert await pins(site) == set(digests[:2])
    async with fake_site(tmp_path, gpu_slots=2, host_slots=8) as site:
        async with asyncio.timeout(60):
            while await pins(site) != set(digests[:2]):
                await asyncio.sleep(0.02)
        await site.admin.patch(ADAPTER, json={"live": 3})
        async with asyncio.timeout(60):
            while await pins(site) != {digests[2]}:
                await asyncio.sleep(0.02)


async def pins(site: Site) -> set[str]:
    return {e["version"].partition("@")[2] for e in (await residency(site))["host"] if e["pinned"]}


@pytest.mark.parametrize("shares", [((1, 90), (2, 10)), ((1, 1), (2, 1), (3, 98))])
def test_everyone_is_somewhere_and_shares_are_as_large_as_they_say(
    shares: tuple[tuple[int, int], ...],
) -> None:
    chosen = Counter(choose(shares, "t/a", f"u{i}") for i in range(20_000))
    for number, share in shares:
        assert chosen[number] / 200 == pytest.approx(share, abs=1)
    assert choose(shares, "t/a", "\ud800") in chosen, "a lone surrogate is a name too"


def test_another_adapter_divides_the_same_users_in_another_way() -> None:
    half = ((1, 50), (2, 50))
    same = sum(choose(half, "t/a", f"u{i}") == choose(half, "t/b", f"u{i}") for i in range(2000))
    assert same / 2000 == pytest.approx(0.5, abs=0.05)


# --- retention ----------------------------------------------------------------------------------------


async def test_an_upload_pushes_out_the_oldest_versions(site: Site, tmp_path: Path) -> None:
    key = await site.tenant("acme")
    digests = await upload(site, 1, 2, 3)
    assert (await site.admin.get(ADAPTER)).json()["keep_versions"] is None
    changed = await site.admin.patch(ADAPTER, json={"keep_versions": 2})
    assert changed.json()["keep_versions"] == 2
    assert await numbers(site) == [1, 2, 3], "not before the next upload"
    digests += await upload(site, 4)
    assert await numbers(site) == [3, 4]
    error(await site.chat(key, "hi", model="a@2"), 404, "model_not_found", "model")
    for digest in digests[:2]:
        await eventually(site, tmp_path / "blobs" / digest)
    assert blobs(tmp_path) == sorted(digests[2:])
    assert await ask_first(site, key, model="a@3") == digests[2]
    await site.admin.patch(ADAPTER, json={"keep_versions": None})
    await upload(site, 5)
    assert await numbers(site) == [3, 4, 5]


async def test_a_running_request_finishes_on_a_version_that_goes(site: Site, tmp_path: Path) -> None:
    key = await site.tenant("acme")
    (digest,) = await upload(site, 1)
    await site.admin.patch(ADAPTER, json={"keep_versions": 1})
    body = {**CHAT, "max_tokens": 400, "stream": True}
    times = engine_of(site).times
    times.step = 0.1
    async with site.http.stream("POST", CHAT_URL, json=body, headers=bearer(key)) as stream:
        lines = stream.aiter_lines()
        await anext(lines)
        await upload(site, 2)
        assert await numbers(site) == [2]
        assert (tmp_path / "blobs" / digest).exists()
        times.step = 0.001
        rest = "".join([line async for line in lines])
    assert '" 399"' in rest
    await eventually(site, tmp_path / "blobs" / digest)


async def test_what_answers_is_kept_however_old(site: Site) -> None:
    await site.tenant("acme")
    await upload(site, 1, 2, 3)
    await site.admin.patch(ADAPTER, json={"keep_versions": 1})
    catalog = site.services.publishing.catalog
    await site.admin.patch(ADAPTER, json={"live": 1})
    await site.admin.patch(ADAPTER, json={"split": {"2": 100}})
    assert [version.number for version in await catalog.keep_newest("acme", "a", 1)] == []
    await site.admin.patch(ADAPTER, json={"split": None})
    assert [version.number for version in await catalog.keep_newest("acme", "a", 1)] == [2]
    assert await numbers(site) == [1, 3]


async def test_the_same_bytes_under_a_newer_number_are_kept(site: Site, tmp_path: Path) -> None:
    key = await site.tenant("acme")
    await upload(site, 1)
    await site.admin.patch(ADAPTER, json={"keep_versions": 1})
    (digest,) = await upload(site, 1)
    assert await numbers(site) == [2]
    async with asyncio.timeout(60):
        while site.services.tasks:
            await asyncio.sleep(0.01)
    assert blobs(tmp_path) == [digest]
    assert await ask_first(site, key) == digest


async def test_the_servers_setting_holds_unless_the_adapter_says_otherwise(tmp_path: Path) -> None:
    async with fake_site(tmp_path, keep_versions=2) as site:
        await site.tenant("acme")
        await upload(site, 1, 2, 3)
        assert await numbers(site) == [2, 3]
        await site.admin.patch(ADAPTER, json={"keep_versions": 0})
        await upload(site, 4, 5)
        assert await numbers(site) == [2, 3, 4, 5]
        await site.admin.delete(ADAPTER)
        await upload(site, 1, 2, 3)
        assert await numbers(site) == [7, 8], "a new adapter of the name has settings of its own"


async def test_a_deleted_version_leaves_memory_once_the_database_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The delete is on record, and the look at what else has its bytes fails."""
    monkeypatch.setattr(publish, "RETRY_S", 0.01)
    async with fake_site(tmp_path) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        assert (await site.admin.patch(ADAPTER, json={"pinned": True})).status_code == 200
        assert (await site.chat(key, "hi", model="a")).status_code == 200
        catalog, tries = site.services.publishing.catalog, 0
        look = catalog.of_files

        async def away(*asked: Any) -> Any:
            nonlocal tries
            tries += 1
            if tries < 4:
                raise DatabaseUnavailable("The database does not answer.")
            return await look(*asked)

        monkeypatch.setattr(type(catalog), "of_files", lambda _, *asked: away(*asked))
        assert (await site.admin.delete(ADAPTER)).status_code == 204
        async with asyncio.timeout(60):
            while list((tmp_path / "blobs").iterdir()) or (await site.services.engine.report()).host:
                await asyncio.sleep(0.05)
        assert tries >= 4
