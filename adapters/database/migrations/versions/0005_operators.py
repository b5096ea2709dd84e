"""Single requests in full, suspended tenants, notes on versions, uploads as jobs, and named admin keys."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column("usage", sa.Column("load_seconds", sa.Double(), nullable=False, server_default="0"))
    op.add_column("usage", sa.Column("client_request_id", sa.String(128), nullable=True))
    op.add_column("usage", sa.Column("code", sa.String(64), nullable=True))
    op.create_index("ix_usage_request_id", "usage", ["request_id"])
    op.add_column("tenants", sa.Column("suspended", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("versions", sa.Column("note", sa.String(500), nullable=True))
    op.add_column("versions", sa.Column("uploader", sa.String(64), nullable=True))
    op.create_table(
        "upload_jobs",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("adapter", sa.String(128), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("received_bytes", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.String(64), nullable=False),
        sa.Column("request_id", sa.String(64), nullable=True),
        sa.Column("answer", sa.JSON(), nullable=True),
        sa.Column("code", sa.String(64), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant"], ["tenants.id"], name="fk_upload_jobs_tenants", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_upload_jobs"),
    )
    op.create_index("ix_upload_jobs_tenant_created_at", "upload_jobs", ["tenant", "created_at"])
    op.create_table(
        "admin_keys",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("name", sa.String(50), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("expires_at", TIME, nullable=True),
        sa.Column("last_used_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_admin_keys"),
        sa.UniqueConstraint("name", name="uq_admin_keys_name"),
        sa.UniqueConstraint("digest", name="uq_admin_keys_digest"),
    )


def downgrade() -> None:
    op.drop_table("admin_keys")
    op.drop_table("upload_jobs")
    op.drop_column("versions", "uploader")
    op.drop_column("versions", "note")
    op.drop_column("tenants", "suspended")
    op.drop_index("ix_usage_request_id", "usage")
    for column in ("code", "client_request_id", "load_seconds"):
        op.drop_column("usage", column)
