"""Alembic's entry: runs the migrations on the connection, and in the transaction, that `schema.migrate` hands in."""

from alembic import context

from agent_runtime_sql.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    version_table=context.config.attributes["version_table"],
    target_metadata=metadata,
)
with context.begin_transaction():
    context.run_migrations()
