"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")  # sorts by code point on both databases
SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # only INTEGER PRIMARY KEY counts by itself there


def upgrade() -> None:
    op.create_table(
        "closures",
        sa.Column("id", SERIAL, autoincrement=True, nullable=False),
        sa.Column("device", TEXT, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_closures")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "commands",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("device", TEXT, nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("content_type", TEXT, nullable=False),
        sa.Column("issuer", TEXT, nullable=False),
        sa.Column("claim", sa.Boolean(), nullable=False),
        sa.Column("supersedes", TEXT),
        sa.Column("accepted_at", sa.BigInteger(), nullable=False),
        sa.Column("deadline", sa.BigInteger(), nullable=False),
        sa.Column("response_timeout", sa.BigInteger(), nullable=False),
        sa.Column("sig", TEXT, nullable=False),
        sa.Column("sig_kid", TEXT, nullable=False),
        sa.Column("traceparent", TEXT),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("reason", TEXT),
        sa.Column("late", sa.Boolean(), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("copies", TEXT, nullable=False),
        sa.Column("publish_due", sa.BigInteger()),
        sa.Column("holder", TEXT),
        sa.Column("response_due", sa.BigInteger()),
        sa.Column("settled_at", sa.BigInteger()),
        sa.Column("progress", TEXT),
        sa.Column("outcome_status", TEXT),
        sa.Column("outcome_reason", TEXT),
        sa.Column("outcome_content_type", TEXT),
        sa.Column("outcome_body", sa.LargeBinary()),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("due", sa.BigInteger()),
        sa.CheckConstraint(
            "state IN ('accepted', 'queued', 'delivered', 'running', 'succeeded', 'failed', 'rejected', 'expired', "
            "'cancelled', 'undeliverable', 'unanswered')",
            name=op.f("ck_commands_state"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_commands")),
        sa.UniqueConstraint("device", "generation", "seq", name=op.f("uq_commands_device_generation_seq")),
    )
    op.create_index("ix_commands_by_device", "commands", ["device", "accepted_at", "id"])
    op.create_index("ix_commands_by_issuer", "commands", ["issuer", "accepted_at", "id"])
    op.create_index("ix_commands_by_time", "commands", ["accepted_at", "id"])
    op.create_index(
        "ix_commands_due",
        "commands",
        ["due"],
        sqlite_where=sa.text("due IS NOT NULL"),
        postgresql_where=sa.text("due IS NOT NULL"),
    )
    op.create_index(
        "ix_commands_in_mailbox",
        "commands",
        ["device", "deadline"],
        sqlite_where=sa.text("state IN ('accepted', 'queued', 'cancelled')"),
        postgresql_where=sa.text("state IN ('accepted', 'queued', 'cancelled')"),
    )
    op.create_index(
        "ix_commands_publish_due",
        "commands",
        ["publish_due"],
        sqlite_where=sa.text("publish_due IS NOT NULL"),
        postgresql_where=sa.text("publish_due IS NOT NULL"),
    )
    op.create_table(
        "devices",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("cell", TEXT, nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("groups", TEXT, nullable=False),
        sa.Column("labels", TEXT, nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("next_seq", sa.BigInteger(), nullable=False),
        sa.Column("enrolled_at", sa.BigInteger()),
        sa.Column("last_seen", sa.BigInteger()),
        sa.Column("agent_version", TEXT),
        sa.Column("connected", sa.Boolean(), nullable=False),
        sa.Column("connection_since", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_devices")),
    )
    op.create_table(
        "events",
        sa.Column("id", SERIAL, autoincrement=True, nullable=False),
        sa.Column("position", sa.BigInteger()),
        sa.Column("kind", TEXT, nullable=False),
        sa.Column("device", TEXT, nullable=False),
        sa.Column("command", TEXT),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("state", TEXT),
        sa.Column("evidence", TEXT),
        sa.Column("detail", TEXT),
        sa.Column("changed", sa.Boolean()),
        sa.Column("document", TEXT, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
        sa.UniqueConstraint("position", name=op.f("uq_events_position")),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ix_events_command",
        "events",
        ["command", "id"],
        sqlite_where=sa.text("command IS NOT NULL"),
        postgresql_where=sa.text("command IS NOT NULL"),
    )
    op.create_index(
        "ix_events_unsequenced",
        "events",
        ["id"],
        sqlite_where=sa.text("position IS NULL"),
        postgresql_where=sa.text("position IS NULL"),
    )
    op.create_table(
        "generations",
        sa.Column("device", TEXT, nullable=False),
        sa.Column("last", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("device", name=op.f("pk_generations")),
    )
    op.create_table(
        "leases",
        sa.Column("name", TEXT, nullable=False),
        sa.Column("owner", TEXT),
        sa.Column("until", sa.BigInteger(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("published", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_leases")),
    )
    op.create_table(
        "logins",
        sa.Column("device", TEXT, nullable=False),
        sa.Column("jti_hash", TEXT, nullable=False),
        sa.Column("first_use", sa.BigInteger(), nullable=False),
        sa.Column("last_use", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("device", "jti_hash", name=op.f("pk_logins")),
    )
    op.create_index(op.f("ix_logins_expires_at"), "logins", ["expires_at"])
    op.create_table(
        "meta",
        sa.Column("name", TEXT, nullable=False),
        sa.Column("value", TEXT, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_meta")),
    )
    op.create_table(
        "quarantine",
        sa.Column("id", SERIAL, autoincrement=True, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("source", TEXT, nullable=False),
        sa.Column("device", TEXT, nullable=False),
        sa.Column("routing_key", TEXT, nullable=False),
        sa.Column("reason", TEXT, nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_quarantine")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_quarantine_device"), "quarantine", ["device"])
    op.create_table(
        "tokens",
        sa.Column("jti", TEXT, nullable=False),
        sa.Column("subject", TEXT, nullable=False),
        sa.Column("scopes", TEXT, nullable=False),
        sa.Column("issued_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("revoked_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("jti", name=op.f("pk_tokens")),
    )
    op.create_table(
        "codes",
        sa.Column("code_hash", TEXT, nullable=False),
        sa.Column("device", TEXT, nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("used_by", TEXT),
        sa.ForeignKeyConstraint(["device"], ["devices.id"], name=op.f("fk_codes_device"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("code_hash", name=op.f("pk_codes")),
    )
    op.create_index(op.f("ix_codes_device"), "codes", ["device"])
    op.create_table(
        "device_keys",
        sa.Column("kid", TEXT, nullable=False),
        sa.Column("device", TEXT, nullable=False),
        sa.Column("jwk", TEXT, nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("last_used", sa.BigInteger()),
        sa.ForeignKeyConstraint(["device"], ["devices.id"], name=op.f("fk_device_keys_device"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("kid", name=op.f("pk_device_keys")),
    )
    op.create_index(op.f("ix_device_keys_device"), "device_keys", ["device"])
