"""Events are numbered in the order of ingestion, so that a look finds those that are new; old ones have no number."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column; an index on it comes with what is declared."""
    op.add_column("events", sa.Column("seq", sa.BigInteger(), comment="in the order of ingestion; null: ingested by a "
                                      "version that did not count"))  # fmt: skip
