"""Texts of grammars from random weights: whatever the model is, what it writes is a text of the
grammar, through LLM and the step loop."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer

from cluster.harmony.make_tokenizer import write_bpe_tokenizer
from tests.support.tiny_model import TINY
from workers.constraint.automaton import AutomatonState, TokenAutomaton
from workers.engine.llm import LLM, SamplingParams
from workers.model.make_checkpoint import write_checkpoint

VOCAB_SIZE = 700
NUM_TOKENS = 600
"""Number of tokens of the tokenizer: the model has ids without one."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_checkpoint(path, replace(TINY, vocab_size=VOCAB_SIZE), seed=0)
    write_bpe_tokenizer(path, NUM_TOKENS)
    return path


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(checkpoint, dtype="float32", max_num_seqs=16, kv_cache_bytes=1 << 24) as llm:
        yield llm


def text_automaton(checkpoint: Path, grammar: str) -> TokenAutomaton:
    """Return an automaton of one text of the grammar, ended by <|return|>."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    end = tokenizer.token_to_id("<|return|>")
    special = [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    forbidden = tuple(i for i in [*special, *range(NUM_TOKENS, VOCAB_SIZE)] if i != end)
    return TokenAutomaton(
        (
            AutomatonState(forbidden=forbidden, transitions=((end, 1),), grammar=0),
            AutomatonState(allowed=(end,)),
        ),
        grammars=(grammar,),
    )


SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["colour", "count", "flags"],
    "additionalProperties": False,
}


def test_a_text_of_a_schema(llm: LLM, checkpoint: Path) -> None:
    automaton = text_automaton(
        checkpoint, LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})
    )
    sampling = SamplingParams(max_tokens=200, temperature=1.0, seed=5, n=4)
    outputs = llm.generate([[1, 2, 3]], sampling, constraints=automaton, use_tqdm=False)[0].outputs
    for output in outputs:
        assert output.finish_reason == "stop"
        found = json.loads(output.text)
        assert set(found) == {"colour", "count", "flags"}
        assert found["colour"] in ("red", "green", "blue")
        assert 0 <= found["count"] <= 99
    assert len({output.text for output in outputs}) > 1
