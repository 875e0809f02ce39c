"""Alembic's entry: runs on the connection that `fabric.sql.migrate` has opened and locked."""

from alembic import context

from fabric.sql import schema

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=schema.metadata,
    transactional_ddl=True,  # on SQLite too: the caller has begun the transaction
)
with context.begin_transaction():
    context.run_migrations()
