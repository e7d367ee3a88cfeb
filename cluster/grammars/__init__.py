"""The check that grammars of what clients ask for compile within bounds."""
