"""Masks of the rows of a step whose sequences spell a text of a grammar, computed by llguidance
while the ranks run the model."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from workers.constraint.compiler import CompiledGrammar, GrammarCompiler, forced_tokens
from workers.constraint.tables import Bits, mask_words
from workers.scheduler.plan import StepMasks

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

    from workers.constraint.grammar import GrammarTokenizer

logger = logging.getLogger(__name__)


_MAX_FORCED_BYTES = 256
"""Length in bytes of forced text above which it is not fed ahead."""
_MAX_KEPT_FORCED = 4096
_CLOSE_TIMEOUT_S = 10.0
_FULL = "too many states"
"""What llguidance's error says where a lexer has as many states as it may have."""


def mask_threads(num_cpus: int) -> int:
    """Return the number of threads that compute masks, of a process that may use so many CPUs."""
    return min(max(num_cpus // 4, 1), 8)


class Body:
    """A text that a sequence spells in a state with a grammar. The engine's thread appends its
    tokens; all else is written by the thread that computes masks.

    Args:
        forced: the tokens with which the text begins.
    Attributes:
        matcher: where the text is; a copy of `source`, which is or was the grammar's.
        tokens: the tokens of the text that are known.
        forced: (number of tokens, tokens that follow those if the text goes on as the tokenizer
            would write it).
    """

    __slots__ = ("forced", "grammar", "matcher", "num_consumed", "source", "tokens")

    def __init__(self, grammar: CompiledGrammar, forced: tuple[int, ...]) -> None:
        self.grammar = grammar
        self.tokens: list[int] = []
        self.matcher: LLMatcher | None = None
        self.source: LLMatcher | None = None
        self.num_consumed = 0
        self.forced = (0, forced)

    def begin(self) -> "LLMatcher":
        """Return the matcher, anew at the beginning of the text."""
        self.source = self.grammar.matcher
        self.matcher = self.source.deep_copy()
        self.num_consumed = 0
        return self.matcher

    def forced_after(self, num_tokens: int) -> tuple[int, ...]:
        """Return the forced tokens after the first so many tokens, as far as they are known."""
        since, forced = self.forced
        num_new = num_tokens - since
        return forced[num_new:] if forced[:num_new] == tuple(self.tokens[since:num_tokens]) else ()


class MaskRow(NamedTuple):
    """A row of a step that needs a mask.

    Attributes:
        row: index among the step's sampled rows.
        body: the text, as far as it is known.
        num_tokens: number of its tokens that come before the row.
        drafts: further tokens of the text before the row, which may be wrong.
        text: bitmask of the tokens that may spell the text; None if llguidance's mask says it.
        ends: tokens that may come where the text is complete.
    """

    row: int
    seq_id: int
    body: Body
    num_tokens: int
    drafts: tuple[int, ...]
    text: Bits | None
    ends: tuple[int, ...]


@dataclass(slots=True)
class MaskJob:
    """The masks of one step.

    Attributes:
        result: the masks; its rows may be fewer than the step's.
        failed: by sequence, why its text cannot go on; complete once `result` is there.
    """

    step: int
    result: "Future[StepMasks]" = field(default_factory=Future)
    failed: dict[int, str] = field(default_factory=dict)


class MaskThread:
    """Computes masks, one step after the other, in one thread that spreads the work over others.

    Args:
        compiler: has the tokenizer.
        num_threads: number of these others.
        observe: called with the seconds that each job took, and its number of rows.
    """

    def __init__(
        self,
        compiler: GrammarCompiler,
        vocab_size: int,
        num_threads: int,
        observe: Callable[[float, int], object] = lambda seconds, rows: None,
    ) -> None:
        self._compiler = compiler
        self._num_threads = num_threads
        self._observe = observe
        # Whole words of 32 bits, as llguidance writes them.
        self._num_words = mask_words(vocab_size)
        self._executor: LLExecutor | None = None
        self._tokenizer: GrammarTokenizer
        self._forced: dict[bytes, tuple[int, ...]] = {}
        self._jobs: queue.SimpleQueue[tuple[MaskJob, Sequence[MaskRow]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def compute(self, job: MaskJob, rows: Sequence[MaskRow]) -> None:
        """Compute the masks of the job's rows; returns at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="cantata-masks", daemon=True)
            self._thread.start()
        self._jobs.put((job, rows))

    def close(self) -> None:
        """End the thread after the jobs in its queue, and wait for it, at most _CLOSE_TIMEOUT_S: a
        process that ends while a thread is in llguidance crashes."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(_CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while (entry := self._jobs.get()) is not None:
            job, rows = entry
            started = time.perf_counter()
            try:
                masks = self._compute(job, rows)
            except Exception as error:
                # The edge of the thread: the step that waits must get its end. Errors of a single
                # text are not exceptions.
                logger.exception("the masks of step %d failed", job.step)
                job.result.set_exception(error)
            else:
                self._observe(time.perf_counter() - started, len(rows))
                job.result.set_result(masks)

    def _compute(self, job: MaskJob, rows: Sequence[MaskRow]) -> StepMasks:
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor(self._num_threads)
            self._tokenizer = self._compiler.load()
        self._catch_up(rows)
        matchers = [_matcher_of(row) for row in rows]
        words: npt.NDArray[np.uint32] = np.empty((len(rows), self._num_words), dtype=np.uint32)
        if rows:  # none is left if their sequences have gone on to free text, or ended
            self._fill(words, enumerate(matchers))
        bits = words.view(np.uint8)
        stuck = self._renew_full(rows, matchers, words)
        may_end = self._take_ends(bits)
        num_beginnings = self._num_beginnings(bits)
        for index, (row, matcher) in enumerate(zip(rows, matchers, strict=True)):
            if index in stuck:
                job.failed[row.seq_id] = _failure(stuck[index])
                bits[index] = 255
                continue
            if row.text is not None:
                bits[index] &= row.text
            if may_end[index] or (row.text is not None and not bits[index].any()):
                self._end(job, row, matcher, bits[index])
            if not row.drafts:
                forced = self._forced_tokens(matcher) if num_beginnings[index] < 2 else ()
                row.body.forced = row.num_tokens, forced
        return StepMasks(job.step, np.array([row.row for row in rows], dtype=np.int64), bits)

    def _fill(self, words: npt.NDArray[np.uint32], matchers: Iterable[tuple[int, "LLMatcher"]]) -> None:
        assert self._executor is not None
        self._executor.unsafe_compute_mask_ptr(
            [(matcher, index) for index, matcher in matchers],
            words.ctypes.data,
            self._num_words * words.itemsize,
            len(words),
        )

    def _num_beginnings(self, bits: Bits) -> npt.NDArray[np.int64]:
        """Return the number of bytes with which each row's next token may begin: if two tokens that
        differ in their first byte may come, nothing is forced."""
        single = self._tokenizer.bytes
        count: npt.NDArray[np.int64] = (bits[:, single >> 3] >> (single & 7) & 1).sum(1, dtype=np.int64)
        return count

    def _renew_full(
        self, rows: Sequence[MaskRow], matchers: "list[LLMatcher]", words: npt.NDArray[np.uint32]
    ) -> dict[int, str]:
        """Where a text met the limit of its lexer's states, which all texts of the grammar fill
        together, read it again with a fresh lexer, and compute the masks of its rows.

        Returns:
            Why the rows, by index, have no mask for whose texts there is none.
        """
        anew: set[Body] = set()
        stuck: dict[int, str] = {}
        for index, error in self._full(rows, words).items():
            row, found = rows[index], {index: error}
            if row.body in anew:
                found = self._fill_again(index, rows, matchers, words)
            # First with the grammar's matcher as it is by now, which other texts may have filled
            # again.
            for _ in range(2):
                if not found or not self._begin_anew(row):
                    break
                anew.add(row.body)
                found = self._fill_again(index, rows, matchers, words)
            stuck |= found
        return stuck

    def _full(self, rows: Sequence[MaskRow], words: npt.NDArray[np.uint32]) -> dict[int, str]:
        """Return the errors of the rows, by index, whose masks may be wrong since their lexer is
        full. That need not be their matchers' error: a mask of a forced token is then wrong without
        one, and a text that was read meanwhile seems not to be of the grammar. So it is tried."""
        bits, eos = words.view(np.uint8), self._tokenizer.eos
        failed = bits[:, eos >> 3] & (1 << (eos & 7)) != 0
        forced = self._num_beginnings(bits) < 2
        errors: dict[int, str] = {}
        full: dict[int, str] = {}
        for index in np.flatnonzero(failed | forced).tolist():
            source = rows[index].body.source
            assert source is not None
            if id(source) not in errors:
                row, trial = rows[index], source.deep_copy()
                # A token that may come first: llguidance takes 3 us for one, 0.3 ms for another.
                may_come = np.unpackbits(bits[index], bitorder="little").argmax()
                trial.consume_token(row.body.tokens[0] if row.num_tokens else int(may_come))
                errors[id(source)] = trial.get_error() if trial.is_error() else ""
            if _FULL in errors[id(source)]:
                full[index] = errors[id(source)]
        return full

    def _begin_anew(self, row: MaskRow) -> bool:
        """Read a text again with another lexer than it had; return whether there is one."""
        body = row.body
        if body.source is body.grammar.matcher and not self._compiler.renew(body.grammar):
            return False
        body.begin().consume_tokens(body.tokens[: row.num_tokens])
        body.num_consumed = row.num_tokens
        return True

    def _fill_again(
        self,
        index: int,
        rows: Sequence[MaskRow],
        matchers: "list[LLMatcher]",
        words: npt.NDArray[np.uint32],
    ) -> dict[int, str]:
        """Compute the mask of a row whose text was begun anew; return as `_full` does."""
        matchers[index] = _matcher_of(rows[index])
        self._fill(words, [(index, matchers[index])])
        again = self._full([rows[index]], words[index : index + 1])
        return {index: again[0]} if again else {}

    def _forced_tokens(self, matcher: "LLMatcher") -> tuple[int, ...]:
        """Return the tokens of the bytes that come next whatever the text is; the same bytes have
        the same tokens here, which is a guess, since cutting them takes longer than a mask."""
        text = matcher.compute_ff_bytes()
        if len(text) > _MAX_FORCED_BYTES:
            return ()
        found = self._forced.get(text)
        if found is None:
            if len(self._forced) >= _MAX_KEPT_FORCED:
                self._forced.clear()
            found = self._forced[text] = forced_tokens(matcher)
        return found

    def _take_ends(self, bits: Bits) -> npt.NDArray[np.bool_]:
        """Clear the token by which llguidance says that a text may end, which it also does after an
        error; return the rows that had it."""
        eos = self._tokenizer.eos
        column, bit = bits[:, eos >> 3], np.uint8(1 << (eos & 7))
        found: npt.NDArray[np.bool_] = (column & bit) != 0
        column &= ~bit
        return found

    def _end(self, job: MaskJob, row: MaskRow, matcher: "LLMatcher", mask: Bits) -> None:
        """Allow the tokens that end a text where it is complete, or where nothing else is left."""
        if matcher.is_error() and not row.drafts:
            # The token of this row is not used, but there must be one.
            job.failed[row.seq_id] = _failure(matcher.get_error())
            mask[:] = 255
        elif matcher.is_accepting() or not mask.any():
            for token_id in row.ends:
                mask[token_id >> 3] |= 1 << (token_id & 7)

    def _catch_up(self, rows: Sequence[MaskRow]) -> None:
        """Let each row's text consume its tokens."""
        assert self._executor is not None
        singles: list[tuple[LLMatcher, int]] = []
        for row in rows:
            body = row.body
            matcher = body.matcher or body.begin()
            new = body.tokens[body.num_consumed : row.num_tokens]
            body.num_consumed += len(new)
            if len(new) == 1:
                singles.append((matcher, new[0]))
            elif new:
                matcher.consume_tokens(new)
        if singles:
            self._executor.consume_token_par(singles)


def _matcher_of(row: MaskRow) -> "LLMatcher":
    matcher = row.body.matcher
    assert matcher is not None
    if row.drafts:
        matcher = matcher.deep_copy()
        matcher.consume_tokens(list(row.drafts))
    return matcher


def _failure(error: str) -> str:
    """Return why a text cannot go on, as a sentence for the client."""
    return f"the output's grammar failed: {error.partition(chr(10))[0].strip()}"
