"""The token automaton of a text that a grammar describes, without a chat's format."""

from cluster.grammars.grammar import Grammar
from cluster.harmony.encoding import HarmonyEncoding
from workers.constraint.automaton import AutomatonState, TokenAutomaton


def text_automaton(grammar: Grammar, encoding: HarmonyEncoding, vocab_size: int) -> TokenAutomaton:
    """Return the automaton of one text of the grammar and an end token of the model.

    Args:
        vocab_size: the model's, which can be larger than the tokenizer's.
    """
    ends = (encoding.return_, encoding.endoftext)
    others = tuple(i for i in range(vocab_size) if not encoding.token_bytes(i) and i not in ends)
    text = AutomatonState(forbidden=others, transitions=tuple((end, 1) for end in ends), grammar=0)
    return TokenAutomaton((text, AutomatonState(allowed=ends)), grammars=(grammar.text,))
