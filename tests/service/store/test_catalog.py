"""Adapters and versions: whose they are, which one answers, and what survives."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from adapters.database.database import Database
from adapters.errors import AdapterConflict, AdapterNotFound, AdapterRejected
from adapters.model import Adapter, Manifest, Version
from adapters.split import choose
from adapters.store.catalog import Catalog
from server.accounts.tenants import Tenants
from tests.support.databases import KINDS, with_tables

ROOT = Path(__file__).parents[3]
TENANTS = ("acme", "globex", "initech")


def manifest(**changes: object) -> Manifest:
    fields: dict[str, object] = {
        "rank": 8,
        "alpha": 16.0,
        "use_rslora": False,
        "dtype": "float32",
        "size_bytes": 3_000_000_000,
        "modules": ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
        "target_modules": ("q_proj",),
        "layers": (0, 1),
    }
    return Manifest(**(fields | changes))  # type: ignore[arg-type]


def digest(number: int) -> str:
    return f"{number:064x}"


def path_of(digest: str) -> Path:
    return Path("/blobs") / digest


def catalog_on(database: Database) -> Catalog:
    return Catalog(database, path_of, reserved=["smol"])


async def opened(url: str) -> Database:
    database = Database(url)
    await database.open()
    return database


@asynccontextmanager
async def with_tenants(kind: str, folder: Path) -> AsyncIterator[str]:
    """The URL of a database with three tenants."""
    async with with_tables(kind, folder) as url:
        database = await opened(url)
        tenants = Tenants(database)
        for id in TENANTS:
            await tenants.create(id)
        await database.close()
        yield url


@pytest.fixture(params=KINDS)
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    async with with_tenants(request.param, tmp_path) as url:
        yield url


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=KINDS)
async def kept(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Catalog]:
    """A catalog with the adapter ``acme/support``, for tests that change nothing."""
    async with with_tenants(request.param, tmp_path_factory.mktemp("kept")) as url:
        database = await opened(url)
        catalog = catalog_on(database)
        await link(catalog, "acme", "support")
        yield catalog
        await database.close()


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    database = await opened(url)
    yield database
    await database.close()


@pytest.fixture
def catalog(database: Database) -> Catalog:
    return catalog_on(database)


async def link(catalog: Catalog, tenant: str, name: str, number: int = 1, **options: bool) -> Version:
    _, version = await catalog.link(tenant, name, digest=digest(number), manifest=manifest(), **options)
    return version


async def not_found(catalog: Catalog, tenant: str, model: str | None) -> str:
    with pytest.raises(AdapterNotFound) as refusal:
        await catalog.resolve(tenant, model)
    assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")
    return refusal.value.message


async def test_the_first_link_makes_an_adapter_that_is_live_and_the_default(catalog: Catalog) -> None:
    adapter, version = await catalog.link("acme", "support", digest=digest(1), manifest=manifest())
    assert version == Version(
        tenant="acme",
        adapter="support",
        number=1,
        digest=digest(1),
        path=Path("/blobs") / digest(1),
        rank=8,
        size_bytes=3_000_000_000,
    )
    assert (adapter.live, adapter.default, adapter.pinned) == (1, True, False)
    assert adapter.live_version == version
    assert adapter.versions[0].report is None, "nobody asked for it"
    shown = (await catalog.adapter("acme", "support", reports=True)).versions[0].report
    assert json.loads(shown or "") == manifest().as_json()
    assert adapter.versions[0].created_at.utcoffset() is not None
    assert await catalog.adapter("acme", "support") == adapter
    assert await catalog.adapters("acme") == [adapter]
    for model in ("support", "support@1", "default", None):
        assert await catalog.resolve("acme", model) == version


async def test_a_new_version_answers_unless_it_was_linked_quietly(catalog: Catalog) -> None:
    first = await link(catalog, "acme", "support", 1)
    quiet = await link(catalog, "acme", "support", 2, make_live=False)
    assert (quiet.number, await catalog.resolve("acme", "support")) == (2, first)
    assert await catalog.resolve("acme", "support@2") == quiet
    third = await link(catalog, "acme", "support", 3)
    assert (third.number, await catalog.resolve("acme", "support")) == (3, third)
    assert await catalog.resolve("acme", None) == third
    assert await catalog.resolve("acme", "support@1") == first
    assert [info.version.number for info in (await catalog.adapter("acme", "support")).versions] == [1, 2, 3]


async def test_an_adapter_without_a_live_version_does_not_answer(catalog: Catalog) -> None:
    version = await link(catalog, "acme", "support", make_live=False)
    assert (await catalog.adapter("acme", "support")).live is None
    await not_found(catalog, "acme", "support")
    assert "no default adapter" in await not_found(catalog, "acme", None)
    assert await catalog.resolve("acme", "support@1") == version
    await catalog.update("acme", "support", live=1)
    assert await catalog.resolve("acme", None) == version


async def test_tenants_do_not_see_each_other(catalog: Catalog) -> None:
    ours = await link(catalog, "acme", "support", 1)
    theirs = await link(catalog, "globex", "support", 2)
    await link(catalog, "globex", "private", 3)
    await link(catalog, "globex", "private", 4)
    assert ours.key != theirs.key
    assert await catalog.resolve("acme", "support") == ours
    assert await catalog.resolve("globex", "support") == theirs
    assert [adapter.name for adapter in await catalog.adapters("acme")] == ["support"]
    for name in ("private", "private@1", "private@2"):
        assert await not_found(catalog, "acme", name) == f"The model `{name}` does not exist."
        assert await not_found(catalog, "initech", name) == f"The model `{name}` does not exist."
    for call in (
        catalog.adapter("acme", "private"),
        catalog.update("acme", "private", pinned=True),
        catalog.delete_adapter("acme", "private"),
        catalog.delete_version("acme", "private", 1),
    ):
        with pytest.raises(AdapterNotFound, match="There is no adapter `private`"):
            await call
    assert "no default adapter" in await not_found(catalog, "initech", None)
    await catalog.delete_adapter("acme", "support")
    assert await catalog.resolve("globex", "support") == theirs


@pytest.mark.parametrize(
    "model",
    [
        "",
        "@1",
        "support@",
        "support@0",
        "support@01",
        "support@+1",
        "support@-1",
        "support@ 1",
        "support@1 ",
        "support@1\n",
        "support@1.0",
        "support@١",
        "support@1@1",
        "support@2",
        "support@999999999",
        "support@99999999999999999999",
        "support\n",
        "Support",
        "default@1",
        "DEFAULT",
        "acme/support",
        "sup\x00port",
        "support@1\x00",
        "../support",
        "' OR 1=1 --",
        "💥",
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_model_names_are_read_strictly(kept: Catalog, model: str) -> None:
    assert await not_found(kept, "acme", model) == f"The model `{model}` does not exist."


async def test_a_message_repeats_only_so_much_and_only_text(catalog: Catalog) -> None:
    assert await not_found(catalog, "acme", "x" * 1_000_000) == f"The model `{'x' * 200}…` does not exist."
    assert await not_found(catalog, "acme", "a\ud800b") == "The model `a?b` does not exist."


@pytest.mark.parametrize(
    "name", ["", "a@1", "-a", ".a", "a b", "a/b", "ä", "a" * 129, "a\n", "default", "smol"]
)
@pytest.mark.asyncio(loop_scope="module")
async def test_names_that_no_adapter_may_have(kept: Catalog, name: str) -> None:
    with pytest.raises(AdapterRejected) as refusal:
        kept.check_name(name)
    assert (refusal.value.code, refusal.value.param) == ("name_invalid", "name")
    assert "1 to 128 letters" in refusal.value.message
    with pytest.raises(AdapterRejected):
        await link(kept, "acme", name)
    assert await kept.count_versions() == 1


@pytest.mark.parametrize("tenant", ["nobody", "ACME", "ac\x00me", "\ud800"])
@pytest.mark.asyncio(loop_scope="module")
async def test_a_tenant_that_is_not_there_has_nothing(kept: Catalog, tenant: str) -> None:
    with pytest.raises(AdapterNotFound) as refusal:
        await link(kept, tenant, "support")
    assert refusal.value.code == "tenant_not_found"
    assert await kept.adapters(tenant) == []
    await not_found(kept, tenant, None)
    await not_found(kept, tenant, "support")
    with pytest.raises(AdapterNotFound):
        await kept.delete_adapter(tenant, "support")


async def test_rolling_back(catalog: Catalog) -> None:
    first = await link(catalog, "acme", "support", 1)
    await link(catalog, "acme", "support", 2)
    adapter = await catalog.update("acme", "support", live=1)
    assert adapter.live_version == first == await catalog.resolve("acme", "support")
    for number in (0, -1, 3, 2**31, 2**70):
        with pytest.raises(AdapterNotFound) as refusal:
            await catalog.update("acme", "support", live=number, pinned=True)
        assert (refusal.value.code, refusal.value.param) == ("version_not_found", "live")
    assert await catalog.adapter("acme", "support") == adapter


async def test_the_default_moves_and_is_never_two(catalog: Catalog) -> None:
    await link(catalog, "acme", "a", 1)
    second = await link(catalog, "acme", "b", 2)
    await link(catalog, "globex", "a", 3)
    assert [adapter.default for adapter in await catalog.adapters("acme")] == [True, False]
    assert (await catalog.update("acme", "b", default=True)).default
    assert [adapter.default for adapter in await catalog.adapters("acme")] == [False, True]
    assert (await catalog.update("acme", "b", default=True)).default
    assert await catalog.resolve("acme", None) == second
    assert (await catalog.adapter("globex", "a")).default
    assert not (await catalog.update("acme", "b", default=False)).default
    assert "no default adapter" in await not_found(catalog, "acme", "default")


async def test_deleting_the_default_leaves_none_until_the_tenant_starts_anew(catalog: Catalog) -> None:
    await link(catalog, "acme", "a", 1)
    await link(catalog, "acme", "b", 2)
    await catalog.delete_adapter("acme", "a")
    await link(catalog, "acme", "c", 3)
    assert "no default adapter" in await not_found(catalog, "acme", None)
    await catalog.delete_adapter("acme", "b")
    await catalog.delete_adapter("acme", "c")
    fresh = await link(catalog, "acme", "a", 4)
    assert await catalog.resolve("acme", None) == fresh


async def test_a_deleted_adapter_is_gone_and_its_numbers_never_come_back(catalog: Catalog) -> None:
    versions = [await link(catalog, "acme", "support", number) for number in (1, 2)]
    before = await catalog.update("acme", "support", pinned=True)
    assert await catalog.delete_adapter("acme", "support") == versions
    for model in ("support", "support@1", "support@2"):
        await not_found(catalog, "acme", model)
    assert (await catalog.adapters("acme"), await catalog.count_versions(), await catalog.pinned()) == (
        [],
        0,
        [],
    )
    with pytest.raises(AdapterNotFound):
        await catalog.adapter("acme", "support")
    with pytest.raises(AdapterNotFound):
        await catalog.delete_adapter("acme", "support")
    again, version = await catalog.link("acme", "support", digest=digest(9), manifest=manifest())
    assert (version.number, again.live, again.default, again.pinned) == (3, 3, True, False)
    assert again.created_at > before.created_at
    await not_found(catalog, "acme", "support@1")


async def test_deleting_versions(catalog: Catalog) -> None:
    first = await link(catalog, "acme", "support", 1)
    with pytest.raises(AdapterConflict, match=r"only version of `support`\. Delete the adapter"):
        await catalog.delete_version("acme", "support", 1)
    second = await link(catalog, "acme", "support", 2)
    with pytest.raises(AdapterConflict, match=r"is live\. Set another version live first"):
        await catalog.delete_version("acme", "support", 2)
    assert await catalog.delete_version("acme", "support", 1) == first
    await not_found(catalog, "acme", "support@1")
    with pytest.raises(AdapterNotFound) as refusal:
        await catalog.delete_version("acme", "support", 1)
    assert refusal.value.code == "version_not_found"
    third = await link(catalog, "acme", "support", 3)
    await catalog.update("acme", "support", live=2)
    await catalog.delete_version("acme", "support", third.number)
    fourth = await link(catalog, "acme", "support", 4, make_live=False)
    assert fourth.number == 4
    assert await catalog.resolve("acme", "support") == second


async def test_digests_are_linked_until_the_last_version_that_has_them_goes(catalog: Catalog) -> None:
    await link(catalog, "acme", "a", 1)
    await link(catalog, "acme", "a", 2)
    await link(catalog, "globex", "a", 1)
    assert await catalog.linked_digests() == {digest(1), digest(2)}
    await catalog.delete_version("acme", "a", 1)
    assert await catalog.is_linked(digest(1))
    await catalog.delete_adapter("globex", "a")
    assert not await catalog.is_linked(digest(1))
    assert await catalog.linked_digests() == {digest(2)}


async def test_pinned_lists_live_versions_and_count_counts_adapters(catalog: Catalog) -> None:
    await link(catalog, "globex", "b", 1)
    await link(catalog, "acme", "a", 2)
    live = await link(catalog, "acme", "a", 3)
    await link(catalog, "acme", "c", 4)
    other = await link(catalog, "globex", "a", 5)
    await link(catalog, "initech", "quiet", 6, make_live=False)
    for tenant, name in (("globex", "a"), ("acme", "a"), ("initech", "quiet")):
        assert (await catalog.update(tenant, name, pinned=True)).pinned
    assert await catalog.pinned() == [live, other]
    counts = {tenant: len(await catalog.adapters(tenant)) for tenant in ("acme", "globex", "initech")}
    assert counts == {"acme": 2, "globex": 2, "initech": 1}
    await catalog.update("acme", "a", pinned=False)
    assert await catalog.pinned() == [other]


async def test_names_are_listed_in_one_order_on_every_database(catalog: Catalog) -> None:
    names = ["b", "A", "a", "B", "a.b", "a-b", "a_b", "aB", "10", "9"]
    for number, name in enumerate(names):
        await link(catalog, "acme", name, number)
        await link(catalog, "acme", name, number + 100)
    found = await catalog.adapters("acme")
    assert [adapter.name for adapter in found] == sorted(names)
    assert all([info.version.number for info in adapter.versions] == [1, 2] for adapter in found)


async def test_a_resolved_name_is_not_asked_for_again_until_something_is_written(
    catalog: Catalog, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await link(catalog, "acme", "support")
    reads = 0
    read = database.read

    def counted() -> object:
        nonlocal reads
        reads += 1
        return read()

    monkeypatch.setattr(database, "read", counted)
    for _ in range(3):
        for model in ("support", "support@1", "default", None):
            await catalog.resolve("acme", model)
    assert reads == 3
    await link(catalog, "acme", "other", 2)
    reads = 0
    await catalog.resolve("acme", "support")
    assert reads == 1
    reads = 0
    for _ in range(3):
        await not_found(catalog, "acme", "nothing")
    assert reads == 3


async def test_an_answer_is_never_older_than_the_last_update_that_returned(catalog: Catalog) -> None:
    """Readers note what was acknowledged before they asked; the answer may be newer, never older."""
    rng = random.Random(7)
    for number in range(1, 41):
        await link(catalog, "acme", "support", number, make_live=number == 1)
    order: dict[int, int] = {1: 0}
    acknowledged = 0
    reading = True

    async def write() -> None:
        nonlocal acknowledged, reading
        for step, number in enumerate(range(2, 41), 1):
            order[number] = step
            await catalog.update("acme", "support", live=number)
            acknowledged = step
            answer = await catalog.resolve("acme", "support")
            assert answer.number == number
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
        reading = False

    async def read() -> int:
        asked = 0
        while reading:
            before = acknowledged
            answer = await catalog.resolve("acme", rng.choice(["support", "default", None]))
            assert order[answer.number] >= before
            asked += 1
            # Now and then for real: a loop that only spins keeps the interpreter from the database's threads.
            await asyncio.sleep(0 if asked % 4 else 0.001)
        return asked

    _, *asked = await asyncio.gather(write(), *(read() for _ in range(8)))
    assert min(asked) > 10


async def test_deleting_a_tenant_empties_the_cache(catalog: Catalog, database: Database) -> None:
    await link(catalog, "acme", "support")
    await catalog.resolve("acme", "support")
    await Tenants(database).delete("acme")
    await not_found(catalog, "acme", "support")


async def test_fifty_uploads_at_once_get_fifty_numbers_and_all_survive(url: str) -> None:
    """By two processes' worth of writers, half of the links each."""
    databases = [await opened(url), await opened(url)]
    catalogs = [catalog_on(database) for database in databases]
    linked = await asyncio.gather(
        *(link(catalogs[number % 2], "acme", "support", number) for number in range(50))
    )
    for database in databases:
        await database.close()
    assert sorted(version.number for version in linked) == list(range(1, 51))

    database = await opened(url)
    adapter = await catalog_on(database).adapter("acme", "support")
    await database.close()
    assert [info.version for info in adapter.versions] == sorted(linked, key=lambda version: version.number)
    assert adapter.live == 50


