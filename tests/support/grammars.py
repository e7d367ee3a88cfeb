"""A model with a tokenizer, and automata whose bodies have grammars."""

import json
from dataclasses import replace
from pathlib import Path

from llguidance import LLMatcher
from tokenizers import Tokenizer

from cluster.harmony.make_tokenizer import write_bpe_tokenizer
from tests.support.tiny_model import TINY
from workers.constraint.automaton import AutomatonState, TokenAutomaton
from workers.model.make_checkpoint import write_checkpoint

VOCAB_SIZE = 700
NUM_TOKENS = 600
"""Number of tokens of the tokenizer: the model has ids without one."""


def write_checkpoint_with_tokenizer(path: Path) -> Path:
    write_checkpoint(path, replace(TINY, vocab_size=VOCAB_SIZE), seed=0)
    write_bpe_tokenizer(path, NUM_TOKENS)
    return path


def schema_grammar(schema: object) -> str:
    """Return a grammar of JSON without blanks."""
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})


def text_automaton(checkpoint: Path, *grammars: str, lead: str = "") -> TokenAutomaton:
    """Return an automaton of one text of each grammar, one after the other, each ended by <|end|>,
    and the last by <|return|>.

    Args:
        lead: a text that is forced, token by token, before the first grammar.
    """
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    end, over = tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<|return|>")
    special = [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    no_text = [*special, *range(NUM_TOKENS, VOCAB_SIZE)]
    forced = tokenizer.encode(lead).ids
    states = [
        AutomatonState(allowed=(token_id,), transitions=((token_id, index + 1),))
        for index, token_id in enumerate(forced)
    ]
    for index in range(len(grammars)):
        last = over if index == len(grammars) - 1 else end
        states.append(
            AutomatonState(
                forbidden=tuple(i for i in no_text if i != last),
                transitions=((last, len(states) + 1),),
                grammar=index,
            )
        )
    states.append(AutomatonState(allowed=(over,)))
    return TokenAutomaton(tuple(states), grammars=grammars)
