"""Rollouts, and what tells two versions apart of a request: why its answer ended, whether it named one."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
ACTIVE = sa.text("state IN ('running', 'held')")


def upgrade() -> None:
    op.add_column("usage", sa.Column("finish", sa.String(16), nullable=True))
    op.add_column("usage", sa.Column("numbered", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table(
        "rollouts",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("adapter", sa.String(128), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("answering", sa.JSON(), nullable=False),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.Column("evidence", sa.JSON(), nullable=True),
        sa.Column("seen", sa.BigInteger(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"], name="fk_rollouts_tenants", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_rollouts"),
    )
    op.create_index("ix_rollouts_tenant_adapter", "rollouts", ["tenant", "adapter", "created_at"])
    op.create_index(
        "ix_rollouts_active",
        "rollouts",
        ["tenant", "adapter"],
        unique=True,
        sqlite_where=ACTIVE,
        postgresql_where=ACTIVE,
    )


def downgrade() -> None:
    op.drop_table("rollouts")
    op.drop_column("usage", "numbered")
    op.drop_column("usage", "finish")
