"""Tenants and keys: who is let in, as whom, and who is not."""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy import select, text

from adapters.database.database import Database
from adapters.database.rows import KeyRow, MetaRow
from adapters.store.catalog import Catalog
from server.accounts.authentication import Authentication
from server.accounts.tenants import Tenant, Tenants
from server.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    NotFound,
    ServerError,
    Unauthorized,
    Unprocessable,
    headers_of,
)
from tests.service.store.test_catalog import digest, link, path_of
from tests.support.databases import KINDS, opened

ADMIN = "admin-key-0123456789"
SERVICE = "service-key-0123456789"


@pytest.fixture(params=KINDS)
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    async with opened(request.param, tmp_path) as database:
        yield database


@pytest.fixture
async def tenants(database: Database) -> Tenants:
    return Tenants(database)


@pytest.fixture
async def authentication(database: Database) -> Authentication:
    authentication = Authentication(database, admin_key=ADMIN, service_key=SERVICE)
    assert await authentication.open() is None
    return authentication


@dataclass(frozen=True)
class Kept:
    """A tenant ``acme`` with a key, for tests that change nothing."""

    tenants: Tenants
    authentication: Authentication
    acme: Tenant


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=KINDS)
async def kept(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Kept]:
    async with opened(request.param, tmp_path_factory.mktemp("kept")) as database:
        tenants = Tenants(database)
        authentication = Authentication(database, admin_key=ADMIN, service_key=SERVICE)
        assert await authentication.open() is None
        acme = await tenants.create("acme", max_running=9)
        await tenants.issue_key("acme")
        yield Kept(tenants, authentication, acme)


async def refused(
    authentication: Authentication,
    kind: type[ServerError],
    authorization: str | None,
    customer: str | None = None,
) -> ServerError:
    """What ``authenticate`` raises; it never says a key."""
    with pytest.raises(kind) as refusal:
        await authentication.authenticate(authorization, customer)
    for word in (authorization or "").split()[1:]:
        assert word not in refusal.value.message
    return refusal.value


async def test_a_tenant_is_made_read_changed_and_listed(tenants: Tenants) -> None:
    made = await tenants.create("globex", name="Globex GmbH", weight=2, base_allowed=False, max_queued=5)
    assert made == await tenants.get("globex")
    assert (made.name, made.weight, made.base_allowed) == ("Globex GmbH", 2.0, False)
    assert (made.max_queued, made.max_running) == (5, None)
    assert made.created_at.utcoffset() is not None
    acme = await tenants.create("acme")
    assert (acme.name, acme.weight, acme.base_allowed) == ("acme", 1.0, True)
    changed = await tenants.update("globex", weight=0.5, max_queued=None, max_running=3)
    assert changed == await tenants.get("globex")
    assert (changed.weight, changed.max_queued, changed.max_running) == (0.5, None, 3)
    assert (changed.name, changed.cache_salt) == (made.name, made.cache_salt)
    assert await tenants.update("globex") == changed
    assert await tenants.list() == [acme, changed]


async def test_the_cache_salt_is_random_fit_for_the_engine_and_not_shown(tenants: Tenants) -> None:
    salts = [(await tenants.create(f"t{number}")).cache_salt for number in range(5)]
    assert len(set(salts)) == 5
    for salt in salts:
        assert 32 <= len(salt) <= 128
        assert not set(salt) & set("@/\\\0")
    assert salts[0] not in repr(await tenants.get("t0"))


async def test_an_id_is_taken_once_also_when_two_ask_at_once(tenants: Tenants) -> None:
    results = await asyncio.gather(*(tenants.create("acme") for _ in range(8)), return_exceptions=True)
    assert sum(isinstance(result, Tenant) for result in results) == 1
    conflicts = [result for result in results if isinstance(result, Conflict)]
    assert len(conflicts) == 7
    assert (conflicts[0].message, conflicts[0].param) == ("The tenant `acme` exists already.", "id")


