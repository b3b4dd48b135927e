"""Run by alembic for every migration: on the connection, and in the transaction, that ``schema`` hands over."""

from alembic import context

from stage1_pro.continual.ledger.schema import VERSION, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION.name,
    render_as_batch=True,  # SQLite alters a table by copying it.
)
context.run_migrations()
