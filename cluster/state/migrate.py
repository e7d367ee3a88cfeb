"""Creation and upgrades of the schema, by alembic."""

import logging
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent / "migrations"
_LOCK_KEY = 0x63616E74617461
"""Key of PostgreSQL's advisory lock for upgrades: the bytes of the name cantata."""


class SchemaIsNewer(Exception):
    """The database was made by a newer version; the message is one sentence."""


def upgrade(connection: Connection) -> None:
    """Bring the schema to this version's, in the connection's transaction, which is to write. Of
    several copies that start at once one does it, and the others wait.

    Raises:
        SchemaIsNewer: it is of a version that this one does not know.
    """
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK_KEY})")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = configuration()
    script = ScriptDirectory.from_config(config)
    current = MigrationContext.configure(connection).get_current_revision()
    head = script.get_current_head()
    if current == head:
        return
    if current is not None and current not in {revision.revision for revision in script.walk_revisions()}:
        raise SchemaIsNewer(
            f"the state database has a schema of a newer version of Cantata (revision {current}, and this "
            f"version knows none after {head}): upgrade Cantata, or set state.url to another database"
        )
    if current is not None:
        logger.info("upgrading the schema of the state database from revision %s to %s", current, head)
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def configuration() -> Config:
    """Return alembic's configuration."""
    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    return config
