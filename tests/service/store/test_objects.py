"""Blobs in an object store, and the part of it that a data folder holds."""

from __future__ import annotations

import asyncio
import os
import socket
import time
import types
from pathlib import Path

import pytest

from adapters.errors import AdapterUnfit, BlobMissing, StorageFailed, StoreUnavailable
from adapters.model import CONFIG_FILE, WEIGHTS_FILE, Version
from adapters.store import objects as objects_module
from adapters.store.blobs import BlobStore
from adapters.store.cache import Cache
from adapters.store.digests import digest_of
from adapters.store.fitness import Fitness, Serving
from adapters.store.objects import ObjectStore, WrongStore, check_url
from tests.support.object_stores import KINDS, S3, url_of
from tests.support.world import BASE

DIGEST = "a" * 64


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, s3: S3, tmp_path: Path) -> ObjectStore:
    return ObjectStore(url_of(request.param, s3, tmp_path))


def files(folder: Path, size: int = 100) -> str:
    """The two files of an adapter, and their digest."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / CONFIG_FILE).write_text("{}")
    (folder / WEIGHTS_FILE).write_bytes(os.urandom(size))
    digest = digest_of(folder)
    assert digest is not None
    return digest


async def upload(blobs: BlobStore, size: int = 100) -> str:
    async with blobs.receive() as incoming:
        await incoming.write(CONFIG_FILE, b"{}")
        await incoming.write(WEIGHTS_FILE, os.urandom(size))
        digest = await incoming.finish()
        await incoming.commit()
    return digest


def version(blobs: BlobStore, digest: str) -> Version:
    return Version("acme", "a", 1, digest, blobs.path(digest), rank=8)


class Looked:
    """Looks at nothing."""

    def __init__(self) -> None:
        self.fetched_digests: list[str] = []

    def is_ready(self, version: Version) -> bool:
        return version.path.exists()

    async def prepare(self, version: Version) -> None: ...

    def fetched(self, digest: str) -> None:
        self.fetched_digests.append(digest)


def cache_of(blobs: BlobStore, max_bytes: int = 1 << 20, used: set[str] | None = None) -> Cache:
    cache = Cache(blobs, max_bytes, Looked())
    cache.in_use = lambda: used or ()
    return cache


def fetched(cache: Cache) -> list[str]:
    looked = cache._then
    assert isinstance(looked, Looked)
    return looked.fetched_digests


async def blobs_at(root: Path, store: ObjectStore) -> BlobStore:
    blobs = BlobStore(root, max_bytes=1 << 30, objects=store)
    await blobs.open()
    return blobs


# --- the store ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["", "bucket", "ftp://host/x", "s3://", "s3:///x", "file://", "file:///"])
def test_a_url_must_name_a_bucket_or_folder(url: str) -> None:
    with pytest.raises(ValueError, match="must name a bucket or a folder"):
        check_url(url)


async def test_what_is_put_is_there_for_everybody(store: ObjectStore, tmp_path: Path) -> None:
    digest = files(tmp_path / "from", size=20 << 20)
    await store.put(digest, tmp_path / "from")
    (tmp_path / "to").mkdir()
    await ObjectStore(store.url).get(digest, tmp_path / "to")
    assert digest_of(tmp_path / "to") == digest
    assert (await store.ages()).keys() == {digest}


async def test_put_may_be_repeated(store: ObjectStore, tmp_path: Path) -> None:
    digest = files(tmp_path / "from")
    await asyncio.gather(*(store.put(digest, tmp_path / "from") for _ in range(4)))
    (tmp_path / "to").mkdir()
    await store.get(digest, tmp_path / "to")
    assert digest_of(tmp_path / "to") == digest


async def test_half_a_blob_is_none(store: ObjectStore, tmp_path: Path) -> None:
    """The config comes last: an upload that broke off left the weights alone."""
    digest = files(tmp_path / "from")
    (tmp_path / "from" / CONFIG_FILE).unlink()
    await store.put(digest, tmp_path / "from")
    (tmp_path / "to").mkdir()
    with pytest.raises(BlobMissing):
        await store.get(digest, tmp_path / "to")
    assert (await store.ages()).keys() == {digest}, "the sweep finds it"


async def test_removed_is_removed(store: ObjectStore, tmp_path: Path) -> None:
    digest = files(tmp_path / "from")
    await store.put(digest, tmp_path / "from")
    await store.remove(digest)
    await store.remove(digest)
    assert await store.ages() == {}
    (tmp_path / "to").mkdir()
    with pytest.raises(BlobMissing):
        await store.get(digest, tmp_path / "to")


async def test_a_sweep_goes_by_age_and_link(store: ObjectStore, tmp_path: Path) -> None:
    kept, gone = files(tmp_path / "kept"), files(tmp_path / "gone")
    await store.put(kept, tmp_path / "kept")
    await store.put(gone, tmp_path / "gone")
    await asyncio.sleep(1.1)  # S3 tells seconds
    assert await store.sweep({kept}, 0.0, lambda _: True) == [], "it may be another installation's"
    await store.claim("here")
    assert await store.sweep({kept}, 3600.0, lambda _: True) == []
    assert await store.sweep({kept}, 0.0, lambda name: name == kept) == []
    assert await store.sweep({kept}, 0.0, lambda _: True) == [gone]
    assert (await store.ages()).keys() == {kept}


async def test_a_sweep_goes_by_the_clock_of_the_store(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine whose clock is days ahead must not take what another one has just stored for old."""
    digest = files(tmp_path / "from")
    await store.claim("here")
    await store.put(digest, tmp_path / "from")
    behind = await store.now()
    assert abs(behind - time.time()) < 3600
    ahead = types.SimpleNamespace(time=lambda: behind + 3 * 86400)
    monkeypatch.setattr("adapters.store.objects.time", ahead, raising=False)
    assert await store.sweep(set(), 86400.0, lambda _: True) == []
    assert (await store.ages()).keys() == {digest}


