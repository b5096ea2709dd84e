"""Shares of versions, how many are kept, their golden probes, and answers to uploads that may be repeated."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("adapters") as adapters:
        adapters.add_column(sa.Column("split", sa.JSON(), nullable=True))
        adapters.add_column(sa.Column("keep_versions", sa.Integer(), nullable=True))
    op.add_column("versions", sa.Column("golden", sa.JSON(), nullable=True))
    op.create_table(
        "uploads",
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("answer", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"], name="fk_uploads_tenants", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("tenant", "key", name="pk_uploads"),
    )
    op.create_index("ix_uploads_created_at", "uploads", ["created_at"])


def downgrade() -> None:
    op.drop_table("uploads")
    with op.batch_alter_table("versions") as versions:
        versions.drop_column("golden")
    with op.batch_alter_table("adapters") as adapters:
        adapters.drop_column("keep_versions")
        adapters.drop_column("split")
