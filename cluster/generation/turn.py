"""The work of one request: its prompts, and for each choice the engine's request and the reader of
its answer."""

import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from cluster.fleet.table import RoutingHint
from cluster.generation.bad_words import Tokens
from cluster.generation.choices import ChatChoice, Choice, CompletionChoice, ReasoningLimit
from cluster.generation.constraints import TurnConstraint
from cluster.generation.continuation import begun_at
from cluster.generation.limits import num_output_tokens
from cluster.generation.requests import ChatRequest, CompletionRequest, Options
from cluster.generation.settings import ModelInfo
from cluster.harmony.encoding import HarmonyEncoding
from workers.constraint.automaton import ConstraintLimits
from workers.constraint.codec import Constraint
from workers.request import EngineOutput, EngineRequest, SamplingParams

DEFAULT_COMPLETION_TOKENS = 16
GREEDY_BELOW = 1e-5
"""Temperature below which sampling is greedy (vLLM's `_SAMPLING_EPS`): dividing logits by it would
overflow."""


@dataclass(frozen=True, slots=True)
class Job:
    """One choice: its request to the engine and the reader of its answer.

    Attributes:
        hint: the router's input; one object for all jobs of a prompt.
        prompt_index: index of its prompt among the turn's prompts.
        journal: keeps what is generated; None: nothing does.
    """

    request: EngineRequest
    choice: Choice
    hint: RoutingHint = field(default_factory=RoutingHint)
    prompt_index: int = 0
    journal: "Journal | None" = None


@dataclass(frozen=True, slots=True)
class Journal:
    """Where the outputs of one choice are kept, so that another process can go on.

    Attributes:
        keep: called with each output before its events are made; the choice waits for it.
        begun: what was kept before, by a process that has ended; the choice goes on after it.
    """

    keep: Callable[[EngineOutput], Awaitable[None]]
    begun: EngineOutput = field(default_factory=EngineOutput)

    def resumed(self, job: Job) -> Job:
        """Return the job that goes on after what was kept."""
        tokens = (*job.request.output_token_ids, *self.begun.token_ids)
        return replace(job, request=replace(job.request, output_token_ids=tokens), journal=self)


@dataclass(frozen=True, slots=True)
class Turn:
    """The work of one request.

    Attributes:
        id: the request's, as clients see it.
        model: the name of the model that answers.
        prompts: token ids of each prompt.
        constrained_by: the field that asks for a constraint, as the client's API names it; None: no
            field does.
        arrived, deadline: monotonic seconds; deadline None: no deadline.
    """

    id: str
    model: str
    prompts: tuple[tuple[int, ...], ...]
    jobs: tuple[Job, ...]
    arrived: float
    deadline: float | None
    constrained_by: str | None = None


def chat_jobs(
    id: str,
    request: ChatRequest,
    prompt: tuple[int, ...],
    model: ModelInfo,
    encoding: HarmonyEncoding,
    bad_words: tuple[Tokens, ...] = (),
    constraint: TurnConstraint | None = None,
) -> list[Job]:
    """Return the choices of a chat.

    Args:
        bad_words: tokens of the request's bad words.
        constraint: of its turns; None: any token may come next.
    Raises:
        ContextLengthExceeded, InvalidRequest: see `num_output_tokens`.
    """
    max_tokens = num_output_tokens(
        request.sampling,
        len(prompt),
        model,
        names=request.names,
        prompt_param=request.names.messages,
        default=None,
        cuts=request.cuts_max_tokens,
    )
    sampling = _complete(request.sampling, max_tokens, bad_words, encoding)
    tools = [tool.name for tool in request.tools]
    begun: tuple[int, ...] = ()
    if request.continues_last:
        begun = prompt[begun_at(prompt, encoding, request.names.continues) :]
    jobs = []
    for index in range(sampling.n):
        asked = _engine_request(f"{id}-{index}", prompt, sampling, index, request.options)
        choice = ChatChoice(
            index,
            encoding,
            request.stop,
            tools=tools,
            parallel_tool_calls=request.parallel_tool_calls,
            max_calls=1 if constraint is None else constraint.grammar.max_calls,
            ends_with_turn=not sampling.ignore_eos,
            per_token=request.per_token,
        )
        num_reasoning_tokens = choice.begin_with(begun)
        if constraint is not None:
            asked = _constrained(asked, constraint, encoding)
            num_wrap_up = len(encoding.encode(constraint.grammar.wrap_up))
            choice.reasoning_limit = ReasoningLimit(asked.constraint_limits, num_wrap_up)
            asked = _resumed(asked, len(begun), num_reasoning_tokens)
        jobs.append(Job(asked, choice))
    return jobs