@pytest.mark.parametrize(
    "id", ["", "Acme", "-a", "a_b", "a b", "a/b", "ä", "a" * 64, "a\n", "a\x00", "\ud800"]
)
@pytest.mark.asyncio(loop_scope="module")
async def test_ids_that_no_tenant_may_have(kept: Kept, id: str) -> None:
    tenants = kept.tenants
    with pytest.raises(Unprocessable, match=re.escape("[a-z0-9][a-z0-9-]{0,62}")):
        await tenants.create(id)
    for call in (tenants.get(id), tenants.update(id, weight=2.0), tenants.delete(id), tenants.keys(id)):
        with pytest.raises(NotFound):
            await call
    assert await tenants.list() == [kept.acme]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("weight", 0),
        ("weight", -1.0),
        ("weight", math.nan),
        ("weight", math.inf),
        ("weight", 1e-320),
        ("weight", 10**400),
        ("weight", True),
        ("weight", None),
        ("weight", "1"),
        ("name", ""),
        ("name", "x" * 201),
        ("name", "a\x00b"),
        ("name", "a\nb"),
        ("name", "\ud800"),
        ("base_allowed", None),
        ("base_allowed", 1),
        ("max_queued", 0),
        ("max_queued", -1),
        ("max_queued", 2**31),
        ("max_running", 0),
        ("max_running", 1.5),
        ("max_running", True),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_settings_that_cannot_be(kept: Kept, setting: str, value: object) -> None:
    tenants = kept.tenants
    with pytest.raises(Unprocessable, match=f"`{setting}` must be") as refusal:
        await tenants.update("acme", **{"max_running": 7, setting: value})  # type: ignore[typeddict-item]
    assert refusal.value.param == setting
    with pytest.raises(Unprocessable):
        await tenants.create("globex", **{setting: value})  # type: ignore[arg-type]
    assert await tenants.list() == [kept.acme]


@pytest.mark.parametrize("setting", ["id", "cache_salt", "created_at", "colour"])
@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_not_a_setting_cannot_be_changed(kept: Kept, setting: str) -> None:
    with pytest.raises(Unprocessable, match=f"no setting `{setting}`"):
        await kept.tenants.update("acme", **{setting: "globex"})  # type: ignore[misc]
    assert await kept.tenants.list() == [kept.acme]


async def test_a_key_is_issued_once_and_kept_only_as_a_hash(tenants: Tenants, database: Database) -> None:
    await tenants.create("acme")
    first = await tenants.issue_key("acme", "laptop")
    second = await tenants.issue_key("acme")
    assert re.fullmatch(r"lp-[A-Za-z0-9_-]{43}", first.key)
    assert first.key != second.key
    assert first.key not in repr(first)
    assert first.id not in first.key
    assert [(key.id, key.name) for key in await tenants.keys("acme")] == [
        (first.id, "laptop"),
        (second.id, None),
    ]
    async with database.read() as session:
        stored = set(await session.scalars(select(KeyRow.digest)))
    assert stored == {hashlib.sha256(key.key.encode()).hexdigest() for key in (first, second)}
    with pytest.raises(NotFound):
        await tenants.issue_key("nobody")
    with pytest.raises(Unprocessable):
        await tenants.issue_key("acme", "a\x00")


async def test_a_tenant_key_is_its_tenant(tenants: Tenants, authentication: Authentication) -> None:
    acme = await tenants.create("acme")
    globex = await tenants.create("globex")
    ours, theirs = await tenants.issue_key("acme"), await tenants.issue_key("globex")
    assert await authentication.authenticate(f"Bearer {ours.key}", None) == acme
    assert await authentication.authenticate(f"bearer  {theirs.key}", None) == globex
    assert await authentication.authenticate(f"Bearer {ours.key}", "acme") == acme
    for customer in ("globex", "nobody", "ACME", "ä\x00"):
        refusal = await refused(authentication, Forbidden, f"Bearer {ours.key}", customer)
        assert refusal.code == "customer_mismatch"
        assert "acme" not in refusal.message


async def test_a_service_key_needs_a_customer_that_exists(
    tenants: Tenants, authentication: Authentication
) -> None:
    acme = await tenants.create("acme")
    assert await authentication.authenticate(f"Bearer {SERVICE}", "acme") == acme
    for customer in (None, ""):
        assert (
            await refused(authentication, BadRequest, f"Bearer {SERVICE}", customer)
        ).code == "customer_required"
    for customer in ("nobody", "ACME", "a\x00", "ä", "x" * 100_000, " acme"):
        assert (
            await refused(authentication, Forbidden, f"Bearer {SERVICE}", customer)
        ).code == "unknown_customer"


