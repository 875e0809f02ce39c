"""Sessions, what is remembered of a device between its logins, and which logins were let in."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")  # sorts by code point on both databases


def upgrade() -> None:
    op.create_table(
        "sessions",
        sa.Column("node", TEXT, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("opened_at", sa.BigInteger(), nullable=False),
        sa.Column("device", TEXT, nullable=False),
        sa.Column("cell", TEXT, nullable=False),
        sa.Column("pid", TEXT),
        sa.Column("seen_at", sa.BigInteger(), nullable=False),
        sa.Column("replaced_at", sa.BigInteger()),
        sa.Column("ended_at", sa.BigInteger()),
        sa.ForeignKeyConstraint(["device"], ["devices.id"], name=op.f("fk_sessions_device"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("node", "name", "opened_at", name=op.f("pk_sessions")),
    )
    op.create_index(op.f("ix_sessions_device"), "sessions", ["device"])
    op.create_index(op.f("ix_sessions_name"), "sessions", ["name"])
    op.create_table(
        "guards",
        sa.Column("device", TEXT, nullable=False),
        sa.Column("logins_full_at", sa.BigInteger(), nullable=False),
        sa.Column("takeovers", TEXT, nullable=False),
        sa.Column("contested_until", sa.BigInteger(), nullable=False),
        sa.Column("throttled_until", sa.BigInteger(), nullable=False),
        sa.Column("strikes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["devices.id"], name=op.f("fk_guards_device"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("device", name=op.f("pk_guards")),
    )
    op.add_column("logins", sa.Column("admitted_at", sa.BigInteger()))
    op.add_column("logins", sa.Column("repeated_at", sa.BigInteger()))
