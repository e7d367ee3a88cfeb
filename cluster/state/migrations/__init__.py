"""alembic's folder: env.py, and a revision a file in versions/."""