async def test_one_installation_owns_a_store(store: ObjectStore) -> None:
    assert await store.owner() is None
    await store.claim("here")
    await store.claim("here")
    assert await store.owner() == "here"
    with pytest.raises(WrongStore, match="another installation, here"):
        await store.claim("there")


async def test_of_many_that_claim_at_once_one_wins(store: ObjectStore) -> None:
    results = await asyncio.gather(*(store.claim(str(n)) for n in range(8)), return_exceptions=True)
    assert sum(result is None for result in results) == 1
    assert sum(isinstance(result, WrongStore) for result in results) == 7


async def test_without_a_bucket(s3: S3) -> None:
    with pytest.raises(WrongStore, match="no such bucket"):
        await ObjectStore("s3://nobody-made-this/x").claim("here")


async def test_a_store_that_is_down(s3: S3, tmp_path: Path) -> None:
    store = ObjectStore(s3.bucket())
    digest = files(tmp_path / "from")
    await store.put(digest, tmp_path / "from")
    s3.stop()
    try:
        for call in (store.check(), store.put(digest, tmp_path / "from"), store.ages(), store.remove(digest)):
            with pytest.raises(StoreUnavailable) as refused:
                await call
            assert not isinstance(refused.value, BlobMissing)
    finally:
        s3.start()
    (tmp_path / "to").mkdir()
    await store.get(digest, tmp_path / "to")


