"""The schema: upgraded from nothing, refused from the future, and what SQLite is told."""

from __future__ import annotations

import asyncio
import shutil
import stat
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect, select, text
from sqlalchemy.exc import DatabaseError, IntegrityError, StatementError

from adapters.database import database as tables
from adapters.database.cache import ReadCache
from adapters.database.database import WATCH_EVERY, Database, SchemaTooNew
from adapters.database.rows import AdapterRow, Base, KeyRow, MetaRow, TenantRow, VersionRow, now
from tests.support.databases import KINDS, empty

VERSIONS = Path(tables.__file__).parent / "migrations" / "versions"
HEAD = max(path.name[:4] for path in VERSIONS.glob("[0-9]*.py"))


@pytest.fixture(params=KINDS)
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    async with empty(request.param, tmp_path) as url:
        yield url


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    database = Database(url)
    await database.open()
    yield database
    await database.close()


def tenant_row(id: str = "acme", **changes: object) -> TenantRow:
    row = TenantRow(id=id, name=id, weight=1.0, base_allowed=True, cache_salt="salt", created_at=now())
    for name, value in changes.items():
        setattr(row, name, value)
    return row


def adapter_row(name: str, *, is_default: bool) -> AdapterRow:
    return AdapterRow(
        tenant="acme",
        name=name,
        next_version=2,
        live=1,
        is_default=is_default,
        pinned=False,
        created_at=now(),
    )


async def test_upgrading_an_empty_database_gives_exactly_the_tables_of_the_models(database: Database) -> None:
    def differences(connection: Connection) -> list[object]:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True}
        )
        return list(compare_metadata(context, Base.metadata))

    def names(connection: Connection) -> set[str | None]:
        inspector = inspect(connection)
        found = {index["name"] for table in Base.metadata.tables for index in inspector.get_indexes(table)}
        for table in Base.metadata.tables:
            found.add(inspector.get_pk_constraint(table)["name"])
            found |= {key["name"] for key in inspector.get_foreign_keys(table)}
        return found

    async with database.read() as session:
        connection = await session.connection()
        assert await connection.run_sync(differences) == []
        found = await connection.run_sync(names)
    declared = {
        constraint.name for table in Base.metadata.tables.values() for constraint in table.constraints
    }
    assert {name for name in declared if not str(name).startswith("uq_")} <= found


async def test_at_most_one_adapter_of_a_tenant_can_be_the_default(database: Database) -> None:
    async with database.write() as session:
        session.add(tenant_row())
        await session.flush()
        session.add_all(
            [
                adapter_row("a", is_default=True),
                adapter_row("b", is_default=False),
                adapter_row("c", is_default=False),
            ]
        )
    with pytest.raises(IntegrityError):
        async with database.write() as session:
            session.add(adapter_row("d", is_default=True))


async def test_rows_that_refer_to_nothing_are_refused(database: Database) -> None:
    with pytest.raises(IntegrityError):
        async with database.write() as session:
            session.add(adapter_row("a", is_default=True))


async def test_opening_again_keeps_the_rows(url: str) -> None:
    for expected in ([], ["acme"]):
        database = Database(url)
        await database.open()
        async with database.read() as session:
            assert list(await session.scalars(select(TenantRow.id))) == expected
        if not expected:
            async with database.write() as session:
                session.add(tenant_row())
        await database.close()


async def test_several_openings_at_once_upgrade_once(url: str) -> None:
    databases = [Database(url) for _ in range(4)]
    await asyncio.gather(*(database.open() for database in databases))
    for database in databases:
        await database.ping()
        await database.close()


async def test_a_database_of_a_newer_version_is_refused_and_left_alone(url: str) -> None:
    database = Database(url)
    await database.open()
    async with database.write() as session:
        session.add(tenant_row())
        await session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    await database.close()

    late = Database(url)
    with pytest.raises(
        SchemaTooNew, match=rf"newer version \(its schema is 9999, this program knows up to {HEAD}\)"
    ):
        await late.open()
    async with late.read() as session:
        assert await session.scalar(text("SELECT version_num FROM alembic_version")) == "9999"
        assert await session.scalar(select(TenantRow.id)) == "acme"
    await late.close()


