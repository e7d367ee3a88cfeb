"""Run by alembic for each upgrade, on the connection and in the transaction of
`cluster.state.migrate`."""

from alembic import context

from cluster.state.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
