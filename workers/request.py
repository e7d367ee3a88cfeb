"""A request to an engine (token ids, sampling, stop conditions) and its outputs. Independent of
text, HTTP and harmony."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from workers.constraint.automaton import NO_LIMITS, ConstraintLimits
from workers.constraint.codec import Constraint

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """The form of a text that `LLM` generates, under vLLM's names: exactly one of these.

    Attributes:
        json: a JSON schema, or its text; the model does not see it.
        regex: the text matches it as a whole; in the syntax of Rust's `regex`.
        choice: the text is one of these.
        grammar: in llguidance's variant of Lark, whose first rule is `start`.
        json_object: the text is any JSON object.
    """

    json: Mapping[str, object] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool = False


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is sampled and when the sequence ends. Names and defaults are vLLM's where
    OpenAI has none.

    Attributes:
        max_tokens: maximum output tokens, >= 1; None for up to the end of the context.
        temperature: >= 0; 0 is greedy (ties: the lowest id).
        top_p: (0, 1]; the smallest set of most likely tokens whose probabilities sum to at least
            top_p.
        top_k: keep the k most likely tokens; 0 or -1 for all.
        min_p: [0, 1]; keep tokens at least min_p times as likely as the most likely one.
        presence_penalty, frequency_penalty: [-2, 2], over output tokens.
        repetition_penalty: > 0, over prompt and output tokens; 1 is off.
        logit_bias: (token id, bias) pairs, added to the logits.
        seed: 64 bits; the same seed gives the same tokens whatever else is in the batch. If None,
            the gateway (or `LLM`) draws one.
        logprobs: number of most likely alternatives reported with each token; 0 for the sampled
            token only; None for none.
        stop_token_ids: tokens that end the sequence (and are reported); not before min_tokens.
        min_tokens: number of output tokens before which stop tokens cannot be sampled.
        ignore_eos: stop_token_ids and the model's own end tokens do not end the sequence.
        prompt_logprobs: number of most likely alternatives reported with each prompt token but the
            first; 0 for that token only; None for none. The prefix cache is then not read.
        allowed_token_ids: the only tokens that may be sampled; empty for all.
        bad_words_token_ids: token sequences that the output must not contain. A token that would
            complete one is not sampled, unless no other is left.
        n: number of sequences for one prompt. The engine runs one sequence per request: gateway and
            `LLM` fan out, and choice i gets seed + i.
        structured_outputs: form of the text, for `LLM` alone: an engine's request has a constraint
            instead.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    n: int = 1
    prompt_logprobs: int | None = None
    allowed_token_ids: tuple[int, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    structured_outputs: StructuredOutputsParams | None = None


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to generate.

    Attributes:
        request_id: unique among the engine's live requests.
        prompt_token_ids: at least one id.
        sampling: n is 1 and seed is set.
        output_token_ids: tokens generated on another replica; generation continues after them as if
            they had been sampled here.
        deadline_s: seconds from submission; None for no deadline.
        constraint: the tokens allowed in each state; None for all.
        constraint_limits: when the constraint's automaton takes the overflow of its states.
        ignored_stop_token_ids: end tokens of the model that do not end this sequence.
        adapter: name of the adapter to run with; None for the base model.
        cache_salt: KV blocks are shared only between requests with the same salt and the same
            adapter.
        priority: of waiting requests the one with the lowest value is admitted first, of running
            ones that with the highest is preempted first; equal ones in order of arrival.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    output_token_ids: tuple[int, ...] = ()
    deadline_s: float | None = None
    constraint: Constraint | None = None
    constraint_limits: ConstraintLimits = NO_LIMITS
    ignored_stop_token_ids: tuple[int, ...] = ()
    adapter: str | None = None
    cache_salt: str | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities of one output token, of the distribution before temperature,
    penalties and masks (vLLM's `raw_logprobs`).

    Attributes:
        logprob: that of the sampled token.
        top: (token id, logprob), most likely first; as many as requested.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """Tokens since the last output of the same request. The last output has a finish reason and
    comes exactly once.

    Attributes:
        token_ids: new ids in order, including a stop token.
        logprobs: one per id if requested, else empty.
        prompt_logprobs: those of prompt tokens since the last output, from the second token on, if
            requested; they come before the first output token.
        finish_reason: None while more output will come.
        stop_token_id: the token that ended the sequence, with reason `stop`.
        num_cached_tokens: prompt tokens found in the prefix cache (first admission).
        error: one sentence, with reason `error` or `abort`.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """The load of an engine.

    Attributes:
        num_waiting: requests accepted but not running.
        kv_usage: fraction of the full group's blocks in use, 0 to 1.
        accepting: False while draining or dead.
    """

    num_running: int
    num_waiting: int
    kv_usage: float
    accepting: bool
