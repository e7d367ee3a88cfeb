"""Folder on the path of a process whose steps are to take long: Python imports `sitecustomize` at
its start."""
