"""Constraints on their way through the compiler's threads: stops, refusals and what is kept."""

import gc
import threading
import weakref
from pathlib import Path

import pytest

from tests.support.grammars import (
    VOCAB_SIZE,
    schema_grammar,
    text_automaton,
    write_checkpoint_with_tokenizer,
)
from tests.support.waiting import until
from workers.config import GrammarConfig
from workers.constraint import compiler as compiler_module
from workers.constraint.codec import Constraint
from workers.constraint.compiler import GrammarCompiler
from workers.constraint.grammar import GrammarTokenizer
from workers.engine.masks import MaskJob, MaskThread
from workers.errors import EngineDead, InvalidRequest
from workers.scheduler.plan import StepMasks

WAIT_S = 60.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint_with_tokenizer(tmp_path_factory.mktemp("models") / "tiny")


def constraints_of(checkpoint: Path, grammars: list[str]) -> list[Constraint]:
    return [Constraint.of(text_automaton(checkpoint, grammar)) for grammar in grammars]


def test_a_stop_waits_for_threads_in_llguidance_and_ends_what_is_queued(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = GrammarCompiler(checkpoint, VOCAB_SIZE, GrammarConfig())
    entered = threading.Semaphore(0)
    compile_ = GrammarTokenizer.compile

    def until_closed(self: GrammarTokenizer, grammar: str) -> object:
        entered.release()
        until(lambda: compiler._closed, WAIT_S)
        return compile_(self, grammar)

    monkeypatch.setattr(GrammarTokenizer, "compile", until_closed)
    monkeypatch.setattr(compiler_module, "COMPILE_TIMEOUT_S", WAIT_S)
    constraints = constraints_of(checkpoint, [schema_grammar({"enum": [index]}) for index in range(4)])
    futures = [compiler.prepare(constraint) for constraint in constraints[:3]]
    for _ in range(2):
        assert entered.acquire(timeout=WAIT_S)
    compiler.close()
    assert not any(thread.is_alive() for thread in compiler._threads)
    compiler.close()
    assert [future.done() for future in futures] == [True] * 3
    for future in (futures[2], compiler.prepare(constraints[3])):
        with pytest.raises(EngineDead, match="the engine is shutting down"):
            future.result(0)


def test_a_stop_waits_for_the_thread_that_computes_masks(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = MaskThread(GrammarCompiler(checkpoint, VOCAB_SIZE, GrammarConfig()), VOCAB_SIZE, 1)
    compute = MaskThread._compute

    def until_closed(self: MaskThread, *arguments: object) -> StepMasks:
        until(lambda: not self._jobs.empty(), WAIT_S)
        return compute(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(MaskThread, "_compute", until_closed)
    monkeypatch.setattr("workers.engine.masks._CLOSE_TIMEOUT_S", WAIT_S)
    job = MaskJob(0)
    masks.compute(job, [])
    masks.close()
    assert masks._thread is not None
    assert not masks._thread.is_alive()
    assert job.result.result(0).step == 0


class Prompt:
    """What a request's frames hold."""


def test_a_refusal_is_kept_without_those_to_whom_it_was_raised(checkpoint: Path) -> None:
    compiled: list[bool] = []
    compiler = GrammarCompiler(
        checkpoint, VOCAB_SIZE, GrammarConfig(), lambda seconds, succeeded: compiled.append(succeeded)
    )

    def prompt_of_a_request(constraint: Constraint) -> "weakref.ref[Prompt]":
        prompt = Prompt()
        with pytest.raises(InvalidRequest, match="the grammar was refused: ") as caught:
            compiler.prepare(constraint).result(WAIT_S)
        assert caught.value.param == "constraint.grammars"
        return weakref.ref(prompt)

    grammar = "start: unknown_rule"
    constraints = [Constraint.of(text_automaton(checkpoint, grammar, lead=lead)) for lead in ("a", "b")]
    prompts = [prompt_of_a_request(constraint) for constraint in constraints for _ in range(3)]
    # The compiler's thread may not have returned yet.
    until(lambda: gc.collect() >= 0 and all(prompt() is None for prompt in prompts), WAIT_S)
    assert compiled == [False], "refused without compiling it again"
    compiler.close()


def test_constraints_that_are_ready_hold_no_more_grammars_than_the_bound(checkpoint: Path) -> None:
    compiler = GrammarCompiler(checkpoint, VOCAB_SIZE, GrammarConfig(cache_bytes=3 << 20))
    constraints = constraints_of(checkpoint, [schema_grammar({"enum": [index]}) for index in range(6)])
    for constraint in constraints:
        compiler.prepare(constraint).result(WAIT_S)
    assert list(compiler._prepared._kept) == [constraint.id for constraint in constraints[4:]]
    assert 2 << 20 < compiler._prepared.num_bytes <= 3 << 20
    compiler.close()
