"""The constraints of an `LLM`'s prompts: given automata, and the forms that sampling parameters ask
for."""

from collections.abc import Sequence
from dataclasses import fields
from typing import NamedTuple

from tokenizers import Tokenizer

from workers.constraint.automaton import TokenAutomaton, text_automaton
from workers.constraint.codec import Constraint
from workers.constraint.compiler import COMPILE_TIMEOUT_S, TOO_SLOW, PreparedConstraint
from workers.engine.engine import Engine
from workers.errors import ConstraintNotReady, InvalidRequest
from workers.request import SamplingParams, StructuredOutputsParams
from workers.rpc.validate import check_automaton

_FIELD = "structured_outputs"


class ReadyConstraint(NamedTuple):
    """A constraint, and what the engine has made of it."""

    constraint: Constraint
    prepared: PreparedConstraint


class _Wanted(NamedTuple):
    """An automaton, and the field that asks for it."""

    automaton: TokenAutomaton
    param: str


class LlmConstraints:
    """The maker of the constraints.

    Args:
        tokenizer: the checkpoint's; None: it has none.
        end_token_ids: the tokens that end a text.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, end_token_ids: tuple[int, ...]) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._end_token_ids = end_token_ids
        self._no_text: tuple[int, ...] | None = None

    def prepare(
        self,
        constraints: TokenAutomaton | Sequence[TokenAutomaton | None] | None,
        sampling: Sequence[SamplingParams],
    ) -> list[ReadyConstraint | None]:
        """Return the constraint of each prompt, ready to run.

        Args:
            constraints: as in `LLM.generate`.
            sampling: of each prompt.
        Raises:
            InvalidRequest: an automaton or a grammar is refused; a prompt has two constraints.
            ConstraintNotReady: a grammar takes too long to compile.
        """
        if not isinstance(constraints, Sequence):
            constraints = [constraints] * len(sampling)
        if len(constraints) != len(sampling):
            raise InvalidRequest(f"{len(sampling)} prompts but {len(constraints)} constraints", "constraints")
        forms: dict[str, _Wanted] = {}
        wanted = [
            self._form(params, forms) if automaton is None else self._given(automaton, params)
            for automaton, params in zip(constraints, sampling, strict=True)
        ]
        distinct = {id(entry.automaton): entry for entry in wanted if entry is not None}
        ready = {key: self._ready(entry) for key, entry in distinct.items()}
        return [None if entry is None else ready[id(entry.automaton)] for entry in wanted]

    def _given(self, automaton: TokenAutomaton, sampling: SamplingParams) -> _Wanted:
        if sampling.structured_outputs is not None:
            raise InvalidRequest(
                f"a prompt has a constraint and sampling parameters with {_FIELD}; give one of them", _FIELD
            )
        check_automaton(automaton, self._engine.vocab_size)
        return _Wanted(automaton, "constraints")

    def _form(self, sampling: SamplingParams, forms: dict[str, _Wanted]) -> _Wanted | None:
        """Return the automaton of the form that a prompt's text must have; equal ones once."""
        asked = sampling.structured_outputs
        if asked is None:
            return None
        if not isinstance(asked, StructuredOutputsParams):
            raise InvalidRequest(
                f"{_FIELD} must be StructuredOutputsParams, got {type(asked).__name__}", _FIELD
            )
        if sampling.ignore_eos:
            raise InvalidRequest(
                f"ignore_eos goes on after the end of the text, which contradicts {_FIELD}", "ignore_eos"
            )
        if self._tokenizer is None or not self._end_token_ids:
            raise InvalidRequest(
                f"{_FIELD} needs the checkpoint's tokenizer.json, with one of gpt-oss's end tokens", _FIELD
            )
        # Only here: an LLM without forms needs no orjson.
        from workers.grammars.structured import grammar_of, only_kind

        values = {entry.name: getattr(asked, entry.name) for entry in fields(asked)}
        values["json_object"] = asked.json_object or None
        kind = only_kind(values, _FIELD)
        param = f"{_FIELD}.{kind}"
        text = grammar_of(kind, values[kind], param).text
        if text not in forms:
            automaton = text_automaton(text, self._end_token_ids, self._tokens_without_text())
            forms[text] = _Wanted(automaton, param)
        return forms[text]

    def _tokens_without_text(self) -> tuple[int, ...]:
        """Return the ids that are in no text: special tokens, and those without a token."""
        if self._no_text is None:
            assert self._tokenizer is not None
            added = self._tokenizer.get_added_tokens_decoder().items()
            special = {token_id for token_id, token in added if token.special}
            self._no_text = tuple(
                token_id
                for token_id in range(self._engine.vocab_size)
                if token_id in special or self._tokenizer.id_to_token(token_id) is None
            )
        return self._no_text

    def _ready(self, wanted: _Wanted) -> ReadyConstraint:
        constraint = Constraint.of(wanted.automaton)
        try:
            return ReadyConstraint(constraint, self._engine.prepare(constraint).result(COMPILE_TIMEOUT_S))
        except InvalidRequest as error:
            raise InvalidRequest(error.message, wanted.param) from None
        except TimeoutError:
            raise ConstraintNotReady(TOO_SLOW) from None
