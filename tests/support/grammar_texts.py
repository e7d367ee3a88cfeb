"""Which texts a grammar has."""

from llguidance import LLMatcher, LLParserLimits

from cluster.grammars.byte_tokenizer import byte_tokenizer
from workers.grammars.grammar import Grammar

_TOKENIZER = byte_tokenizer()


class Texts:
    """The texts of a grammar, asked for with `in`; fails for a grammar that does not compile."""

    def __init__(self, grammar: Grammar, limits: LLParserLimits | None = None) -> None:
        self._matcher = LLMatcher(_TOKENIZER, grammar.text, log_level=0, limits=limits)
        assert not self._matcher.is_error(), self._matcher.get_error()

    def __contains__(self, text: str) -> bool:
        matcher = self._matcher.deep_copy()
        tokens = list(text.encode())
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()