async def test_an_upgrade_that_fails_leaves_nothing_behind(url: str, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    database = Database(url)
    async with database._engine.begin() as connection:
        await connection.execute(text("CREATE TABLE versions (something INTEGER)"))
    with pytest.raises(DatabaseError, match=r"versions.*already exists"):
        await database.open()
    async with database.read() as session:
        connection = await session.connection()
        left = await connection.run_sync(lambda sync: set(inspect(sync).get_table_names()))
    assert left == {"versions"}
    await database.close()


async def test_a_database_of_the_first_release_is_upgraded_with_its_rows(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "migrations"
    shutil.copytree(
        VERSIONS.parent, first, ignore=shutil.ignore_patterns("000[2-9]*", "00[1-9]*", "__pycache__")
    )
    with monkeypatch.context() as patched:
        patched.setattr(tables, "MIGRATIONS", str(first))
        database = Database(url)
        await database.open()
        for statement in OLD_ROWS:
            async with database.write() as session:
                await session.execute(text(statement), {"then": now()})
        await database.close()
    database = Database(url)
    await database.open()
    async with database.read() as session:
        assert await session.scalar(text("SELECT version_num FROM alembic_version")) == HEAD
        (tenant,) = await session.scalars(select(TenantRow))
        (adapter,) = await session.scalars(select(AdapterRow))
        (version,) = await session.scalars(select(VersionRow))
    assert (tenant.id, tenant.cache_salt) == ("acme", "salt")
    assert (adapter.name, adapter.live, adapter.is_default) == ("a", 1, True)
    assert (version.digest, version.report) == ("d", {"rank": 8})
    await database.close()


OLD_ROWS = (
    "INSERT INTO tenants (id, name, weight, base_allowed, cache_salt, created_at)"
    " VALUES ('acme', 'Acme', 1.0, true, 'salt', :then)",
    "INSERT INTO adapters (tenant, name, next_version, live, is_default, pinned, created_at)"
    " VALUES ('acme', 'a', 2, 1, true, false, :then)",
    "INSERT INTO versions (tenant, adapter, number, digest, rank, size_bytes, report, created_at)"
    " VALUES ('acme', 'a', 1, 'd', 8, 100, '{\"rank\": 8}', :then)",
)

NEXT = """
import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = "HEAD"


def upgrade():
    with op.batch_alter_table("tenants", recreate=RECREATE) as tenants:
        tenants.add_column(sa.Column("colour", sa.String(20), nullable=False, server_default="red"))
"""


async def test_an_upgrade_that_rebuilds_a_table_keeps_the_rows_that_refer_to_it(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite drops the old table to rebuild it, which must not count as deleting the tenants."""
    database = Database(url)
    await database.open()
    async with database.write() as session:
        session.add(tenant_row())
        await session.flush()
        session.add(adapter_row("a", is_default=True))
    await database.close()

    migrations = tmp_path / "migrations"
    shutil.copytree(Path(tables.__file__).parent / "migrations", migrations)
    recreate = "always" if url.startswith("sqlite") else "auto"
    after = NEXT.replace("RECREATE", repr(recreate)).replace("HEAD", HEAD)
    (migrations / "versions" / "9999_colour.py").write_text(after)
    monkeypatch.setattr(tables, "MIGRATIONS", str(migrations))
    database = Database(url)
    await database.open()
    async with database.read() as session:
        assert (await session.execute(text("SELECT id, colour FROM tenants"))).all() == [("acme", "red")]
        assert list(await session.scalars(select(AdapterRow.name))) == ["a"]
    with pytest.raises(IntegrityError):
        async with database.write() as session:
            session.add(KeyRow(id="k", tenant="nobody", name=None, digest="d", created_at=now()))
    await database.close()


async def test_waiting_writers_do_not_keep_readers_from_the_database(database: Database) -> None:
    writing, release = asyncio.Event(), asyncio.Event()

    async def holds() -> None:
        async with database.write() as session:
            session.add(tenant_row())
            await session.flush()
            writing.set()
            await release.wait()

    async def waits(number: int) -> None:
        async with database.write() as session:
            session.add(tenant_row(f"t{number}"))

    first = asyncio.create_task(holds())
    await writing.wait()
    others = [asyncio.create_task(waits(number)) for number in range(40)]
    await asyncio.sleep(0)
    async with database.read() as session:
        assert await asyncio.wait_for(session.scalar(select(TenantRow.id)), 60) is None
    assert not any(task.done() for task in others)
    release.set()
    await asyncio.gather(first, *others)
    async with database.read() as session:
        assert len(list(await session.scalars(select(TenantRow.id)))) == 41


async def test_ping_fails_without_a_database(url: str) -> None:
    database = Database(url)
    await database.open()
    await database.ping()
    async with database.append() as session:
        await session.execute(text("DROP TABLE meta"))
    with pytest.raises(DatabaseError, match="meta"):
        await database.ping()
    await database.close()


async def test_times_come_back_in_utc(database: Database) -> None:
    elsewhere = datetime(2026, 5, 1, 12, 30, 0, 123456, tzinfo=timezone(timedelta(hours=9)))
    async with database.write() as session:
        session.add(tenant_row(created_at=elsewhere))
    async with database.read() as session:
        found = await session.scalar(select(TenantRow.created_at))
        later = await session.scalar(select(TenantRow.id).where(TenantRow.created_at > elsewhere))
    assert found == elsewhere
    assert found.tzinfo is UTC
    assert later is None
    with pytest.raises(StatementError, match="without a zone"):
        async with database.write() as session:
            session.add(tenant_row("globex", created_at=elsewhere.replace(tzinfo=None)))


async def test_sizes_beyond_32_bits_fit(database: Database) -> None:
    async with database.write() as session:
        session.add(tenant_row())
        await session.flush()
        session.add(adapter_row("a", is_default=True))
        await session.flush()
        session.add(
            VersionRow(
                tenant="acme",
                adapter="a",
                number=1,
                digest="d" * 64,
                rank=8,
                size_bytes=2**40,
                report={"alpha": 16.0, "text": "ü"},
                created_at=now(),
            )
        )
    async with database.read() as session:
        version = await session.get(VersionRow, ("acme", "a", 1))
    assert version is not None
    assert (version.size_bytes, version.report) == (2**40, {"alpha": 16.0, "text": "ü"})


async def test_a_write_that_raises_leaves_nothing(database: Database) -> None:
    async def fails() -> None:
        async with database.write() as session:
            session.add(tenant_row())
            await session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fails()
    async with database.read() as session:
        assert await session.scalar(select(TenantRow.id)) is None


async def test_a_write_that_is_cancelled_anywhere_is_whole_or_absent_and_never_blocks_the_next(
    database: Database,
) -> None:
    """Cancelled after more and more turns of the event loop, until some were quick enough to end."""

    async def pair(number: int) -> None:
        async with database.write() as session:
            session.add(tenant_row(f"a{number}"))
            await session.flush()
            session.add(tenant_row(f"b{number}"))

    async def stored() -> set[str]:
        async with database.read() as session:
            return set(await session.scalars(select(TenantRow.id)))

    turns, ended = 0, 0
    while ended < 5:
        generation = database.generation
        task = asyncio.create_task(pair(turns))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        done = (await asyncio.gather(task, return_exceptions=True))[0] is None
        there = await stored() & {f"a{turns}", f"b{turns}"}
        assert there in (set(), {f"a{turns}", f"b{turns}"})
        if done:
            assert there
        if there:
            assert database.generation > generation
        ended += done
        turns += 1 + turns // 10
    await asyncio.wait_for(pair(-1), 60)
    assert {"a-1", "b-1"} <= await stored()


async def test_a_commit_that_is_cancelled_ends_before_the_write_does(database: Database) -> None:
    """Otherwise a cache could be filled with the old answer between the two."""
    committing = asyncio.Event()

    async def writes() -> None:
        async with database.write() as session:
            session.add(tenant_row())
            commit = session.commit

            async def announced() -> None:
                committing.set()
                for _ in range(5):
                    await asyncio.sleep(0)
                await commit()

            session.commit = announced  # type: ignore[method-assign]

    task = asyncio.create_task(writes())
    await committing.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert database.generation == 1
    async with database.read() as session:
        assert await session.scalar(select(TenantRow.id)) == "acme"


async def test_a_cached_answer_that_was_read_before_a_write_is_not_kept(database: Database) -> None:
    cache: ReadCache[str, str] = ReadCache(database, 8)
    answers = iter(["old", "new"])
    reading, written = asyncio.Event(), asyncio.Event()

    async def slow() -> str:
        reading.set()
        await written.wait()
        return next(answers)

    first = asyncio.create_task(cache.get("key", slow))
    await reading.wait()
    async with database.write() as session:
        session.add(MetaRow(key="k", value="v"))
    # Another key is asked for after the write, so that the cache itself has moved on already.
    other: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    other.set_result("other")
    assert await cache.get("other", lambda: other) == "other"
    written.set()
    assert await first == "old"
    assert await cache.get("key", slow) == "new"
    assert await cache.get("key", slow) == "new"


async def test_a_cache_forgets_what_another_process_changed(url: str) -> None:
    ours, theirs = Database(url), Database(url)
    await ours.open()
    async with ours.write() as session:
        session.add(MetaRow(key="k", value="old"))
    watching = asyncio.create_task(ours.watch())
    cache: ReadCache[str, str] = ReadCache(ours, 8)

    async def read() -> str:
        async with ours.read() as session:
            return (await session.get_one(MetaRow, "k")).value

    assert await cache.get("k", read) == "old"
    async with theirs.append() as session:
        (await session.get_one(MetaRow, "k")).value = "unseen"
    await asyncio.sleep(2 * WATCH_EVERY)
    assert await cache.get("k", read) == "old"
    async with theirs.write() as session:
        (await session.get_one(MetaRow, "k")).value = "new"
    async with asyncio.timeout(120):
        while await cache.get("k", read) == "old":
            await asyncio.sleep(0.02)
    generation = ours.generation
    async with ours.write() as session:
        (await session.get_one(MetaRow, "k")).value = "own"
    await asyncio.sleep(2 * WATCH_EVERY)
    assert ours.generation == generation + 1, "its own writes are no news"
    watching.cancel()
    await asyncio.wait([watching])
    await ours.close()
    await theirs.close()


async def test_a_file_that_nobody_writes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a write after that is seen as any other."""
    monkeypatch.setattr("adapters.database.database.WATCH_EVERY", 0.02)
    ours, theirs = (Database(f"sqlite:///{tmp_path / 'a.db'}") for _ in range(2))
    await ours.open()
    async with ours.write() as session:
        session.add(MetaRow(key="k", value="old"))
    looks: list[str] = []

    def looked(statement: str) -> None:
        if "last_write" in statement:
            looks.append(statement)

    async with ours.read() as session:
        raw = await (await session.connection()).get_raw_connection()
        assert raw.driver_connection is not None
        await raw.driver_connection.set_trace_callback(looked)
    watching = asyncio.create_task(ours.watch())  # on that connection, the only one of the pool
    async with asyncio.timeout(120):
        while not looks:
            await asyncio.sleep(0.02)
        while looks:  # until the last write is more than a second ago
            looks.clear()
            await asyncio.sleep(0.5)
        generation = ours.generation
        async with theirs.write() as session:
            (await session.get_one(MetaRow, "k")).value = "new"
        while ours.generation == generation:
            await asyncio.sleep(0.02)
    assert looks
    watching.cancel()
    await asyncio.wait([watching])
    await ours.close()
    await theirs.close()


async def test_a_cache_is_bounded_and_keeps_no_failures(database: Database) -> None:
    cache: ReadCache[int, int] = ReadCache(database, 3)
    asked = []

    async def answer(key: int) -> int:
        asked.append(key)
        if key < 0:
            raise KeyError(key)
        return key

    for key in (1, 2, 3, 1, 4, 1, -1, -1):
        try:
            await cache.get(key, lambda key=key: answer(key))
        except KeyError:
            assert key < 0
    assert asked == [1, 2, 3, 4, -1, -1]
    assert len(cache) == 3


async def test_sqlite_is_told_to_be_durable_and_its_files_are_private(tmp_path: Path) -> None:
    async with empty("sqlite", tmp_path) as url:
        database = Database(url)
        await database.open()
        pragmas = {}
        async with database.write() as session:
            for pragma in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout"):
                pragmas[pragma] = await session.scalar(text(f"PRAGMA {pragma}"))
            session.add(tenant_row())
            await session.flush()
            modes = {
                path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "private").iterdir()
            }
        await database.close()
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 3_000}
    assert modes == {"loraplex.db": 0o600, "loraplex.db-wal": 0o600, "loraplex.db-shm": 0o600}
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o700


async def test_two_processes_that_read_before_they_write_both_succeed(url: str) -> None:
    """With a plain BEGIN, SQLite fails the second of them at once: 'database is locked'."""
    first, second = Database(url), Database(url)
    await first.open()
    async with first.write() as session:
        session.add(MetaRow(key="count", value="0"))

    async def count_up(database: Database) -> None:
        for _ in range(10):
            async with database.write() as session:
                row = await session.get_one(MetaRow, "count", with_for_update=True)
                row.value = str(int(row.value) + 1)

    await asyncio.gather(count_up(first), count_up(second))
    async with first.read() as session:
        assert (await session.get_one(MetaRow, "count")).value == "20"
    await first.close()
    await second.close()


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("sqlite://", "plain file"),
        ("sqlite+aiosqlite:///:memory:", "plain file"),
        ("sqlite+aiosqlite:///file::memory:?cache=shared&uri=true", "plain file"),
        ("mysql://localhost/x", "not mysql"),
        ("postgresql+psycopg2://localhost/x", "postgresql\\+asyncpg"),
    ],
)
def test_databases_that_cannot_serve_are_refused(url: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Database(url)


def test_a_password_is_not_in_the_repr() -> None:
    database = Database("postgres://me:hunter22@localhost/x")
    assert repr(database) == "Database('postgresql+asyncpg://me:***@localhost/x', generation=0)"
