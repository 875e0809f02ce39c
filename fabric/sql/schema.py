"""The tables. One schema for SQLite and PostgreSQL: text, integers and bytes, no dialect's own types.

All times are integer microseconds since the epoch on the database's clock. `CommandId` and `DeviceId` are
text. The CHECK on a command's state comes from `fabric.command.State`, so that the database refuses what the
transition table does not know.
"""

from enum import StrEnum
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator

from fabric.command import State
from fabric.text import clean

STATES: Final = tuple(state.value for state in State)


class Why(StrEnum):
    """What a device's connections are closed for."""

    SUSPENDED = "suspended"
    REVOKED = "revoked"
    ENROLLED_AGAIN = "enrolled-again"
    DELETED = "deleted"
    KEY_REVOKED = "key-revoked"
    KEY_RETIRED = "key-retired"


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
    sa.Column("backlog", _Int),  # commands that may wait for it; NULL: the fabric's default
    sa.Column("renewed_at", _Int),  # when this generation followed another; NULL: the device was made with it
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
    sa.Column("parent", _Text),  # the key that authorized it, which may be gone; NULL: an enrollment did
    sa.Column("retired_at", _Int),  # good for nothing since then, but still the parent of others
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
    sa.Column("admitted_at", _Int),  # NULL: it was not let in
    sa.Column("repeated_at", _Int),  # of the broker's second question about it
)