async def test_first_uploads_at_once_make_exactly_one_default(url: str) -> None:
    databases = [await opened(url), await opened(url)]
    catalogs = [catalog_on(database) for database in databases]
    made = await asyncio.gather(
        *(
            catalogs[number % 2].link("acme", f"a{number}", digest=digest(number), manifest=manifest())
            for number in range(20)
        )
    )
    defaults = [adapter for adapter in await catalogs[0].adapters("acme") if adapter.default]
    for database in databases:
        await database.close()
    assert len(defaults) == 1
    assert [adapter for adapter, _ in made if adapter.default] == defaults


async def test_defaults_changed_at_once_leave_exactly_one(url: str) -> None:
    databases = [await opened(url), await opened(url)]
    catalogs = [catalog_on(database) for database in databases]
    for number in range(6):
        await link(catalogs[0], "acme", f"a{number}", number)
    await asyncio.gather(
        *(catalogs[number % 2].update("acme", f"a{number % 6}", default=True) for number in range(30))
    )
    defaults = [adapter.name for adapter in await catalogs[0].adapters("acme") if adapter.default]
    for database in databases:
        await database.close()
    assert len(defaults) == 1


async def test_a_random_walk_agrees_with_a_dictionary(catalog: Catalog) -> None:
    """Numbers only grow, the live version exists, one default at most, and resolve says what adapters say."""
    rng = random.Random(11)
    used: dict[tuple[str, str], int] = {}
    known: dict[tuple[str, str], set[int]] = {}
    for step in range(200):
        tenant, name = rng.choice(TENANTS[:2]), rng.choice("abc")
        numbers = known.setdefault((tenant, name), set())
        try:
            match rng.randrange(8):
                case 0 | 1:
                    version = await link(catalog, tenant, name, step, make_live=rng.random() < 0.6)
                    assert version.number == used.get((tenant, name), 0) + 1
                    used[tenant, name] = version.number
                    numbers.add(version.number)
                case 2:
                    await catalog.update(tenant, name, live=rng.randrange(1, 12))
                case 3:
                    await catalog.update(tenant, name, default=rng.random() < 0.7, pinned=rng.random() < 0.5)
                case 4:
                    numbers.remove((await catalog.delete_version(tenant, name, rng.randrange(1, 12))).number)
                case 5 if rng.random() < 0.3:
                    gone = await catalog.delete_adapter(tenant, name)
                    assert {version.number for version in gone} == numbers
                    numbers.clear()
                case 6:
                    split = (
                        {rng.randrange(1, 12): 30, rng.randrange(12, 20): 70} if rng.random() < 0.7 else None
                    )
                    await catalog.update(tenant, name, split=split)
                case 7:
                    kept = await catalog.keep_newest(tenant, name, rng.randrange(2, 4))
                    numbers -= {version.number for version in kept}
        except (AdapterNotFound, AdapterConflict):
            pass
        found: list[Adapter] = [a for t in TENANTS for a in await catalog.adapters(t)]
        assert {(a.tenant, a.name): {i.version.number for i in a.versions} for a in found} == {
            key: numbers for key, numbers in known.items() if numbers
        }
        for adapter in found:
            if not adapter.shares:
                assert adapter.live is adapter.split is None
                await not_found(catalog, adapter.tenant, adapter.name)
                continue
            assert sum(share for _, share in adapter.shares) == 100
            assert adapter.split or adapter.shares == ((adapter.live_version, 100),)
            chosen = choose(adapter.shares, f"{adapter.tenant}/{adapter.name}", str(step))
            assert chosen == await catalog.resolve(adapter.tenant, adapter.name, str(step))
            if adapter.default:
                assert chosen == await catalog.resolve(adapter.tenant, None, str(step))
        assert all(sum(a.default for a in found if a.tenant == tenant) <= 1 for tenant in TENANTS)
        assert await catalog.linked_digests() == {i.version.digest for a in found for i in a.versions}
    assert max(used.values()) > 5


