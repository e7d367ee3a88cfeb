"""A step that was launched and whose result has not been taken."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.sampling import SampleOutput
from workers.rank.drafts import DraftRows, kept_rows
from workers.rank.sampling_state import TokenListener
from workers.request import TokenLogprobs
from workers.scheduler.plan import StepMasks, StepResult


@dataclass(frozen=True, slots=True)
class Sampled:
    """The sampled tokens of a step, on the device.

    Attributes:
        seq_ids: [num_samples] sequence of each sampled row.
        output: tensors on the device.
        drafts: None if each row is a sequence of its own.
        logprob_rows: (row, number of alternatives), in the order of `output.logprobs`.
        listeners: (row, listener that receives the row's token).
    """

    seq_ids: tuple[int, ...]
    output: SampleOutput
    drafts: DraftRows | None = None
    logprob_rows: Sequence[tuple[int, int]] = ()
    listeners: Sequence[tuple[int, TokenListener]] = ()


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of prompt tokens.

    Attributes:
        wanted: (seq_id, number of tokens, number of alternatives), one after the other.
        parts: log-probabilities of these tokens, in pieces, on the device; empty on ranks that do
            not sample.
    """

    wanted: tuple[tuple[int, int, int], ...] = ()
    parts: list[SampleOutput] = field(default_factory=list)


class PendingStep:
    """A launched step. On a CPU it is done; on a GPU its kernels and the copy of its tokens to the
    host are queued.

    Args:
        device: the device that the step runs on.
        sampled: None if the step yields no token.
    """

    def __init__(
        self,
        step: int,
        started: float,
        device: torch.device,
        sampled: Sampled | None = None,
        scores: PromptScores | None = None,
    ) -> None:
        self._step = step
        self._started = started
        self._sampled = sampled
        self._wanted = () if scores is None else scores.wanted
        self._output = None if sampled is None else sampled.output
        self._scores = [] if scores is None else scores.parts
        self._result: StepResult | None = None
        self._lock = threading.Lock()
        self._copied: torch.cuda.Event | None = None
        if device.type != "cpu":
            self._output = None if self._output is None else _to_host(self._output)
            self._scores = [_to_host(part) for part in self._scores]
            # Also recorded for a step that yields no token: it is not done before this event, and
            # the number of steps in flight is limited.
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    @property
    def done(self) -> bool:
        """True if `result` returns at once."""
        return self._copied is None or bool(self._copied.query())  # type: ignore[no-untyped-call]

    def result(self) -> StepResult:
        """Wait for the step's tokens and return them; every call returns the same result.

        Raises:
            RuntimeError: a kernel of this or an earlier step failed on the GPU.
        """
        # The next launch may need the tokens while another thread waits for them: each token goes
        # to its listeners once.
        with self._lock:
            if self._result is None:
                self._result = self._take()
            return self._result

    def _take(self) -> StepResult:
        if self._copied is not None:
            self._copied.synchronize()
        prompt_logprobs = self._prompt_logprobs()
        sampled, output = self._sampled, self._output
        if sampled is None or output is None:
            elapsed_s = time.perf_counter() - self._started
            return StepResult(self._step, elapsed_s=elapsed_s, prompt_logprobs=prompt_logprobs)
        token_ids, seq_ids = output.token_ids.tolist(), sampled.seq_ids
        kept: list[bool] | None = None
        num_tokens: tuple[int, ...] = ()
        if sampled.drafts is not None:
            kept, num_tokens = kept_rows(token_ids, sampled.drafts)
            seq_ids = tuple(dict.fromkeys(seq_ids))
        for row, listener in sampled.listeners:
            if kept is None or kept[row]:
                listener.push(token_ids[row])
        logprobs: dict[int, list[TokenLogprobs]] = {}
        for (row, num_top), entry in zip(sampled.logprob_rows, _entries(output), strict=True):
            if kept is None or kept[row]:
                logprobs.setdefault(sampled.seq_ids[row], []).append(_cut(entry, num_top))
        if kept is not None:
            token_ids = [token_id for token_id, is_kept in zip(token_ids, kept, strict=True) if is_kept]
        return StepResult(
            step=self._step,
            seq_ids=seq_ids,
            token_ids=tuple(token_ids),
            logprobs={seq_id: tuple(entries) for seq_id, entries in logprobs.items()},
            elapsed_s=time.perf_counter() - self._started,
            num_tokens=num_tokens,
            prompt_logprobs=prompt_logprobs,
        )

    def _prompt_logprobs(self) -> dict[int, tuple[TokenLogprobs, ...]]:
        if not self._scores:
            return {}
        entries = iter([entry for part in self._scores for entry in _entries(part)])
        return {
            seq_id: tuple(_cut(next(entries), num_top) for _ in range(count))
            for seq_id, count, num_top in self._wanted
        }


@dataclass(frozen=True, slots=True)
class UnsampledStep:
    """A launched step that awaits masks.

    Attributes:
        sample: samples with the masks; called once, before the next launch, from any thread.
    """

    sample: Callable[[StepMasks], PendingStep]


def _entries(output: SampleOutput) -> list[TokenLogprobs]:
    """Return one entry for each row with log-probabilities."""
    if output.logprobs is None or output.top_ids is None or output.top_logprobs is None:
        return []
    rows = zip(output.logprobs.tolist(), output.top_ids.tolist(), output.top_logprobs.tolist(), strict=True)
    return [TokenLogprobs(chosen, tuple(zip(ids, values, strict=True))) for chosen, ids, values in rows]


def _cut(entry: TokenLogprobs, num_top: int) -> TokenLogprobs:
    return entry if len(entry.top) == num_top else TokenLogprobs(entry.logprob, entry.top[:num_top])


def _to_host(output: SampleOutput) -> SampleOutput:
    """Return a copy in pinned memory; the copy is queued after the kernels that compute the
    output."""
    parts = (output.logprobs, output.top_ids, output.top_logprobs)
    return SampleOutput(
        _to_pinned(output.token_ids), *(None if part is None else _to_pinned(part) for part in parts)
    )


def _to_pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