async def test_an_admin_key_administers_and_nothing_else(
    tenants: Tenants, authentication: Authentication
) -> None:
    await tenants.create("acme")
    key = await tenants.issue_key("acme")
    await authentication.require_admin(f"Bearer {ADMIN}")
    for customer in (None, "acme"):
        assert (
            "Admin keys cannot run inference"
            in (await refused(authentication, Forbidden, f"Bearer {ADMIN}", customer)).message
        )
    for other in (SERVICE, key.key):
        with pytest.raises(Forbidden):
            await authentication.require_admin(f"Bearer {other}")
    await tenants.revoke("acme", key.id)
    with pytest.raises(Unauthorized):
        await authentication.require_admin(f"Bearer {key.key}")


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic YWRtaW46YWRtaW4=",
        ADMIN,
        SERVICE,
        f"Bearer {ADMIN} ",
        f"Bearer {ADMIN} {ADMIN}",
        f"Bearer {ADMIN}\n",
        f"Bearer {ADMIN[:-1]}",
        f"Bearer {SERVICE}x",
        f"Bearer\t{SERVICE}",
        f"Bearer {hashlib.sha256(ADMIN.encode()).hexdigest()}",
        f"Bearer lp-{'A' * 43}",
        f"Bearer lp-{'A' * 42}é",
        "Bearer schlüssel-mit-umlaut-0123",
        "Bearer \ud800\udfff",
        "Bearer lp-\x00",
        "Bearer " + "x" * 513,
        "Bearer" + " " * 1_000_000 + ADMIN,
        "Bearer " + "x" * 10_000_000,
    ],
    ids=lambda text: repr(text)[:40],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_without_a_known_key_nobody_comes_in(kept: Kept, authorization: str | None) -> None:
    for customer in (None, "acme"):
        refusal = await refused(kept.authentication, Unauthorized, authorization, customer)
        assert refusal.code == "invalid_api_key"
        assert headers_of(refusal) == {"WWW-Authenticate": "Bearer"}
        assert ("didn't provide" in refusal.message) == (not authorization)
        assert len(refusal.message) < 200
    with pytest.raises(Unauthorized):
        await kept.authentication.require_admin(authorization)


async def test_revoked_keys_and_changed_tenants_count_at_once(
    tenants: Tenants, authentication: Authentication
) -> None:
    await tenants.create("acme")
    await tenants.create("globex")
    key, kept = await tenants.issue_key("acme"), await tenants.issue_key("acme")
    header = f"Bearer {key.key}"
    await authentication.authenticate(header, None)
    await authentication.authenticate(f"Bearer {SERVICE}", "acme")
    await tenants.update("acme", weight=3.0)
    assert (await authentication.authenticate(header, None)).weight == 3.0
    assert (await authentication.authenticate(f"Bearer {SERVICE}", "acme")).weight == 3.0

    for tenant, id in (
        ("globex", key.id),
        ("acme", "0" * 16),
        ("acme", "\x00"),
        ("acme", ""),
        ("nobody", key.id),
    ):
        with pytest.raises(NotFound):
            await tenants.revoke(tenant, id)
    await authentication.authenticate(header, None)
    await tenants.revoke("acme", key.id)
    await refused(authentication, Unauthorized, header)
    await authentication.authenticate(f"Bearer {kept.key}", None)
    assert [info.id for info in await tenants.keys("acme")] == [kept.id]


async def test_a_key_that_is_checked_while_it_is_revoked_does_not_come_back(
    tenants: Tenants, authentication: Authentication
) -> None:
    await tenants.create("acme")
    for turns in range(30):
        key = await tenants.issue_key("acme")
        header = f"Bearer {key.key}"
        checks = []
        for _ in range(3):
            checks.append(asyncio.create_task(authentication.authenticate(header, None)))
            for _ in range(turns):
                await asyncio.sleep(0)
        revoking = asyncio.create_task(tenants.revoke("acme", key.id))
        for _ in range(3):
            for _ in range(turns):
                await asyncio.sleep(0)
            checks.append(asyncio.create_task(authentication.authenticate(header, None)))
        await revoking
        await refused(authentication, Unauthorized, header)
        for outcome in await asyncio.gather(*checks, return_exceptions=True):
            assert isinstance(outcome, Tenant | Unauthorized)
        await refused(authentication, Unauthorized, header)


