"""Sequences whose automaton has grammars, as the step loop follows them: where each is, which rows
of a step need masks, and when these can be computed."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from workers.constraint.automaton import ConstraintLimits
from workers.constraint.compiler import PreparedConstraint
from workers.constraint.state import Place
from workers.engine.masks import Body, MaskJob, MaskRow, MaskThread
from workers.errors import EngineDead
from workers.request import EngineRequest
from workers.scheduler.plan import StepPlan
from workers.scheduler.sequence import Sequence

MIN_DRAFTS = 2
"""Number of forced tokens from which they are fed ahead. A sequence with drafts skips the plan that
would be sent while they are in flight, so that one would save nothing."""


class _Position(NamedTuple):
    """A place in an automaton, and in the text of its state's grammar if it has one.

    Attributes:
        num_tokens: number of known tokens of the text.
        drafts: tokens of the text after those, which may be wrong.
    """

    place: Place
    body: Body | None
    num_tokens: int = 0
    drafts: tuple[int, ...] = ()


class _Followed:
    """A sequence that the engine follows."""

    __slots__ = ("_limits", "_prepared", "num_prompt_tokens", "position", "tables")

    def __init__(
        self, prepared: PreparedConstraint, limits: ConstraintLimits, num_prompt_tokens: int
    ) -> None:
        self.tables = prepared.tables
        self.num_prompt_tokens = num_prompt_tokens
        self._prepared = prepared
        self._limits = limits
        place = self.tables.begin((), limits)
        self.position = _Position(place, self._body(place))

    @property
    def num_output_tokens(self) -> int:
        return self.position.place.num_tokens

    def push(self, token_id: int) -> None:
        """Advance by one output token."""
        place, body, num_tokens, _ = self.position
        state = place.state
        if body is not None and self.tables.is_plain[state] and token_id not in self.tables.ends[state]:
            after = _Position(Place(state, place.num_counted, place.num_tokens + 1), body)
        else:
            after = self._after(self.position, token_id)
        if body is not None and after.body is body:
            body.tokens.append(token_id)
            after = _Position(after.place, body, num_tokens + 1)
        self.position = after

    def along(self, drafts: Iterable[int]) -> Iterator[_Position]:
        """Yield the position, and that after each draft."""
        position = self.position
        yield position
        for token_id in drafts:
            position = self._after(position, token_id)
            yield position

    def _after(self, position: _Position, token_id: int) -> _Position:
        state = position.place.state
        place = self.tables.advance(position.place, token_id, self._limits)
        if place.state == state and token_id not in self.tables.ends[state]:
            if position.body is None:
                return _Position(place, None)
            return position._replace(place=place, drafts=(*position.drafts, token_id))
        return _Position(place, self._body(place))

    def _body(self, place: Place) -> Body | None:
        grammar = self.tables.grammar_of[place.state]
        if grammar is None:
            return None
        return Body(self._prepared.grammars[grammar], self._prepared.forced[grammar])

    def forced(self) -> tuple[int, ...]:
        """Return the tokens that come next, as far as they are forced, or would be if the model
        wrote as the tokenizer does."""
        body = self.position.body
        if body is not None:
            return body.forced_after(self.position.num_tokens)
        return self.tables.chains[self.position.place.state]


class _Wanted(NamedTuple):
    """Rows of a step that may need masks: one sequence's.

    Attributes:
        first_row: index among the sampled rows.
        num_output_tokens: number of the sequence's output tokens before its first row.
    """

    seq_id: int
    first_row: int
    num_output_tokens: int
    drafts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A step in flight whose masks need the tokens of the one before."""

    job: MaskJob
    wanted: list[_Wanted]


