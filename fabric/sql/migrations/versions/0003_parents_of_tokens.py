"""Which token a token was made with, so that revoking the one revokes the other."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")  # sorts by code point on both databases


def upgrade() -> None:
    op.add_column("tokens", sa.Column("parent", TEXT))
    op.create_index(op.f("ix_tokens_parent"), "tokens", ["parent"])
    op.create_index(op.f("ix_tokens_subject"), "tokens", ["subject"])
