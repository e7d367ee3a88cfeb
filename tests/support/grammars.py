"""A model with a tokenizer, and automata whose bodies have grammars."""

import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher
from tokenizers import Tokenizer
from torch import Tensor

from cluster.harmony.make_tokenizer import write_bpe_tokenizer
from tests.support.tiny_model import TINY
from workers.constraint.automaton import AutomatonState, TokenAutomaton
from workers.constraint.state import AutomatonTables
from workers.errors import RankCrashed
from workers.executor.base import ExecutorInfo
from workers.model.make_checkpoint import write_checkpoint
from workers.scheduler.masks import wait_for_masks
from workers.scheduler.plan import SequenceStart, StepMasks, StepPlan, StepResult

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


class PipelinedRank:
    """An executor that takes the next plan while it runs one, as a GPU does. The token of a row is
    drawn from those that its mask and its automaton allow, by the sequence's prompt and the token's
    position alone.

    Attributes:
        most_in_flight: largest number of plans without a result.
        num_masked: number of tokens drawn by a mask.
    """

    def __init__(self, vocab_size: int) -> None:
        self.crash: RankCrashed | None = None
        self.most_in_flight = self.num_masked = 0
        self._vocab_size = vocab_size
        self._in_flight = 0
        self._automata: dict[bytes, AutomatonTables] = {}
        self._starts: dict[int, SequenceStart] = {}
        self._tokens: dict[int, list[int]] = {}
        self._plans: SimpleQueue[tuple[StepPlan, Future[StepMasks] | None, Future[StepResult]] | None] = (
            SimpleQueue()
        )
        self._thread = Thread(target=self._run, daemon=True)

    def start(self) -> ExecutorInfo:
        self._thread.start()
        return ExecutorInfo("none", "none", 1, 512, 200, 200, 0, 0, {}, {})

    def on_failure(self, callback: Callable[[str], None]) -> None:
        pass

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        raise NotImplementedError("there is no model")

    def execute(self, plan: StepPlan, masks: "Future[StepMasks] | None" = None) -> "Future[StepResult]":
        future: Future[StepResult] = Future()
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        self._plans.put((plan, masks, future))
        return future

    def shutdown(self) -> None:
        self._plans.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (entry := self._plans.get()) is not None:
            plan, masks, future = entry
            try:
                result = self._result(plan, None if masks is None else wait_for_masks(plan.step, masks, 60))
            except Exception as error:
                result = StepResult(plan.step, error=str(error))
            self._in_flight -= 1
            future.set_result(result)

    def _result(self, plan: StepPlan, masks: StepMasks | None) -> StepResult:
        for seq_id in plan.drops:
            del self._tokens[seq_id]
        self._automata |= {key: AutomatonTables(body) for key, body in plan.automata}
        for start in plan.starts:
            self._starts[start.seq_id], self._tokens[start.seq_id] = start, list(start.token_ids)
        bits = {} if masks is None else dict(zip(masks.rows.tolist(), masks.bits, strict=True))
        drafts = dict(plan.drafts)
        found: dict[int, list[int]] = {}
        row = 0
        for index, (seq_id, samples) in enumerate(zip(plan.seq_ids, plan.samples, strict=True)):
            if samples:
                guessed = drafts.get(index, ())
                found[seq_id] = []
                for nth, guess in enumerate((*guessed, None)):
                    token_id = self._draw(seq_id, bits.get(row + nth))
                    found[seq_id].append(token_id)
                    self._tokens[seq_id].append(token_id)
                    if token_id != guess:
                        break
                row += 1 + len(guessed)
        counts = tuple(map(len, found.values())) if drafts else ()
        flat = tuple(token_id for tokens in found.values() for token_id in tokens)
        return StepResult(plan.step, tuple(found), flat, num_tokens=counts)

    def _draw(self, seq_id: int, bits: npt.NDArray[np.uint8] | None) -> int:
        start, tokens = self._starts[seq_id], self._tokens[seq_id]
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
        return int(draw.choice(ids))
