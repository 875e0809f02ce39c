"""The ports `Ledger` and `Registry` on SQLite and PostgreSQL; the only package that knows SQLAlchemy."""

from fabric.sql.migrate import SchemaOutdated, check_current, migrate
from fabric.sql.store import Store, open_store

__all__ = ["SchemaOutdated", "Store", "check_current", "migrate", "open_store"]
