"""What an adapter says where a request says nothing."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("adapters", sa.Column("defaults", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("adapters", "defaults")
