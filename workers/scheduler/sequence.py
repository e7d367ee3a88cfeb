"""A sequence: the running state of one request in the engine, and what the engine is told of it
after a step."""

import enum
from array import array
from dataclasses import dataclass

from workers.kv_cache.manager import SequenceBlocks
from workers.request import EngineRequest, FinishReason, TokenLogprobs


class SequenceStatus(enum.Enum):
    """WAITING: not admitted yet, or preempted."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """One request's tokens and progress. The scheduler changes it; everybody else reads.

    Args:
        seq_id: not used before in this engine's life.
        request: checked by `Scheduler.check`; its output_token_ids count as sampled.
        model_stop_token_ids: the model's own end tokens, which end the sequence unless the request
            ignores them.

    Attributes:
        token_ids: prompt, then output.
        stop_token_ids: all that end the sequence, in a fixed order; empty with ignore_eos.
        num_computed_tokens: tokens whose KV is in the cache, or will be when the steps planned so
            far have run.
        num_pending_tokens: sampled by plans whose results are not back; 0 or 1.
        num_cached_tokens: prompt tokens found in the prefix cache at the first admission.
        num_preemptions: how often it lost its blocks.
    """

    __slots__ = (
        "_stop_token_ids",
        "blocks",
        "max_len",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_pending_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "request",
        "seq_id",
        "status",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self, seq_id: int, request: EngineRequest, model_stop_token_ids: tuple[int, ...] = ()
    ) -> None:
        self.seq_id = seq_id
        self.request = request
        # An array, not a list: the garbage collector would walk a list's elements, 50 ms a
        # collection at 1024 sequences.
        self.token_ids = array("q", (*request.prompt_token_ids, *request.output_token_ids))
        self.num_prompt_tokens = len(request.prompt_token_ids)
        sampling = request.sampling
        self.stop_token_ids = (
            ()
            if sampling.ignore_eos
            else tuple(dict.fromkeys((*sampling.stop_token_ids, *model_stop_token_ids)))
        )
        self._stop_token_ids = frozenset(self.stop_token_ids)
        # Set by the scheduler, which knows the context limit: the sequence ends when it is this
        # long.
        self.max_len = 0
        self.status = SequenceStatus.WAITING
        self.num_computed_tokens = 0
        self.num_pending_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.blocks = SequenceBlocks()

    @property
    def num_output_tokens(self) -> int:
        """Output tokens so far, those from before a resumption included."""
        return len(self.token_ids) - self.num_prompt_tokens

    def finish_reason(self) -> FinishReason | None:
        """Why the sequence is over with its last token; None while it goes on. A prompt's own last
        token never ends it.

        A stop token counts once min_tokens came before it, which is when the sampler may choose
        one.
        """
        num_output = len(self.token_ids) - self.num_prompt_tokens
        if self.token_ids[-1] in self._stop_token_ids and num_output > self.request.sampling.min_tokens:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_len else None

    def append(self, token_id: int) -> FinishReason | None:
        """Take in a sampled token; returns `finish_reason`."""
        self.token_ids.append(token_id)
        if token_id in self._stop_token_ids or len(self.token_ids) >= self.max_len:
            return self.finish_reason()
        return None


@dataclass(slots=True)
class SequenceUpdate:
    """What became of a sequence: a token, its end, or both. The update with a finish_reason is the
    last and comes exactly once.

    Attributes:
        token_id: the new token; None if it ended without one.
        stop_token_id: the token that ended it, with reason `stop`; then also `token_id`, if it is
            new.
        num_cached_tokens: prompt tokens found in the prefix cache at the first admission.
        error: one sentence, with reason `abort` or `error`.
    """

    seq_id: int
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None
