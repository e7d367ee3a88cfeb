"""What llguidance may use for one grammar, wherever it compiles: what a gateway's check allows, an
engine allows too."""

from llguidance import LLParserLimits

MAX_LEXER_STATES = 50_000
"""Maximum number of states of a grammar's lexer, each about 2 kB: they are made as texts come, and
kept by the matcher of which all texts' matchers are copies; an engine replaces a full one."""


def parser_limits() -> LLParserLimits:
    """Return the limits. Messages quote no parser state, and so no schema."""
    return LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
