"""Offline inference: `LLM(path).generate(prompts, SamplingParams())`, modelled on vLLM's class of
that name. The only module of `workers` that handles text."""

import atexit
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, NoReturn, Self

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from kernels.formats import MoeActivationDtype
from workers.config import (
    CacheConfig,
    CpuIsa,
    DenseDtype,
    Dtype,
    EngineConfig,
    GrammarConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
)
from workers.constraint.automaton import TokenAutomaton
from workers.constraint.compiler import PreparedConstraint
from workers.cores import engine_threads
from workers.engine.engine import Engine
from workers.engine.llm_constraints import LlmConstraints, ReadyConstraint
from workers.engine.progress import StartUpProgress
from workers.engine.stream import OutputStream, ThreadReader
from workers.errors import CheckpointError, EngineDead, InvalidRequest
from workers.executor.base import Executor
from workers.executor.local import local_executor
from workers.model_config import load_model_config
from workers.request import (
    EngineRequest,
    FinishReason,
    SamplingParams,
    StructuredOutputsParams,
    TokenLogprobs,
)
from workers.rpc.validate import MAX_SEED, check_request

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "StructuredOutputsParams"]

Prompt = str | Sequence[int]
END_TOKENS = ("<|return|>", "<|call|>", "<|endoftext|>")
"""Names of the tokens that end a turn of gpt-oss; looked up in the checkpoint's tokenizer."""
_NO_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of the n answers to a prompt.

    Attributes:
        text: without special tokens and without the stop token; empty if the checkpoint has no
            tokenizer.
        token_ids: including the stop token.
        logprobs: one per token, if requested.
        stop_reason: the requested stop token id that ended it; None for the model's own end and for
            length.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason
    stop_reason: int | None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its answers; `prompt` is None if token ids were given.

    Attributes:
        prompt_logprobs: one for each prompt token, if requested; None for the first, which follows
            no token.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


@dataclass(slots=True)
class _Choice:
    """One running sequence."""

    prompt_index: int
    index: int
    request: EngineRequest
    wanted_stops: tuple[int, ...]
    prepared: PreparedConstraint | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])


