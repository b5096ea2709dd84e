"""Alembic's entry point. ``Database.open`` runs it on its own connection, in its own transaction."""

from alembic import context

from adapters.database.rows import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
