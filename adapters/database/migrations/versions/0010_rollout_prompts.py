"""Prompts that a rollout replays, of tenants that have agreed to it."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "tenants", sa.Column("sample_prompts", sa.Boolean(), nullable=False, server_default=sa.false())
    )
    op.create_table(
        "rollout_prompts",
        sa.Column(
            "id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("rollout", sa.String(32), nullable=False),
        sa.Column("key", sa.String(16), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=True),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(
            ["rollout"], ["rollouts.id"], name="fk_rollout_prompts_rollouts", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_rollout_prompts"),
    )
    op.create_index("ix_rollout_prompts_rollout", "rollout_prompts", ["rollout"])


def downgrade() -> None:
    op.drop_table("rollout_prompts")
    op.drop_column("tenants", "sample_prompts")