def completion_jobs(
    id: str,
    request: CompletionRequest,
    prompt_index: int,
    prompt: tuple[int, ...],
    model: ModelInfo,
    encoding: HarmonyEncoding,
    bad_words: tuple[Tokens, ...] = (),
    constraint: Constraint | None = None,
) -> list[Job]:
    """Return the choices of one of a request's prompts.

    Args:
        bad_words: tokens of the request's bad words.
        constraint: of the text; None: any.
    Raises:
        ContextLengthExceeded, InvalidRequest: see `num_output_tokens`.
    """
    max_tokens = num_output_tokens(
        request.sampling,
        len(prompt),
        model,
        names=request.names,
        prompt_param=request.place(prompt_index),
        default=DEFAULT_COMPLETION_TOKENS,
    )
    sampling = _complete(request.sampling, max_tokens, bad_words, encoding)
    echo = _echo(request, prompt_index, prompt, encoding)
    first = prompt_index * sampling.n
    return [
        Job(
            replace(
                _engine_request(f"{id}-{first + offset}", prompt, sampling, offset, request.options),
                constraint=constraint,
            ),
            CompletionChoice(
                first + offset,
                encoding,
                request.stop,
                echo=echo,
                echoed_names=_echoes_text(request, prompt_index) or not request.skip_special_tokens,
                prompt_only=request.prompt_only,
                skip_special_tokens=request.skip_special_tokens,
            ),
            prompt_index=prompt_index,
        )
        for offset in range(sampling.n)
    ]


def _constrained(request: EngineRequest, turn: TurnConstraint, encoding: HarmonyEncoding) -> EngineRequest:
    """Return the request for a turn with its constraint."""
    request = replace(
        request,
        constraint=turn.constraint,
        constraint_limits=turn.limits(request.sampling.max_tokens, encoding),
    )
    if turn.grammar.max_calls == 1:
        return request
    stops = tuple(i for i in request.sampling.stop_token_ids if i != encoding.call)
    return replace(
        request,
        sampling=replace(request.sampling, stop_token_ids=stops),
        ignored_stop_token_ids=(encoding.call,),
    )


def _resumed(request: EngineRequest, num_begun: int, num_reasoning_tokens: int) -> EngineRequest:
    """Return the request for a turn with its last prompt tokens as its first output, so that the
    automaton is where they lead.

    Args:
        num_begun: number of these tokens.
        num_reasoning_tokens: number of them that are reasoning.
    """
    if not num_begun:
        return request
    sampling, limits, prompt = request.sampling, request.constraint_limits, request.prompt_token_ids
    counted, length = limits.max_counted_tokens, limits.max_length
    return replace(
        request,
        prompt_token_ids=prompt[:-num_begun],
        output_token_ids=prompt[-num_begun:],
        sampling=replace(
            sampling,
            max_tokens=(sampling.max_tokens or 0) + num_begun,
            min_tokens=sampling.min_tokens and sampling.min_tokens + num_begun,
        ),
        constraint_limits=ConstraintLimits(
            None if counted is None else counted + num_reasoning_tokens,
            None if length is None else length + num_begun,
        ),
    )


def _echo(
    request: CompletionRequest, prompt_index: int, ids: Sequence[int], encoding: HarmonyEncoding
) -> str:
    if not request.echo:
        return ""
    prompt = request.prompts[prompt_index]
    if isinstance(prompt, str) and _echoes_text(request, prompt_index):
        return prompt
    return encoding.decode(ids, skip_special_tokens=request.skip_special_tokens)


def _echoes_text(request: CompletionRequest, prompt_index: int) -> bool:
    """Return whether the echo is the text that the client sent, and not that of its tokens."""
    return isinstance(request.prompts[prompt_index], str) and request.options.truncation is None


def _complete(
    sampling: SamplingParams, max_tokens: int, bad_words: tuple[Tokens, ...], encoding: HarmonyEncoding
) -> SamplingParams:
    """Fill in the parameters that the client left open, so that engines need no defaults. A top_p
    of 0 keeps the most likely token alone, so it is greedy too."""
    greedy = sampling.temperature < GREEDY_BELOW or sampling.top_p == 0
    return replace(
        sampling,
        max_tokens=max_tokens,
        temperature=0.0 if greedy else sampling.temperature,
        top_p=sampling.top_p or 1.0,
        seed=secrets.randbits(64) if sampling.seed is None else sampling.seed % 2**64,
        bad_words_token_ids=bad_words,
        # With ignore_eos the engine ignores all stop tokens.
        stop_token_ids=tuple(dict.fromkeys((*encoding.stop_token_ids, *sampling.stop_token_ids))),
    )


def _engine_request(
    id: str, prompt: tuple[int, ...], sampling: SamplingParams, offset: int, options: Options
) -> EngineRequest:
    """Return the engine's request for one of the n sequences of a prompt; its seed is the request's
    plus its index among them."""
    assert sampling.seed is not None
    sampling = replace(
        sampling,
        n=1,
        seed=(sampling.seed + offset) % 2**64,
        prompt_logprobs=None if offset else sampling.prompt_logprobs,  # the same for all
    )
    return EngineRequest(id, prompt, sampling, cache_salt=options.cache_salt, priority=options.priority)