WRITER = """
import asyncio, sys
from tests.service.store.test_catalog import catalog_on, link, opened

async def main(url):
    database = await opened(url)
    catalog = catalog_on(database)

    async def upload(name):
        for number in range(100_000):
            version = await link(catalog, "acme", name, number)
            print(name, version.number, version.digest, flush=True)

    await asyncio.gather(*(upload(name) for name in "abc"))

asyncio.run(main(sys.argv[1]))
"""


async def test_what_was_acknowledged_is_there_after_kill_9(url: str) -> None:
    acknowledged: set[tuple[str, int, str]] = set()
    for round_ in range(2):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, url], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(25)]
        os.kill(writer.pid, signal.SIGKILL)
        lines += writer.stdout.readlines()
        writer.stdout.close()
        assert writer.wait() == -signal.SIGKILL
        # The last line may be cut off in the middle.
        for line in lines:
            if line.endswith("\n"):
                name, number, hash_ = line.split()
                acknowledged.add((name, int(number), hash_))

        database = await opened(url)
        catalog = catalog_on(database)
        adapters = await catalog.adapters("acme")
        assert sum(adapter.default for adapter in adapters) == 1
        there = {(a.name, i.version.number, i.version.digest) for a in adapters for i in a.versions}
        assert acknowledged <= there
        # At most the one that was being committed when the process died is there unannounced, each round.
        assert len(there) <= len(acknowledged) + (round_ + 1) * len(adapters)
        for adapter in adapters:
            assert [i.version.number for i in adapter.versions] == list(range(1, len(adapter.versions) + 1))
            assert adapter.live == len(adapter.versions)
        await database.close()
    assert len(acknowledged) >= 50


async def test_a_version_knows_what_requests_need_of_its_report(catalog: Catalog) -> None:
    chat = {"kept": True, "content_format": "openai", "defaults": {"temperature": 0.5}}
    said = replace(manifest(), labels=1, chat=chat, probe={"base": "abc", "effect": True})
    await catalog.link("acme", "support", digest=digest(1), manifest=said)
    for model in ("support", "support@1"):
        found = await catalog.resolve("acme", model)
        assert (found.labels, found.base, dict(found.chat)) == (1, "abc", chat)
    await catalog.link("acme", "support", digest=digest(2), manifest=manifest())
    plain = await catalog.resolve("acme", "support")
    assert (plain.labels, plain.base, dict(plain.chat)) == (None, None, {})
