"""Grammars of texts: a JSON schema, a regular expression, a list of texts or a Lark grammar, as
llguidance reads them. Pure: what compiles them is in `workers.constraint`."""
