"""Grammars of what clients ask for, and the check that they compile within bounds."""
