"""Callers of external providers: who of them was revoked, and which tokens they made."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")  # sorts by code point on both databases


def upgrade() -> None:
    op.add_column("tokens", sa.Column("minter", TEXT))
    op.create_index(op.f("ix_tokens_minter"), "tokens", ["minter"])
    op.create_table(
        "revoked_identities",
        sa.Column("identity", TEXT, nullable=False),
        sa.Column("not_before", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("identity", name=op.f("pk_revoked_identities")),
    )
    op.create_index(op.f("ix_revoked_identities_not_before"), "revoked_identities", ["not_before"])