async def test_a_store_that_takes_calls_and_answers_none(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects_module, "_CALL", 0.3)
    monkeypatch.setattr(objects_module, "_CHECK", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await ObjectStore("s3://bucket/x").check()
        with pytest.raises(StoreUnavailable):
            await ObjectStore("s3://bucket/x").ages()
        assert time.monotonic() - began < 30.0


# --- the data folder as a part of it -----------------------------------------------------------------


async def test_a_commit_is_in_the_store(store: ObjectStore, tmp_path: Path) -> None:
    blobs = await blobs_at(tmp_path / "one", store)
    digest = await upload(blobs)
    assert (await store.ages()).keys() == await blobs.digests() == {digest}
    other = await blobs_at(tmp_path / "two", store)
    cache = cache_of(other)
    await cache.open()
    assert await other.digests() == {digest}
    assert not cache.is_ready(version(other, digest))
    await cache.prepare(version(other, digest))
    assert cache.is_ready(version(other, digest))
    assert digest_of(other.path(digest)) == digest
    assert oct(other.path(digest).stat().st_mode)[-3:] == "555"


async def test_an_upload_is_refused_while_the_store_is_down(s3: S3, tmp_path: Path) -> None:
    blobs = await blobs_at(tmp_path / "data", ObjectStore(s3.bucket()))
    s3.stop()
    try:
        with pytest.raises(StoreUnavailable):
            await upload(blobs)
        with pytest.raises(StoreUnavailable):
            await blobs.check()
    finally:
        s3.start()
    await blobs.check()
    assert await upload(blobs) in await blobs.digests()


async def test_removal_reaches_the_store(store: ObjectStore, tmp_path: Path) -> None:
    blobs = await blobs_at(tmp_path / "data", store)
    digest = await upload(blobs)
    await blobs.remove(digest)
    assert (await blobs.digests(), await blobs.local()) == (set(), set())


async def test_what_the_store_keeps_while_it_is_down_goes_with_a_sweep(s3: S3, tmp_path: Path) -> None:
    store = ObjectStore(s3.bucket())
    await store.claim("here")
    blobs = await blobs_at(tmp_path / "data", store)
    digest = await upload(blobs)
    s3.stop()
    try:
        await blobs.remove(digest)
        assert await blobs.sweep(set(), older_than=0.0) == []
    finally:
        s3.start()
    assert await blobs.digests() == {digest}
    await asyncio.sleep(1.1)
    assert await blobs.sweep(set(), older_than=0.0) == [digest]
    assert await blobs.digests() == set()


async def test_the_longest_unused_goes_first_and_what_is_in_use_stays(
    store: ObjectStore, tmp_path: Path
) -> None:
    writer = await blobs_at(tmp_path / "one", store)
    digests = [await upload(writer, size=1_000) for _ in range(5)]
    blobs = await blobs_at(tmp_path / "two", store)
    used: set[str] = set()
    cache = cache_of(blobs, 3 * 1_002, used)
    await cache.open()
    for digest in digests[:3]:
        await cache.prepare(version(blobs, digest))
    assert cache.is_ready(version(blobs, digests[0]))
    await cache.prepare(version(blobs, digests[3]))
    assert await blobs.local() == {digests[0], digests[2], digests[3]}
    used |= {digests[2], digests[0]}
    await cache.prepare(version(blobs, digests[4]))
    assert await blobs.local() == {digests[0], digests[2], digests[4]}
    used |= set(digests)
    await cache.prepare(version(blobs, digests[1]))
    assert len(await blobs.local()) == 4, "more than fits, rather than what is in use"
    used.clear()
    await cache.trim()
    assert len(await blobs.local()) == 3
    assert len(fetched(cache)) == 6
    assert await blobs.digests() == set(digests), "in the store all are there"


async def test_a_start_finds_what_is_here_by_its_last_use(store: ObjectStore, tmp_path: Path) -> None:
    blobs = await blobs_at(tmp_path / "data", store)
    digests = [await upload(blobs, size=1_000) for _ in range(3)]
    for age, digest in enumerate(digests):
        for path in (*blobs.path(digest).iterdir(), blobs.path(digest)):
            os.utime(path, (1_000_000 - age, 1_000_000 - age))
    cache = cache_of(blobs, 2 * 1_002)
    await cache.open()
    assert await blobs.local() == set(digests[:2])


async def test_what_was_here_before_there_was_a_store_is_put_there(s3: S3, tmp_path: Path) -> None:
    """Nothing goes before it is in the store, and a store that is down keeps everything here."""
    blobs = BlobStore(tmp_path / "data", max_bytes=1 << 30)
    await blobs.open()
    digests = {await upload(blobs, size=1_000) for _ in range(3)}
    blobs.objects = ObjectStore(s3.bucket())
    cache = cache_of(blobs, 1_002)
    s3.stop()
    try:
        await cache.open()
        assert await blobs.local() == digests
    finally:
        s3.start()
    await cache.trim()
    assert await blobs.digests() == digests
    assert len(await blobs.local()) == 1


async def test_a_copy_that_is_damaged_is_fetched_again(store: ObjectStore, tmp_path: Path) -> None:
    blobs = await blobs_at(tmp_path / "data", store)
    digest = await upload(blobs)
    weights = blobs.path(digest) / WEIGHTS_FILE
    weights.chmod(0o644)
    weights.write_bytes(b"a bad sector")
    fitness = Fitness(blobs)
    await fitness.open(Serving(BASE, "float32", "1"))
    cache = Cache(blobs, 1 << 20, fitness)
    await cache.open()
    with pytest.raises(AdapterUnfit):  # what it holds is no adapter; its bytes are the right ones again
        await cache.prepare(version(blobs, digest))
    assert digest_of(blobs.path(digest)) == digest
    assert fitness.damaged == []


async def test_what_is_not_here_is_not_damaged(store: ObjectStore, tmp_path: Path) -> None:
    digest = await upload(await blobs_at(tmp_path / "one", store))
    blobs = await blobs_at(tmp_path / "two", store)
    fitness = Fitness(blobs)
    await fitness.open(Serving(BASE, "float32", "1"))
    await fitness.judge(digest)
    assert not await fitness.is_whole(digest)
    assert (fitness.damaged, fitness.known()) == ([], set())


async def test_asked_for_at_once_it_is_fetched_once(store: ObjectStore, tmp_path: Path) -> None:
    digest = await upload(await blobs_at(tmp_path / "one", store))
    blobs = await blobs_at(tmp_path / "two", store)
    cache = cache_of(blobs)
    await asyncio.gather(*(cache.prepare(version(blobs, digest)) for _ in range(10)))
    assert fetched(cache) == [digest]


async def test_other_bytes_under_its_name_are_never_taken(store: ObjectStore, tmp_path: Path) -> None:
    digest = files(tmp_path / "from")
    (tmp_path / "from" / WEIGHTS_FILE).write_bytes(b"other")
    await store.put(digest, tmp_path / "from")
    blobs = await blobs_at(tmp_path / "data", store)
    cache = cache_of(blobs)
    with pytest.raises(BlobMissing, match="not those that were uploaded"):
        await cache.prepare(version(blobs, digest))
    assert await blobs.local() == set()
    assert list(blobs.quarantine.iterdir()) == []


async def test_a_fetch_that_fails_is_tried_again_with_the_next_request(s3: S3, tmp_path: Path) -> None:
    store = ObjectStore(s3.bucket())
    writer = await blobs_at(tmp_path / "one", store)
    here, there = await upload(writer), await upload(writer)
    blobs = await blobs_at(tmp_path / "two", store)
    cache = cache_of(blobs)
    await cache.prepare(version(blobs, here))
    s3.stop()
    try:
        assert cache.is_ready(version(blobs, here)), "what is here is served"
        with pytest.raises(StoreUnavailable):
            await cache.prepare(version(blobs, there))
    finally:
        s3.start()
    await cache.prepare(version(blobs, there))
    assert list(blobs.quarantine.iterdir()) == []


async def test_what_the_store_lacks_is_not_asked_for_by_every_request(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    get = ObjectStore.get

    async def counted(self: ObjectStore, digest: str, folder: Path) -> None:
        asked.append(digest)
        await get(self, digest, folder)

    monkeypatch.setattr(ObjectStore, "get", counted)
    blobs = await blobs_at(tmp_path / "data", store)
    cache = cache_of(blobs)
    for _ in range(5):
        with pytest.raises(BlobMissing):
            await cache.prepare(version(blobs, DIGEST))
    assert asked == [DIGEST]


async def test_a_disk_that_fails_is_not_the_stores_fault(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await upload(await blobs_at(tmp_path / "one", store))
    blobs = await blobs_at(tmp_path / "two", store)

    async def broken(self: ObjectStore, digest: str, folder: Path) -> None:
        raise OSError(5, "input/output error")

    monkeypatch.setattr(ObjectStore, "get", broken)
    with pytest.raises(StorageFailed):
        await cache_of(blobs).prepare(version(blobs, digest))