class GrammarSteps:
    """The followed sequences. Belongs to the engine's thread.

    Args:
        masks: computes masks.
    """

    def __init__(self, masks: MaskThread) -> None:
        self._masks = masks
        self._followed: dict[int, _Followed] = {}
        self._waiting: deque[_Waiting] = deque()

    def begin(self, seq_id: int, request: EngineRequest, prepared: PreparedConstraint) -> None:
        """Follow a sequence from its output so far on, if its automaton asks for it."""
        if prepared.tables.is_followed:
            self._followed[seq_id] = _Followed(
                prepared, request.constraint_limits, len(request.prompt_token_ids)
            )
            self.push(seq_id, request.output_token_ids)

    def push(self, seq_id: int, token_ids: Iterable[int]) -> None:
        """Take in tokens of a sequence; do nothing if it is not followed."""
        sequence = self._followed.get(seq_id)
        if sequence is not None:
            for token_id in token_ids:
                sequence.push(token_id)

    def end(self, seq_id: int) -> None:
        """Forget a sequence."""
        self._followed.pop(seq_id, None)

    @property
    def is_empty(self) -> bool:
        """True if no sequence is followed."""
        return not self._followed

    def propose(self, sequence: Sequence, num_pending: int) -> tuple[int, ...]:
        """Return the forced tokens of a sequence as drafts, if there are enough of them
        (`workers.scheduler.scheduler.Proposer`)."""
        followed = self._followed.get(sequence.seq_id)
        if followed is None:
            return ()
        drafts = followed.forced()[num_pending:]
        return drafts if len(drafts) >= MIN_DRAFTS else ()

    def plan(self, plan: StepPlan) -> tuple[StepPlan, MaskJob | None]:
        """Return the plan as it is to be sent, and its masks; None if no row can need any. They are
        computed from now on, or once `advance` has what they depend on."""
        if not self._followed:
            return plan, None
        wanted = self._wanted(plan)
        if not wanted:
            return plan, None
        entry = _Waiting(MaskJob(plan.step), wanted)
        self._waiting.append(entry)
        if all(self._followed[rows.seq_id].num_output_tokens == rows.num_output_tokens for rows in wanted):
            self.advance()
        return replace(plan, awaits_masks=True), entry.job

    def advance(self) -> None:
        """Have the masks computed of the steps in flight, since the tokens before them are known
        now. A sequence that has ended meanwhile, or lost its place, needs none."""
        while self._waiting:
            entry = self._waiting.popleft()
            rows = [row for rows in entry.wanted for row in self._rows(rows)]
            self._masks.compute(entry.job, rows)

    def close(self, sentence: str) -> None:
        """Fail the masks of steps in flight that can no longer be computed."""
        while self._waiting:
            self._waiting.popleft().job.result.set_exception(EngineDead(sentence))

    def _wanted(self, plan: StepPlan) -> list[_Wanted]:
        wanted: list[_Wanted] = []
        drafts_of = dict(plan.drafts)
        row = 0
        for index, samples in enumerate(plan.samples):
            if not samples:
                continue
            drafts = drafts_of.get(index, ()) if drafts_of else ()
            seq_id = plan.seq_ids[index]
            sequence = self._followed.get(seq_id)
            if sequence is not None and sequence.tables.grammars:
                num_tokens = plan.num_computed_tokens[index] + plan.num_scheduled_tokens[index]
                num_output = num_tokens - len(drafts) - sequence.num_prompt_tokens
                if self._may_need(sequence, num_output, drafts):
                    wanted.append(_Wanted(seq_id, row, num_output, drafts))
            row += 1 + len(drafts)
        return wanted

    def _may_need(self, sequence: _Followed, num_output: int, drafts: tuple[int, ...]) -> bool:
        tables, position = sequence.tables, sequence.position
        if num_output != position.place.num_tokens:
            # A token is in flight. With drafts the state after them is hardly ever free text.
            return bool(drafts) or tables.nears[position.place.state]
        if not drafts:
            return position.body is not None
        return any(at.body is not None for at in sequence.along(drafts))

    def _rows(self, wanted: _Wanted) -> Iterator[MaskRow]:
        sequence = self._followed.get(wanted.seq_id)
        if sequence is None or sequence.num_output_tokens != wanted.num_output_tokens:
            return
        for row, at in enumerate(sequence.along(wanted.drafts), wanted.first_row):
            if at.body is not None:
                state = at.place.state
                yield MaskRow(
                    row=row,
                    seq_id=wanted.seq_id,
                    body=at.body,
                    num_tokens=at.num_tokens,
                    drafts=at.drafts,
                    text=sequence.tables.texts.get(state),
                    ends=sequence.tables.ends[state],
                )
