"""Who did what, in a table that is only added to."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")  # sorts by code point on both databases
SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

KEPT = 90 * 86_400  # seconds
REFUSED = "'the audit is append-only'"
GUARDS = {
    "sqlite": (
        f"CREATE TRIGGER audit_update BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, {REFUSED}); END",
        f"""CREATE TRIGGER audit_delete BEFORE DELETE ON audit
        WHEN OLD.at >= (CAST(strftime('%s', 'now') AS INTEGER) - {KEPT}) * 1000000
        BEGIN SELECT RAISE(ABORT, {REFUSED}); END""",
        # INSERT OR REPLACE deletes without that trigger.
        f"""CREATE TRIGGER audit_replace BEFORE INSERT ON audit
        WHEN EXISTS (SELECT 1 FROM audit WHERE position = NEW.position)
        BEGIN SELECT RAISE(ABORT, {REFUSED}); END""",  # noqa: S608 - of constants
    ),
    "postgresql": (
        f"""CREATE OR REPLACE FUNCTION audit_is_append_only() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF TG_OP = 'DELETE' AND OLD.at < (extract(epoch FROM clock_timestamp()) - {KEPT}) * 1000000 THEN
        RETURN OLD; END IF; RAISE EXCEPTION {REFUSED}; END $$""",
        """CREATE TRIGGER audit_change BEFORE UPDATE OR DELETE ON audit
        FOR EACH ROW EXECUTE FUNCTION audit_is_append_only()""",
        """CREATE TRIGGER audit_truncate BEFORE TRUNCATE ON audit
        FOR EACH STATEMENT EXECUTE FUNCTION audit_is_append_only()""",
    ),
}


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("position", SERIAL, autoincrement=True, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("kind", TEXT, nullable=False),
        sa.Column("subject", TEXT),
        sa.Column("issuer", TEXT),
        sa.Column("jti", TEXT),
        sa.Column("address", TEXT),
        sa.Column("request", TEXT),
        sa.Column("action", TEXT, nullable=False),
        sa.Column("device", TEXT),
        sa.Column("outcome", TEXT, nullable=False),
        sa.Column("detail", TEXT, nullable=False),
        sa.PrimaryKeyConstraint("position", name=op.f("pk_audit")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_audit_by_time", "audit", ["at", "position"])
    held = sa.text("device IS NOT NULL")
    op.create_index(
        "ix_audit_by_device", "audit", ["device", "at", "position"], sqlite_where=held, postgresql_where=held
    )
    op.create_index("ix_audit_by_subject", "audit", ["subject", "at", "position"])
    op.create_index("ix_audit_by_action", "audit", ["action", "at", "position"])
    connection = op.get_bind()
    for statement in GUARDS[connection.dialect.name]:
        connection.exec_driver_sql(statement)