class LLM:
    """A model in this process, or in child processes if there are several ranks. Use it as a
    context manager, or call `shutdown`.

    Args:
        model: folder of a gpt-oss checkpoint.
        max_model_len: context limit in tokens; None for the model's own, or as much of it as the KV
            cache holds (`info.max_model_len`).
        kv_cache_bytes: size of each rank's KV cache; None chooses it from the free memory.
        tensor_parallel_size, expert_parallel_size: number of ranks, and number of groups that the
        experts are split into (None: one per rank).
        quantize: pack the experts of a bf16 checkpoint while loading.
        kv_cache_dtype: as `CacheConfig.dtype`.
        cpu_dense_dtype: int8 quantises attention projections and lm_head, on a CPU.
        cpu_isa: CPU instruction set, as `EngineConfig.cpu_isa`. It applies to the whole process:
            the LLM started last decides.
        moe_activation_dtype: mxfp8 rounds the inputs of MXFP4 experts to 8 bits, on hardware with
            block-scaled matrix products.
        allow_zero_weights: accept matrices, experts and norms that are all zeros.
        threads: compute threads on a CPU, for this whole process and all ranks together; None for
            torch's number.
        executor_factory: creates the executor that runs the model; None for ranks on this host.
            Benchmarks pass one whose weights are already loaded.
    Raises:
        CheckpointError, ConfigError: one sentence that names the problem.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: Dtype = "bfloat16",
        device: str = "cpu",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        kv_cache_bytes: int | None = None,
        prefix_caching: bool = True,
        tensor_parallel_size: int = 1,
        expert_parallel_size: int | None = None,
        quantize: Literal["mxfp4"] | None = None,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3"] = "auto",
        cpu_dense_dtype: DenseDtype = "bf16",
        moe_activation_dtype: MoeActivationDtype = "auto",
        cpu_isa: CpuIsa = "auto",
        allow_zero_weights: bool = False,
        threads: int | None = None,
        executor_factory: Callable[[EngineConfig, ModelConfig], Executor] | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(engine_threads(threads, setting="threads"))
        config = EngineConfig(
            Path(model),
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            cache=CacheConfig(kv_cache_bytes, prefix_caching, gpu_memory_utilization, kv_cache_dtype),
            parallel=ParallelConfig(tensor_parallel_size, expert_parallel_size),
            quantize=quantize,
            enforce_eager=enforce_eager,
            cpu_dense_dtype=cpu_dense_dtype,
            moe_activation_dtype=moe_activation_dtype,
            cpu_isa=cpu_isa,
            allow_zero_weights=allow_zero_weights,
            grammars=GrammarConfig(load="first_use"),
            # All prompts are in memory already: a limit on waiting ones would only refuse them.
            scheduler=SchedulerConfig(max_num_seqs, max_num_batched_tokens, max_waiting_requests=_NO_LIMIT),
        )
        self._start(config, executor_factory)

    def _start(
        self, config: EngineConfig, executor_factory: Callable[[EngineConfig, ModelConfig], Executor] | None
    ) -> None:
        model = load_model_config(config.model_path)
        self._tokenizer = _load_tokenizer(config.model_path)
        known = (
            (self._tokenizer.token_to_id(name) for name in END_TOKENS) if self._tokenizer is not None else ()
        )
        self._end_token_ids = tuple(
            token_id for token_id in known if token_id is not None and token_id < model.vocab_size
        )
        progress = StartUpProgress()
        make = executor_factory or partial(local_executor, progress=progress)
        self._executor = make(config, model)
        self.engine = Engine(config, model, self._executor)
        self.info = self.engine.start()
        self._constraints = LlmConstraints(self.engine, self._tokenizer, self._end_token_ids)
        progress.close()
        self._num_requests = 0
        # Threads that are in native code when the interpreter goes away crash the process.
        self._at_exit = partial(_shut_down, self.engine, os.getpid())
        atexit.register(self._at_exit)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        constraints: TokenAutomaton | Sequence[TokenAutomaton | None] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer all prompts; return when the last one is done, in the order of the prompts.

        Args:
            prompts: texts (special tokens in them are parsed) or token ids; one or many.
            sampling: one for all prompts, or one for each. A missing seed is drawn; choice i gets
                seed + i. The text begins in the form of `structured_outputs` at once: what comes
                before it, such as a chat's reasoning, is part of the prompt.
            constraints: the tokens that may come next; one automaton for all prompts, or one (or
                None) for each.
            use_tqdm: show a progress bar on stderr.
        Raises:
            InvalidRequest: names the field; nothing was generated.
            EngineDead: a step failed.
        """
        prompt_list = _prompt_list(prompts)
        texts = [prompt if isinstance(prompt, str) else None for prompt in prompt_list]
        ids = [self._encode(prompt) for prompt in prompt_list]
        params = (
            [sampling or SamplingParams()] * len(ids)
            if not isinstance(sampling, Sequence)
            else list(sampling)
        )
        if len(params) != len(ids):
            raise InvalidRequest(f"{len(ids)} prompts but {len(params)} sampling parameters", "sampling")
        prepared = self._constraints.prepare(constraints, params)
        first = self._num_requests
        self._num_requests += len(ids)
        choices = [
            choice
            for index in range(len(ids))
            for choice in self._choices(index, f"{first + index}", ids[index], params[index], prepared[index])
        ]
        finished = self._run(choices, use_tqdm)
        prompt_logprobs = {
            choice.prompt_index: tuple(choice.prompt_logprobs)
            for choice in choices
            if choice.request.sampling.prompt_logprobs is not None
        }
        results = [
            RequestOutput(f"{first + index}", texts[index], ids[index], [], prompt_logprobs.get(index))
            for index in range(len(ids))
        ]
        for choice, output in zip(choices, finished, strict=True):
            results[choice.prompt_index].outputs.append(output)
        return results

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Compute the logits after each token of one sequence, independently of running
        generations.

        Returns:
            [len(token_ids), vocab_size] fp32.
        Raises:
            InvalidRequest: no tokens, an unknown token, or more tokens than the context.
        """
        request = EngineRequest("logits", tuple(token_ids), SamplingParams())
        check_request(request, self.engine.vocab_size)
        if len(token_ids) > self.engine.max_model_len:
            raise InvalidRequest(
                f"{len(token_ids)} tokens exceed the context of {self.engine.max_model_len}", "token_ids"
            )
        return self._executor.logits(request.prompt_token_ids)

    def shutdown(self) -> None:
        """Free the model. Idempotent; done when the interpreter ends if it was not before."""
        self.engine.shutdown()
        atexit.unregister(self._at_exit)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in prompt):
                raise InvalidRequest("a prompt must be a text or a list of token ids", "prompt")
            return tuple(prompt)
        if self._tokenizer is None:
            raise InvalidRequest(
                "the checkpoint has no tokenizer.json; give token ids instead of text", "prompt"
            )
        return tuple(self._tokenizer.encode(prompt).ids)

    def _choices(
        self,
        prompt_index: int,
        request_id: str,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        constraint: ReadyConstraint | None,
    ) -> list[_Choice]:
        sampling_of_one = replace(sampling, n=1, structured_outputs=None)
        check_request(EngineRequest(request_id, prompt, sampling_of_one), self.engine.vocab_size)
        if not isinstance(sampling.n, int) or sampling.n < 1:
            raise InvalidRequest(f"n must be at least 1, got {sampling.n}", "n")
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        stops = (*sampling.stop_token_ids, *self._end_token_ids)
        return [
            _Choice(
                prompt_index,
                index,
                EngineRequest(
                    f"{request_id}-{index}",
                    prompt,
                    replace(
                        sampling_of_one,
                        seed=(seed + index) & MAX_SEED,
                        stop_token_ids=stops,
                        # Once for all answers.
                        prompt_logprobs=sampling.prompt_logprobs if index == 0 else None,
                    ),
                    constraint=None if constraint is None else constraint.constraint,
                ),
                sampling.stop_token_ids,
                None if constraint is None else constraint.prepared,
            )
            for index in range(sampling.n)
        ]

    def _run(self, choices: Sequence[_Choice], use_tqdm: bool) -> list[CompletionOutput]:
        reader = ThreadReader()
        streams: list[OutputStream] = []
        finished: dict[int, CompletionOutput] = {}
        bar: tqdm[NoReturn] = tqdm(
            total=len(choices), desc="Processed prompts", unit="seq", disable=not use_tqdm, dynamic_ncols=True
        )
        try:
            for choice in choices:
                streams.append(self.engine.submit(choice.request, reader, choice.prepared))
            by_seq_id = {stream.seq_id: choice for stream, choice in zip(streams, choices, strict=True)}
            num_tokens = 0
            for stream, output in reader.read(streams):
                choice = by_seq_id[stream.seq_id]
                choice.token_ids += output.token_ids
                choice.logprobs += output.logprobs
                choice.prompt_logprobs += output.prompt_logprobs
                num_tokens += len(output.token_ids)
                if output.finish_reason in ("abort", "error"):
                    raise stream.failure or EngineDead(output.error or "the engine stopped")
                if output.finish_reason is not None:
                    finished[stream.seq_id] = self._complete(
                        choice, output.finish_reason, output.stop_token_id
                    )
                    bar.set_postfix_str(f"{num_tokens} tokens", refresh=False)
                    bar.update()
        finally:
            bar.close()
            for stream in streams:
                self.engine.abort(stream)
        return [finished[stream.seq_id] for stream in streams]

    def _complete(self, choice: _Choice, reason: FinishReason, stop_token_id: int | None) -> CompletionOutput:
        token_ids = tuple(choice.token_ids)
        shown = token_ids[:-1] if reason == "stop" else token_ids
        return CompletionOutput(
            index=choice.index,
            text=self._tokenizer.decode(shown, skip_special_tokens=True)
            if self._tokenizer is not None
            else "",
            token_ids=token_ids,
            logprobs=None if choice.request.sampling.logprobs is None else tuple(choice.logprobs),
            finish_reason=reason,
            stop_reason=stop_token_id if stop_token_id in choice.wanted_stops else None,
        )


def _shut_down(engine: Engine, pid: int) -> None:
    if os.getpid() == pid:  # a fork has none of the engine's threads
        engine.shutdown()


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    ids = [prompt for prompt in prompts if isinstance(prompt, int)]
    if not ids:
        return [prompt for prompt in prompts if not isinstance(prompt, int)]
    if len(ids) < len(prompts):
        raise InvalidRequest(
            "prompts mixes token ids with prompts; give one list of ids, or a list of texts and lists of ids",
            "prompt",
        )
    return [ids]


def _load_tokenizer(path: Path) -> Tokenizer | None:
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{file} cannot be read as a tokenizer: {error}") from error
