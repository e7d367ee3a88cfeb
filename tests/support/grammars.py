"""A model with a tokenizer, and automata whose bodies have grammars."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher
from tokenizers import Tokenizer

from benchmarks.pretended_executor import PretendedExecutor
from cluster.harmony.make_tokenizer import write_bpe_tokenizer
from tests.support.tiny_model import TINY
from workers.constraint.automaton import AutomatonState, TokenAutomaton
from workers.constraint.state import AutomatonTables
from workers.model.make_checkpoint import write_checkpoint
from workers.scheduler.plan import SequenceStart, StepPlan

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


class PipelinedRank(PretendedExecutor):
    """An executor whose token of a row is drawn from those that its mask and its automaton allow,
    by the sequence's prompt and the token's position alone.

    Attributes:
        num_masked: number of tokens drawn by a mask.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__(max_model_len=512, num_blocks=200)
        self.num_masked = 0
        self._vocab_size = vocab_size
        self._automata: dict[bytes, AutomatonTables] = {}
        self._starts: dict[int, SequenceStart] = {}
        self._tokens: dict[int, list[int]] = {}

    def begin(self, plan: StepPlan) -> None:
        for seq_id in plan.drops:
            del self._tokens[seq_id]
        self._automata |= {key: AutomatonTables(body) for key, body in plan.automata}
        for start in plan.starts:
            self._starts[start.seq_id], self._tokens[start.seq_id] = start, list(start.token_ids)

    def draw(self, seq_id: int, position: int, bits: npt.NDArray[np.uint8] | None) -> int:
        start, tokens = self._starts[seq_id], self._tokens[seq_id]
        assert position == len(tokens) - start.num_prompt_tokens
        allowed = np.ones(self._vocab_size, dtype=bool)
        if start.constraint is not None:
            tables = self._automata[start.constraint]
            place = tables.begin(tokens[start.num_prompt_tokens :], start.constraint_limits)
            entry = tables.states[place.state]
            allowed[:] = not entry.restrict
            allowed[list(entry.allowed if entry.restrict else entry.forbidden)] = entry.restrict
            assert tables.states[place.state].HasField("grammar") == (bits is not None)
        if bits is not None:
            mask = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
            assert not (mask & ~allowed).any(), "a mask has special tokens, or ids without a token"
            allowed &= mask
            self.num_masked += 1
        ids = np.flatnonzero(allowed)
        assert len(ids), "nothing is allowed"
        draw = random.Random(f"{start.token_ids[: start.num_prompt_tokens]} {len(tokens)}")
        tokens.append(int(draw.choice(ids)))
        return tokens[-1]
