"""Why connections are to be closed, so that what a suspension queued can be taken back."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"

TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")  # sorts by code point on both databases
SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
WHY = "why IN ('suspended', 'revoked', 'enrolled-again', 'deleted', 'key-revoked', 'key-retired')"


def upgrade() -> None:
    queued = op.get_bind().execute(sa.text("SELECT device FROM closures ORDER BY id")).scalars().all()
    op.drop_table("closures")
    closures = op.create_table(
        "closures",
        sa.Column("id", SERIAL, autoincrement=True, nullable=False),
        sa.Column("device", TEXT, nullable=False),
        sa.Column("why", TEXT, nullable=False),
        sa.CheckConstraint(WHY, name=op.f("ck_closures_why")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_closures")),
        sqlite_autoincrement=True,
    )
    # Nobody knows why any more; of these, nothing takes a revocation's back.
    op.bulk_insert(closures, [{"device": device, "why": "revoked"} for device in queued])
