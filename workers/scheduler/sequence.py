"""A sequence: the running state of one request in the engine, and the update that the engine
receives about it after a step."""

import enum
from array import array
from dataclasses import dataclass

from workers.kv_cache.manager import SequenceBlocks
from workers.kv_cache.prefix_cache import hash_root
from workers.request import EngineRequest, FinishReason, TokenLogprobs


class SequenceStatus(enum.Enum):
    """State of a sequence in the scheduler; WAITING: not admitted yet, or preempted."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """One request's tokens and progress. Only the scheduler changes it; all other code reads it.

    Args:
        seq_id: never used before in the life of this engine.
        request: checked by `Scheduler.check`; its output_token_ids count as sampled.
        model_stop_token_ids: the model's own end tokens, which end the sequence unless the request
            ignores them, all or those of its `ignored_stop_token_ids`.

    Attributes:
        token_ids: prompt, then output.
        stop_token_ids: all tokens that end the sequence, in a fixed order; empty with ignore_eos.
        num_computed_tokens: tokens whose KV is in the cache, or will be after the steps planned so
            far have run, drafts in flight included.
        num_pending_tokens: number of entries that sample in plans whose results are not back; 0 or
            1.
        num_draft_tokens: number of drafts among `num_computed_tokens`, which may turn out wrong.
        next_prompt_logprob, first_missing_prompt_logprob: first prompt position whose
            log-probability no plan has asked for, and first whose log-probability has not arrived.
        num_cached_tokens: number of prompt tokens found in the prefix cache at the first admission.
        num_preemptions: number of preemptions so far.
    """

    __slots__ = (
        "_stop_token_ids",
        "blocks",
        "first_missing_prompt_logprob",
        "max_len",
        "next_prompt_logprob",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_draft_tokens",
        "num_pending_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "request",
        "seq_id",
        "status",
        "stop_token_ids",
        "token_ids",
        "wants_prompt_logprobs",
    )

    def __init__(
        self, seq_id: int, request: EngineRequest, model_stop_token_ids: tuple[int, ...] = ()
    ) -> None:
        self.seq_id = seq_id
        self.request = request
        # An array, not a list: the garbage collector would walk a list's elements, which takes 50
        # ms per collection at 1024 sequences.
        self.token_ids = array("q", (*request.prompt_token_ids, *request.output_token_ids))
        self.num_prompt_tokens = len(request.prompt_token_ids)
        sampling = request.sampling
        self.stop_token_ids = (
            ()
            if sampling.ignore_eos
            else tuple(
                dict.fromkeys(
                    (
                        *sampling.stop_token_ids,
                        *(i for i in model_stop_token_ids if i not in request.ignored_stop_token_ids),
                    )
                )
            )
        )
        self._stop_token_ids = frozenset(self.stop_token_ids)
        # Set by the scheduler, which knows the context limit: the sequence ends at this length.
        self.max_len = 0
        self.status = SequenceStatus.WAITING
        self.num_computed_tokens = 0
        self.num_pending_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.blocks = SequenceBlocks(hash_root(request.adapter, request.cache_salt))
        self.num_draft_tokens = 0
        self.wants_prompt_logprobs = sampling.prompt_logprobs is not None
        # No logits precede the first prompt token.
        self.next_prompt_logprob = self.first_missing_prompt_logprob = 1

    @property
    def max_cached_tokens(self) -> int | None:
        """Maximum tokens that may come from the prefix cache, since log-probabilities need the
        others computed; None if there is no limit."""
        missing = self.first_missing_prompt_logprob
        is_missing = self.wants_prompt_logprobs and missing < self.num_prompt_tokens
        return missing - 1 if is_missing else None

    @property
    def num_output_tokens(self) -> int:
        """Number of output tokens so far, including those from before a resumption."""
        return len(self.token_ids) - self.num_prompt_tokens

    def finish_reason(self) -> FinishReason | None:
        """Return why the sequence ends with its last token; None while it continues. The last token
        of a prompt never ends it.

        A stop token counts only after min_tokens tokens, when the sampler may choose one.
        """
        num_output = len(self.token_ids) - self.num_prompt_tokens
        if self.token_ids[-1] in self._stop_token_ids and num_output > self.request.sampling.min_tokens:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_len else None

    def append(self, token_id: int) -> FinishReason | None:
        """Add a sampled token and return `finish_reason`."""
        self.token_ids.append(token_id)
        if token_id in self._stop_token_ids or len(self.token_ids) >= self.max_len:
            return self.finish_reason()
        return None

    def extend(self, token_ids: tuple[int, ...]) -> tuple[int, FinishReason | None]:
        """Add sampled tokens up to one that ends the sequence. Return the number of tokens added,
        and `finish_reason`."""
        for num_kept, token_id in enumerate(token_ids, start=1):
            reason = self.append(token_id)
            if reason is not None:
                return num_kept, reason
        return len(token_ids), None


@dataclass(slots=True)
class SequenceUpdate:
    """A change of a sequence: new tokens, its end, or both. The update with a finish_reason is the
    last one and comes exactly once.

    Attributes:
        token_ids: the new tokens; more than one if drafts were right.
        logprobs: one entry for each new token if the request asked for them, else empty.
        stop_token_id: token that ended the sequence, with reason `stop`; also the last of
            `token_ids` if it is new.
        num_cached_tokens: number of prompt tokens found in the prefix cache at the first admission.
        prompt_logprobs: entries of further prompt tokens, starting with the second.
        error: one sentence, with reason `abort` or `error`.
    """

    seq_id: int
    token_ids: tuple[int, ...] = ()
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    stop_token_id: int | None = None
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