# The connections of devices as the broker tells of them: `fabric.presence.Session`. One that has ended is kept a while.
sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("node", _Text, primary_key=True),
    sa.Column("name", _Text, primary_key=True, index=True),
    sa.Column("opened_at", _Int, primary_key=True),
    sa.Column("device", _Text, sa.ForeignKey("devices.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("cell", _Text, nullable=False),
    sa.Column("pid", _Text),
    sa.Column("seen_at", _Int, nullable=False),
    sa.Column("replaced_at", _Int),
    sa.Column("ended_at", _Int),
)

# What is remembered of a device between its logins: `fabric.identity.admission.Guard`.
guards = sa.Table(
    "guards",
    metadata,
    sa.Column("device", _Text, sa.ForeignKey("devices.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("logins_full_at", _Int, nullable=False),
    sa.Column("takeovers", _Text, nullable=False),  # a JSON array of times
    sa.Column("contested_until", _Int, nullable=False),
    sa.Column("throttled_until", _Int, nullable=False),
    sa.Column("strikes", _Int, nullable=False),
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
    sa.Column("parent", _Text, index=True),  # the token it was made with
    sa.Column("minter", _Text, index=True),  # the external identity that it was made by
    sa.Index("ix_tokens_subject", "subject"),
)

# External identities whose tokens count only when they were issued later; kept for as long as one could live.
revoked_identities = sa.Table(
    "revoked_identities",
    metadata,
    sa.Column("identity", _Text, primary_key=True),
    sa.Column("not_before", _Int, nullable=False, index=True),
)

closures = sa.Table(
    "closures",
    metadata,
    sa.Column("id", _Serial, primary_key=True, autoincrement=True),
    sa.Column("device", _Text, nullable=False),
    sa.Column("why", _Text, nullable=False),
    sa.CheckConstraint("why IN ({})".format(", ".join(f"'{why}'" for why in Why)), name="why"),
    sqlite_autoincrement=True,
)

# What was taken away and is not known to be in the revocation log yet: `fabric.identity.revoked`.
unlogged = sa.Table(
    "unlogged",
    metadata,
    sa.Column("id", _Serial, primary_key=True, autoincrement=True),
    sa.Column("line", _Text, nullable=False),  # a JSON object
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


# Which command an issuer's `Idempotency-Key` stands for, and the request it was made with. `key` is a digest of
# the device, the issuer and what the issuer sent.
idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("key", _Text, primary_key=True),
    sa.Column("device", _Text, sa.ForeignKey("devices.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("fingerprint", _Text, nullable=False),
    sa.Column("command", _Text, nullable=False),
    sa.Column("expires_at", _Int, nullable=False, index=True),
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
sa.Index(
    "ix_commands_supersedes",
    commands.c.device,
    commands.c.supersedes,
    **_where("supersedes IS NOT NULL AND state IN ('accepted', 'queued')"),
)
sa.Index("ix_commands_settled_at", commands.c.settled_at, **_where("settled_at IS NOT NULL"))
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
sa.Index("ix_events_of_devices", events.c.at, **_where("command IS NULL"))
sa.Index("ix_events_of_deletions", events.c.device, **_where("kind = 'device.deleted'"))
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

# Each gateway that serves, until its lease runs out.
gateways = sa.Table(
    "gateways",
    metadata,
    sa.Column("id", _Text, primary_key=True),
    sa.Column("until", _Int, nullable=False),
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

# Who did what. Rows are added, never changed, and deleted only when they are older than `AUDIT_KEPT`: the database
# itself refuses the rest, by its own clock.
audit = sa.Table(
    "audit",
    metadata,
    sa.Column("position", _Serial, primary_key=True, autoincrement=True),
    sa.Column("at", _Int, nullable=False),
    sa.Column("kind", _Text, nullable=False),
    sa.Column("subject", _Text),
    sa.Column("issuer", _Text),
    sa.Column("jti", _Text),
    sa.Column("address", _Text),
    sa.Column("request", _Text),
    sa.Column("action", _Text, nullable=False),
    sa.Column("device", _Text),
    sa.Column("outcome", _Text, nullable=False),
    sa.Column("detail", _Text, nullable=False),  # a JSON object
    sqlite_autoincrement=True,
)
sa.Index("ix_audit_by_time", audit.c.at, audit.c.position)
sa.Index("ix_audit_by_device", audit.c.device, audit.c.at, audit.c.position, **_where("device IS NOT NULL"))
sa.Index("ix_audit_by_subject", audit.c.subject, audit.c.at, audit.c.position)
sa.Index("ix_audit_by_action", audit.c.action, audit.c.at, audit.c.position)

AUDIT_KEPT: Final = 90 * 86_400  # seconds
_REFUSED = "'the audit is append-only'"
_GUARDS: Final = {
    "sqlite": (
        f"CREATE TRIGGER audit_update BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, {_REFUSED}); END",
        f"""CREATE TRIGGER audit_delete BEFORE DELETE ON audit
        WHEN OLD.at >= (CAST(strftime('%s', 'now') AS INTEGER) - {AUDIT_KEPT}) * 1000000
        BEGIN SELECT RAISE(ABORT, {_REFUSED}); END""",
        # INSERT OR REPLACE deletes without that trigger.
        f"""CREATE TRIGGER audit_replace BEFORE INSERT ON audit
        WHEN EXISTS (SELECT 1 FROM audit WHERE position = NEW.position)
        BEGIN SELECT RAISE(ABORT, {_REFUSED}); END""",  # noqa: S608 - of constants
    ),
    "postgresql": (
        f"""CREATE OR REPLACE FUNCTION audit_is_append_only() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF TG_OP = 'DELETE' AND OLD.at < (extract(epoch FROM clock_timestamp()) - {AUDIT_KEPT}) * 1000000 THEN
        RETURN OLD; END IF; RAISE EXCEPTION {_REFUSED}; END $$""",
        """CREATE TRIGGER audit_change BEFORE UPDATE OR DELETE ON audit
        FOR EACH ROW EXECUTE FUNCTION audit_is_append_only()""",
        """CREATE TRIGGER audit_truncate BEFORE TRUNCATE ON audit
        FOR EACH STATEMENT EXECUTE FUNCTION audit_is_append_only()""",
    ),
}


@sa.event.listens_for(audit, "after_create")
def _guard_audit(_: sa.Table, connection: sa.Connection, **__: object) -> None:
    for statement in _GUARDS[connection.dialect.name]:
        connection.exec_driver_sql(statement)
