"""Jobs that start from an earlier result."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("start", sa.String(length=512), nullable=True))
        batch_op.add_column(sa.Column("start_kind", sa.String(length=16), nullable=True))
