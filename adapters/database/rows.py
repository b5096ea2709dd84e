"""The tables, one class each.

tenants ──< keys
   ├─────< adapters ──< versions          meta: key -> value
   ├─────< uploads
   ├─────< rollouts ──< rollout_prompts
   ├─────< upload_jobs                   admin_keys: people who operate
   ├─────< files ──< file_pieces
   └─────< batches ──< batch_results
usage, audit: what happened; they outlive whom it happened to
replicas, leases: the processes of a fleet, and who does what for all of them
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import (
    JSON,
    BigInteger,
    ColumnElement,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Select,
    SQLColumnExpression,
    String,
    Text,
    false,
    func,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

Q = TypeVar("Q", bound=Select[Any])

MAX_INTEGER = 2**31 - 1

# SQLite counts up only what it calls INTEGER.
_RowId = BigInteger().with_variant(Integer(), "sqlite")
_Json = JSON(none_as_null=True)


class UtcDateTime(TypeDecorator[datetime]):
    """Timezone-aware UTC on both sides; SQLite keeps no zone, so it is put back on reading.

    A time that UTC has no year for, up to a day beyond the calendar's ends, is that end.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone cannot be stored")
        try:
            return value.astimezone(UTC)
        except OverflowError:
            end = datetime.min if value.year == 1 else datetime.max
            return end.replace(tzinfo=UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def now() -> datetime:
    return datetime.now(UTC)


class database_now(FunctionElement[datetime]):
    """The time by the database's clock, which those share who compare times that others wrote."""

    type = UtcDateTime()
    inherit_cache = True


@compiles(database_now, "postgresql")
def _of_postgresql(*_: Any, **__: Any) -> str:
    return "clock_timestamp()"  # now() is that of the transaction's begin


@compiles(database_now, "sqlite")
def _of_sqlite(*_: Any, **__: Any) -> str:
    return "strftime('%Y-%m-%d %H:%M:%f', 'now')"


_began, _mark = now(), time.monotonic()


def steady_now() -> datetime:
    """The time since this process began, from the clock's time then: for ages, which no jump changes."""
    return _began + timedelta(seconds=time.monotonic() - _mark)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class TenantRow(Base):
    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(String(63), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    weight: Mapped[float] = mapped_column(Double)
    base_allowed: Mapped[bool]
    max_queued: Mapped[int | None]
    max_running: Mapped[int | None]
    cache_salt: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    # Without a default of its own the INSERT would have to read the database's back.
    priority: Mapped[str] = mapped_column(String(16), default="standard", server_default="standard")
    limits: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    budgets: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    suspended: Mapped[bool] = mapped_column(default=False, server_default=false())
    sample_prompts: Mapped[bool] = mapped_column(default=False, server_default=false())


class KeyRow(Base):
    """``digest`` is the SHA-256 of the key, in hex; the key itself is nowhere."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), index=True)
    name: Mapped[str | None] = mapped_column(String(200))
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    scopes: Mapped[list[str] | None] = mapped_column(_Json)
    limits: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    last_used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class AdapterRow(Base):
    """An adapter is there while it has versions.

    The row outlives them: it remembers ``next_version``, so that ``name@3`` never means other weights,
    not even after the adapter was deleted and uploaded anew. ``split`` maps versions to their shares.
    """

    __tablename__ = "adapters"
    __table_args__ = (
        Index(
            "ix_adapters_default",
            "tenant",
            unique=True,
            sqlite_where=text("is_default"),
            postgresql_where=text("is_default"),
        ),
    )

    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    next_version: Mapped[int]
    live: Mapped[int | None]
    is_default: Mapped[bool]
    pinned: Mapped[bool]
    split: Mapped[dict[str, int] | None] = mapped_column(_Json)
    keep_versions: Mapped[int | None]
    defaults: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class VersionRow(Base):
    __tablename__ = "versions"
    __table_args__ = (
        ForeignKeyConstraint(["tenant", "adapter"], ["adapters.tenant", "adapters.name"], ondelete="CASCADE"),
    )

    tenant: Mapped[str] = mapped_column(String(63), primary_key=True)
    adapter: Mapped[str] = mapped_column(String(128), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), index=True)
    rank: Mapped[int]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    report: Mapped[dict[str, Any]] = mapped_column(JSON)
    golden: Mapped[dict[str, Any] | None] = mapped_column(_Json, deferred=True)
    quarantine: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    note: Mapped[str | None] = mapped_column(String(500))
    uploader: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class UploadRow(Base):
    """What an upload with an ``Idempotency-Key`` was answered; see ``adapters.store.idempotency``."""

    __tablename__ = "uploads"

    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    answer: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class UploadJobRow(Base):
    """An upload that is answered later, or one that was refused; see ``adapters.store.upload_jobs``."""

    __tablename__ = "upload_jobs"
    __table_args__ = (Index("ix_upload_jobs_tenant_created_at", "tenant", "created_at"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    adapter: Mapped[str] = mapped_column(String(128))
    state: Mapped[str] = mapped_column(String(16))
    received_bytes: Mapped[int] = mapped_column(BigInteger)
    actor: Mapped[str] = mapped_column(String(64))
    request_id: Mapped[str | None] = mapped_column(String(64))
    answer: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    code: Mapped[str | None] = mapped_column(String(64))
    message: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime)


class RolloutRow(Base):
    """A version that gets a growing share of its adapter's requests; see ``adapters.store.rollouts``.

    ``answering`` is what is to answer to the adapter's name, ``seen`` the last row of ``usage`` that
    ``evidence`` has. At most one of an adapter has not ended.
    """

    __tablename__ = "rollouts"
    __table_args__ = (
        Index(
            "ix_rollouts_active",
            "tenant",
            "adapter",
            unique=True,
            sqlite_where=text("state IN ('running', 'held')"),
            postgresql_where=text("state IN ('running', 'held')"),
        ),
        Index("ix_rollouts_tenant_adapter", "tenant", "adapter", "created_at"),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    adapter: Mapped[str] = mapped_column(String(128))
    version: Mapped[int]
    state: Mapped[str] = mapped_column(String(16))
    answering: Mapped[dict[str, Any]] = mapped_column(JSON)
    document: Mapped[dict[str, Any]] = mapped_column(JSON)
    evidence: Mapped[dict[str, Any] | None] = mapped_column(_Json, deferred=True)
    seen: Mapped[int] = mapped_column(BigInteger)
    revision: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime)


class RolloutPromptRow(Base):
    """A prompt that a rollout replays, encrypted with the key named ``key``; see ``adapters.store.prompts``.

    Once it was replayed ``sealed`` is gone and ``result`` has numbers, until the rollout has taken them in.
    """

    __tablename__ = "rollout_prompts"

    id: Mapped[int] = mapped_column(_RowId, primary_key=True)
    rollout: Mapped[str] = mapped_column(ForeignKey("rollouts.id", ondelete="CASCADE"), index=True)
    key: Mapped[str] = mapped_column(String(16))
    sealed: Mapped[bytes | None] = mapped_column(LargeBinary, deferred=True)
    tries: Mapped[int]
    result: Mapped[dict[str, Any] | None] = mapped_column(_Json)


class AdminKeyRow(Base):
    """A person who operates the server. ``digest`` is the SHA-256 of the key, in hex."""

    __tablename__ = "admin_keys"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)
    role: Mapped[str] = mapped_column(String(16))
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    last_used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class UsageRow(Base):
    """What one request used or, once rolled up (``request_id`` is NULL), ``requests`` of one day.

    A request that was refused is there with ``requests`` 0, so that it can be found and counts nowhere.
    ``code`` is the error that it ended with, ``finish`` why its answer did, ``numbered`` if it named its
    version.

    ``at`` is when it ended, ``hour`` the same in hours since 1970. Tokens, seconds and ``cost`` (in 1e-9 of
    the currency) are sums over the requests. It refers to no row, because it has to outlive them.
    """

    __tablename__ = "usage"
    __table_args__ = (
        Index("ix_usage_tenant_at", "tenant", "at"),
        Index("ix_usage_at", "at"),
        Index("ix_usage_request_id", "request_id"),
    )

    id: Mapped[int] = mapped_column(_RowId, primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    hour: Mapped[int]
    tenant: Mapped[str] = mapped_column(String(63))
    key: Mapped[str | None] = mapped_column(String(16))
    adapter: Mapped[str | None] = mapped_column(String(128))
    version: Mapped[int | None]
    endpoint: Mapped[str] = mapped_column(String(32))
    outcome: Mapped[str] = mapped_column(String(16))
    request_id: Mapped[str | None] = mapped_column(String(64))
    requests: Mapped[int]
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    cached_tokens: Mapped[int] = mapped_column(BigInteger)
    output_tokens: Mapped[int] = mapped_column(BigInteger)
    queue_seconds: Mapped[float] = mapped_column(Double)
    first_token_seconds: Mapped[float] = mapped_column(Double)
    seconds: Mapped[float] = mapped_column(Double)
    cost: Mapped[int] = mapped_column(BigInteger)
    load_seconds: Mapped[float] = mapped_column(Double, default=0.0, server_default="0")
    client_request_id: Mapped[str | None] = mapped_column(String(128))
    code: Mapped[str | None] = mapped_column(String(64))
    finish: Mapped[str | None] = mapped_column(String(16))
    numbered: Mapped[bool] = mapped_column(default=False, server_default=false())


class AuditRow(Base):
    """One change: who made it, to what, and what it was before and after. Rows are only ever added."""

    __tablename__ = "audit"
    __table_args__ = (Index("ix_audit_tenant_at", "tenant", "at"),)

    id: Mapped[int] = mapped_column(_RowId, primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    actor: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(64))
    tenant: Mapped[str | None] = mapped_column(String(63))
    target: Mapped[str | None] = mapped_column(String(200))
    before: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    after: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    request_id: Mapped[str | None] = mapped_column(String(64))


class MetaRow(Base):
    """Facts about the installation as a whole."""

    __tablename__ = "meta"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class ReplicaRow(Base):
    """A replica as it last announced itself; see ``adapters.store.replicas``."""

    __tablename__ = "replicas"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    url: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(String(16))
    started_at: Mapped[datetime] = mapped_column(UtcDateTime)
    beat_at: Mapped[datetime] = mapped_column(UtcDateTime)
    facts: Mapped[dict[str, Any]] = mapped_column(JSON)
    load: Mapped[dict[str, Any]] = mapped_column(JSON)


class FileRow(Base):
    """A customer's file; see ``adapters.store.files``. ``ready`` once all of its bytes are here.

    What a batch wrote has no pieces: it is that batch's results, those that failed or the others.
    """

    __tablename__ = "files"
    __table_args__ = (Index("ix_files_tenant_created_at", "tenant", "created_at"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    filename: Mapped[str] = mapped_column(String(255))
    purpose: Mapped[str] = mapped_column(String(32))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    ready: Mapped[bool]
    batch: Mapped[str | None] = mapped_column(String(64))
    failures: Mapped[bool] = mapped_column(default=False, server_default=false())
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)


class FilePieceRow(Base):
    __tablename__ = "file_pieces"

    file: Mapped[str] = mapped_column(ForeignKey("files.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    data: Mapped[bytes] = mapped_column(LargeBinary)


class BatchRow(Base):
    """See ``adapters.store.batches``. ``times`` are seconds since 1970 by state, ``counts`` are there once it
    has ended, ``key`` is the id of the key that asked for it.
    """

    __tablename__ = "batches"
    __table_args__ = (
        Index("ix_batches_tenant_created_at", "tenant", "created_at"),
        Index("ix_batches_state", "state"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    key: Mapped[str | None] = mapped_column(String(16))
    endpoint: Mapped[str] = mapped_column(String(64))
    input_file: Mapped[str] = mapped_column(String(64))
    output_file: Mapped[str | None] = mapped_column(String(64))
    error_file: Mapped[str | None] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16))
    total: Mapped[int]
    notes: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    errors: Mapped[list[dict[str, Any]] | None] = mapped_column(_Json)
    times: Mapped[dict[str, int]] = mapped_column(JSON)
    counts: Mapped[dict[str, int] | None] = mapped_column(_Json)
    keep_seconds: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)


class BatchResultRow(Base):
    """What became of one line: ``document`` is its line of the output or of the error file."""

    __tablename__ = "batch_results"

    batch: Mapped[str] = mapped_column(ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    failed: Mapped[bool]
    document: Mapped[str] = mapped_column(Text)
    size_bytes: Mapped[int]
    prompt_tokens: Mapped[int]
    cached_tokens: Mapped[int]
    output_tokens: Mapped[int]


class LeaseRow(Base):
    """What one process of a fleet does for all, until it is another's turn."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    holder: Mapped[str] = mapped_column(String(64))
    until: Mapped[datetime] = mapped_column(UtcDateTime)


def containing(column: SQLColumnExpression[str], part: str) -> ColumnElement[bool]:
    """Whether ``column`` has ``part`` in it, in letters of either case."""
    return func.lower(column).contains(part.lower().replace("\0", ""), autoescape=True)


def matching(query: Q, row: Any, wanted: Any, *columns: str) -> Q:
    """``query`` for rows of ``wanted.start`` <= at < ``wanted.end`` whose ``columns`` are as ``wanted`` has
    them; None is any."""
    for column in columns:
        if (value := getattr(wanted, column)) is not None:
            query = query.where(getattr(row, column) == value)
    if wanted.start is not None:
        query = query.where(row.at >= wanted.start)
    if wanted.end is not None:
        query = query.where(row.at < wanted.end)
    return query