async def test_deleting_a_tenant_takes_everything_of_its_own(
    tenants: Tenants, authentication: Authentication, database: Database
) -> None:
    catalog = Catalog(database, path_of)
    before = await tenants.create("acme")
    await tenants.create("globex")
    for id in ("acme", "globex"):
        await link(catalog, id, "shared", 1)
    await link(catalog, "acme", "own", 2)
    await link(catalog, "acme", "own", 3)
    ours, theirs = await tenants.issue_key("acme"), await tenants.issue_key("globex")
    for header, customer in ((f"Bearer {ours.key}", None), (f"Bearer {SERVICE}", "acme")):
        await authentication.authenticate(header, customer)

    assert await tenants.delete("acme") == {digest(1), digest(2), digest(3)}
    assert await catalog.linked_digests() == {digest(1)}
    await refused(authentication, Unauthorized, f"Bearer {ours.key}")
    assert (await refused(authentication, Forbidden, f"Bearer {SERVICE}", "acme")).code == "unknown_customer"
    assert (await authentication.authenticate(f"Bearer {theirs.key}", None)).id == "globex"
    for call in (
        tenants.get("acme"),
        tenants.delete("acme"),
        tenants.keys("acme"),
        tenants.issue_key("acme"),
    ):
        with pytest.raises(NotFound):
            await call
    async with database.read() as session:
        for table in ("tenants", "keys", "adapters"):
            column = "id" if table == "tenants" else "tenant"
            assert set(await session.scalars(text(f"SELECT {column} FROM {table}"))) == {"globex"}

    again = await tenants.create("acme")
    assert await catalog.adapters("acme") == []
    await refused(authentication, Unauthorized, f"Bearer {ours.key}")
    assert again.cache_salt != before.cache_salt


async def test_known_keys_are_not_looked_up_again(
    tenants: Tenants, authentication: Authentication, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await tenants.create("acme")
    key = await tenants.issue_key("acme")
    headers = [(f"Bearer {key.key}", None), (f"Bearer {SERVICE}", "acme")]
    first = [await authentication.authenticate(*header) for header in headers]

    def unreachable() -> object:
        raise AssertionError("the database was asked")

    monkeypatch.setattr(database, "read", unreachable)
    assert [await authentication.authenticate(*header) for header in headers] == first
    # What cannot be a key is refused without asking either.
    await refused(authentication, Unauthorized, "Bearer garbage")


async def test_the_first_start_makes_an_admin_key_and_shows_it_once(database: Database) -> None:
    first = Authentication(database, admin_key=None, service_key=SERVICE)
    made = await first.open()
    assert made is not None
    assert len(made) > 43
    await first.require_admin(f"Bearer {made}")
    async with database.read() as session:
        assert made not in {row.value for row in await session.scalars(select(MetaRow))}

    second = Authentication(database, admin_key=None, service_key=None)
    assert await second.open() is None
    await second.require_admin(f"Bearer {made}")
    await refused(second, Forbidden, f"Bearer {made}")

    configured = Authentication(database, admin_key=ADMIN, service_key=None)
    assert await configured.open() is None
    await configured.require_admin(f"Bearer {ADMIN}")
    with pytest.raises(Unauthorized):
        await configured.require_admin(f"Bearer {made}")

    with pytest.raises(ValueError, match="service_key is the admin key"):
        await Authentication(database, admin_key=None, service_key=made).open()


async def test_without_a_configured_service_key_there_is_none(database: Database) -> None:
    authentication = Authentication(database, admin_key=ADMIN, service_key=None)
    await authentication.open()
    await Tenants(database).create("acme")
    await refused(authentication, Unauthorized, f"Bearer {SERVICE}", "acme")


@pytest.mark.parametrize(
    ("admin", "service", "complaint"),
    [
        (ADMIN, ADMIN, "must differ"),
        ("short", None, "admin_key must have at least 16 characters"),
        ("", None, "admin_key must have at least 16 characters"),
        (ADMIN, "x" * 15, "service_key must have at least 16 characters"),
        ("with spaces in between", None, "without spaces"),
        (ADMIN, "schlüssel-mit-umlaut", "printable ASCII"),
        ("x" * 513, None, "at most 512"),
    ],
)
def test_keys_that_cannot_be_configured(admin: str | None, service: str | None, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as refusal:
        Authentication(Database("sqlite:///unused.db"), admin_key=admin, service_key=service)
    for key in (admin, service):
        assert not key or key not in str(refusal.value)
