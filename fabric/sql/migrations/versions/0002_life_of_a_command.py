"""Backlogs, idempotency keys, and the indexes of supersedes and retention."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")  # sorts by code point on both databases


def upgrade() -> None:
    op.add_column("devices", sa.Column("backlog", sa.BigInteger()))
    op.create_table(
        "idempotency",
        sa.Column("key", TEXT, nullable=False),
        sa.Column("device", TEXT, nullable=False),
        sa.Column("fingerprint", TEXT, nullable=False),
        sa.Column("command", TEXT, nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["devices.id"], name=op.f("fk_idempotency_device"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_idempotency")),
    )
    op.create_index(op.f("ix_idempotency_device"), "idempotency", ["device"])
    op.create_index(op.f("ix_idempotency_expires_at"), "idempotency", ["expires_at"])
    _partial(
        "ix_commands_supersedes",
        "commands",
        ["device", "supersedes"],
        "supersedes IS NOT NULL AND state IN ('accepted', 'queued')",
    )
    _partial("ix_commands_settled_at", "commands", ["settled_at"], "settled_at IS NOT NULL")
    _partial("ix_events_of_devices", "events", ["at"], "command IS NULL")
    _partial("ix_events_of_deletions", "events", ["device"], "kind = 'device.deleted'")


def _partial(name: str, table: str, columns: list[str], condition: str) -> None:
    op.create_index(name, table, columns, sqlite_where=sa.text(condition), postgresql_where=sa.text(condition))
