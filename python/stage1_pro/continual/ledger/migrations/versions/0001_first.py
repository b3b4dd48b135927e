"""The tables of stores that were made before versions were written; a later revision changes them.

A revision changes tables that are there (an old store may lack some: they are created as declared) and, where it
copies a table on SQLite, puts the table's triggers back. ``schema.HEAD`` names the newest.
"""

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Change nothing."""
