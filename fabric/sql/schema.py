"""The tables. One schema for SQLite and PostgreSQL: text, integers and bytes, no dialect's own types.

All times are integer microseconds since the epoch on the database's clock. `CommandId` and `DeviceId` are
text. The CHECK on a command's state comes from `fabric.command.State`, so that the database refuses what the
transition table does not know.
"""

from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator

from fabric.command import State

STATES: Final = tuple(state.value for state in State)


class CleanText(TypeDecorator[str]):
    """Text that any database takes: PostgreSQL refuses NUL, every driver refuses lone surrogates. Both become
    U+FFFD, on the way in and in comparisons alike. It sorts by code point on both databases."""

    impl = sa.Text
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[str]:
        # Not through `type_descriptor`, which makes a VARCHAR of it.
        return sa.Text(collation="C" if dialect.name == "postgresql" else None)

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:  # noqa: ARG002 - SQLAlchemy's signature
        return value if value is None else clean(value)


def clean(text: str) -> str:
    """The text without NUL and lone surrogates."""
    if "\x00" in text:
        text = text.replace("\x00", "\ufffd")
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


_Text = CleanText()
_Int = sa.BigInteger()
_Serial = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # only INTEGER PRIMARY KEY counts by itself there

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

meta = sa.Table(
    "meta",
    metadata,
    sa.Column("name", _Text, primary_key=True),
    sa.Column("value", _Text, nullable=False),
)

devices = sa.Table(
    "devices",
    metadata,
    sa.Column("id", _Text, primary_key=True),
    sa.Column("cell", _Text, nullable=False),
    sa.Column("generation", _Int, nullable=False),
    sa.Column("groups", _Text, nullable=False),  # a JSON array
    sa.Column("labels", _Text, nullable=False),  # a JSON object
    sa.Column("enabled", sa.Boolean(), nullable=False),
    sa.Column("created_at", _Int, nullable=False),
    sa.Column("version", _Int, nullable=False),
    sa.Column("next_seq", _Int, nullable=False),
    sa.Column("enrolled_at", _Int),  # of this generation
    sa.Column("last_seen", _Int),
    sa.Column("agent_version", _Text),
    sa.Column("connected", sa.Boolean(), nullable=False),
    sa.Column("connection_since", _Int),
)

# The last generation of every id there ever was; a deleted device leaves its row here.
generations = sa.Table(
    "generations",
    metadata,
    sa.Column("device", _Text, primary_key=True),
    sa.Column("last", _Int, nullable=False),
)

