"""The ports `Ledger` and `Registry` on SQLite and PostgreSQL; the only package that knows SQLAlchemy."""

from fabric.sql.migrate import (
    SchemaOutdated,
    accept_revocation_log,
    check_current,
    migrate,
    renew_incarnation,
)
from fabric.sql.store import Store, open_store

__all__ = [
    "SchemaOutdated",
    "Store",
    "accept_revocation_log",
    "check_current",
    "migrate",
    "open_store",
    "renew_incarnation",
]
