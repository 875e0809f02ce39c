"""Several keys for a device, each with the one it was registered under, and when a generation began."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")  # sorts by code point on both databases


def upgrade() -> None:
    op.add_column("device_keys", sa.Column("parent", TEXT))
    op.add_column("device_keys", sa.Column("retired_at", sa.BigInteger()))
    op.add_column("devices", sa.Column("renewed_at", sa.BigInteger()))