device_keys = sa.Table(
    "device_keys",
    metadata,
    sa.Column("kid", _Text, primary_key=True),  # the thumbprint: one key is one device's
    sa.Column("device", _Text, sa.ForeignKey("devices.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("jwk", _Text, nullable=False),
    sa.Column("created_at", _Int, nullable=False),
    sa.Column("last_used", _Int),
)

codes = sa.Table(
    "codes",
    metadata,
    sa.Column("code_hash", _Text, primary_key=True),
    sa.Column("device", _Text, sa.ForeignKey("devices.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("expires_at", _Int, nullable=False),
    sa.Column("used_by", _Text),
)

# One row for each token that was used to log in, until it has expired; kept when its device is deleted.
logins = sa.Table(
    "logins",
    metadata,
    sa.Column("device", _Text, primary_key=True),
    sa.Column("jti_hash", _Text, primary_key=True),
    sa.Column("first_use", _Int, nullable=False),
    sa.Column("last_use", _Int, nullable=False),
    sa.Column("expires_at", _Int, nullable=False, index=True),
)

tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("jti", _Text, primary_key=True),
    sa.Column("subject", _Text, nullable=False),
    sa.Column("scopes", _Text, nullable=False),  # a JSON array
    sa.Column("issued_at", _Int, nullable=False),
    sa.Column("expires_at", _Int, nullable=False),
    sa.Column("revoked_at", _Int),
)

closures = sa.Table(
    "closures",
    metadata,
    sa.Column("id", _Serial, primary_key=True, autoincrement=True),
    sa.Column("device", _Text, nullable=False),
    sqlite_autoincrement=True,
)

commands = sa.Table(
    "commands",
    metadata,
    sa.Column("id", _Text, primary_key=True),
    sa.Column("device", _Text, nullable=False),
    sa.Column("generation", _Int, nullable=False),
    sa.Column("seq", _Int, nullable=False),
    sa.Column("name", _Text, nullable=False),
    sa.Column("body", sa.LargeBinary(), nullable=False),
    sa.Column("content_type", _Text, nullable=False),
    sa.Column("issuer", _Text, nullable=False),
    sa.Column("claim", sa.Boolean(), nullable=False),
    sa.Column("supersedes", _Text),
    sa.Column("accepted_at", _Int, nullable=False),
    sa.Column("deadline", _Int, nullable=False),
    sa.Column("response_timeout", _Int, nullable=False),
    sa.Column("sig", _Text, nullable=False),
    sa.Column("sig_kid", _Text, nullable=False),
    sa.Column("traceparent", _Text),
    sa.Column("state", _Text, nullable=False),
    sa.Column("reason", _Text),
    sa.Column("late", sa.Boolean(), nullable=False),
    sa.Column("attempt", _Int, nullable=False),
    sa.Column("copies", _Text, nullable=False),  # attempt numbers, comma-separated
    sa.Column("publish_due", _Int),
    sa.Column("holder", _Text),
    sa.Column("response_due", _Int),
    sa.Column("settled_at", _Int),
    sa.Column("progress", _Text),
    sa.Column("outcome_status", _Text),
    sa.Column("outcome_reason", _Text),
    sa.Column("outcome_content_type", _Text),
    sa.Column("outcome_body", sa.LargeBinary()),
    sa.Column("version", _Int, nullable=False),
    sa.Column("rows", _Int, nullable=False),
    sa.Column("due", _Int),  # Command.due: when the clock next has something to say; NULL once settled
    sa.CheckConstraint("state IN ({})".format(", ".join(f"'{state}'" for state in STATES)), name="state"),
    sa.UniqueConstraint("device", "generation", "seq"),
)


def _where(condition: str) -> Any:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


sa.Index("ix_commands_due", commands.c.due, **_where("due IS NOT NULL"))
sa.Index("ix_commands_publish_due", commands.c.publish_due, **_where("publish_due IS NOT NULL"))
sa.Index(
    "ix_commands_in_mailbox",
    commands.c.device,
    commands.c.deadline,
    **_where("state IN ('accepted', 'queued', 'cancelled')"),
)
sa.Index("ix_commands_by_time", commands.c.accepted_at, commands.c.id)
sa.Index("ix_commands_by_device", commands.c.device, commands.c.accepted_at, commands.c.id)
sa.Index("ix_commands_by_issuer", commands.c.issuer, commands.c.accepted_at, commands.c.id)

# The timeline of commands, what happened to devices, the outbox and the event log, all at once. `position` is
# the sequencer's; NULL until it has passed.
events = sa.Table(
    "events",
    metadata,
    sa.Column("id", _Serial, primary_key=True, autoincrement=True),
    sa.Column("position", _Int, unique=True),
    sa.Column("kind", _Text, nullable=False),
    sa.Column("device", _Text, nullable=False),
    sa.Column("command", _Text),
    sa.Column("version", _Int, nullable=False),
    sa.Column("at", _Int, nullable=False),
    sa.Column("state", _Text),
    sa.Column("evidence", _Text),
    sa.Column("detail", _Text),
    sa.Column("changed", sa.Boolean()),
    sa.Column("document", _Text, nullable=False),  # a JSON object
    sqlite_autoincrement=True,
)
sa.Index("ix_events_unsequenced", events.c.id, **_where("position IS NULL"))
sa.Index("ix_events_command", events.c.command, events.c.id, **_where("command IS NOT NULL"))

# `position` is the last one given, `published` the last one marked published.
leases = sa.Table(
    "leases",
    metadata,
    sa.Column("name", _Text, primary_key=True),
    sa.Column("owner", _Text),
    sa.Column("until", _Int, nullable=False),
    sa.Column("position", _Int, nullable=False),
    sa.Column("published", _Int, nullable=False),
)

quarantine = sa.Table(
    "quarantine",
    metadata,
    sa.Column("id", _Serial, primary_key=True, autoincrement=True),
    sa.Column("at", _Int, nullable=False),
    sa.Column("source", _Text, nullable=False),
    sa.Column("device", _Text, nullable=False, index=True),  # '' when it is unknown
    sa.Column("routing_key", _Text, nullable=False),
    sa.Column("reason", _Text, nullable=False),
    sa.Column("body", sa.LargeBinary(), nullable=False),
    sqlite_autoincrement=True,
)
