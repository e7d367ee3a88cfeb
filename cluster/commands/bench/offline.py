"""The measurements and report of `cantata bench engine`.

Each iteration submits `--batch-size` random prompts at once and waits for the last token, as vLLM's
`bench latency` does. With more prompts than `--max-num-seqs` it is vLLM's `bench throughput`.
Prefill lasts until every prompt has its first token; decode is the rest.
"""

import argparse
import datetime
import random
import sys
import time
from dataclasses import asdict, dataclass

import orjson
from tqdm import tqdm

from cluster.commands.bench.report import Distribution, distribution
from workers.engine.llm import LLM, SamplingParams
from workers.engine.step_profile import OperationRow, StepProfile, profile_table
from workers.engine.stream import ThreadReader
from workers.errors import EngineDead
from workers.request import EngineRequest

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Settings of the run; part of the JSON, so that it can be repeated."""

    model: str
    dtype: str
    device: str
    tensor_parallel_size: int
    quantize: str | None
    cpu_dense_dtype: str
    cpu_isa: str
    input_len: int
    output_len: int
    batch_size: int
    num_iters: int
    num_iters_warmup: int
    max_num_seqs: int
    max_num_batched_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class PhaseProfile:
    """Profile of one phase.

    Attributes:
        num_steps: number of engine steps.
        operations: operations by time, longest first; the last row is the time outside kernels.
    """

    num_steps: int
    step_s: float
    operations: tuple[OperationRow, ...]


@dataclass(frozen=True, slots=True)
class ProfileReport:
    """Profile of one more iteration with every operation timed, beside the machine's limits as
    measured in the same process.

    Attributes:
        gemm_dtype: `fp32` or `bf16`, whichever gives torch's faster product of square matrices
            here.
    """

    read_bytes_per_s: float
    gemm_flops_per_s: float
    gemm_dtype: str
    prefill: PhaseProfile
    decode: PhaseProfile | None


@dataclass(frozen=True, slots=True)
class EngineReport:
    """The result of a run; the JSON file has exactly these fields.

    Attributes:
        kernels: operation → its implementation.
        latency_s: per iteration, from the first prompt submitted to the last token.
        prefill_s: per iteration, from the first prompt submitted until every prompt has its first
            token.
        time_per_output_token_s: per iteration, the time after prefill divided by a prompt's output
            tokens minus one; null with one output token.
        prompt_tokens_per_s: rate during prefill. The other rates are over all iterations.
    """

    format_version: int
    started_at: str
    settings: EngineSettings
    kernels: dict[str, str]
    latency_s: Distribution
    prefill_s: Distribution
    time_per_output_token_s: Distribution | None
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    profile: ProfileReport | None

    def to_json(self) -> bytes:
        return orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


@dataclass(frozen=True, slots=True)
class _Iteration:
    """Times of one iteration, from `time.perf_counter`."""

    started: float
    prefilled: float
    ended: float


def measure(options: argparse.Namespace) -> EngineReport:
    """Load the model, warm up, run the iterations and, if requested, the profile."""
    started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with LLM(
        options.model,
        dtype=options.dtype,
        device=options.device,
        max_model_len=options.input_len + options.output_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        kv_cache_bytes=options.kv_cache_memory,
        prefix_caching=False,
        tensor_parallel_size=options.tensor_parallel_size,
        quantize=options.quantize,
        cpu_dense_dtype=options.cpu_dense_dtype,
        cpu_isa=options.cpu_isa,
    ) as llm:
        indices = range(options.num_iters_warmup + options.num_iters)
        rounds = [
            _iterate(llm, options, index)
            for index in tqdm(indices, desc="iterations", unit="it", disable=None, file=sys.stderr)
        ]
        profile = _profile(llm, options) if options.profile else None
        kernels = llm.info.kernels
    counted = rounds[options.num_iters_warmup :]
    total_s = sum(each.ended - each.started for each in counted)
    prefill_s = sum(each.prefilled - each.started for each in counted)
    prompt_tokens = options.num_iters * options.batch_size * options.input_len
    output_tokens = options.num_iters * options.batch_size * options.output_len
    latency, prefill = (
        distribution(e.ended - e.started for e in counted),
        distribution(e.prefilled - e.started for e in counted),
    )
    assert latency is not None
    assert prefill is not None
    per_token = (
        distribution((e.ended - e.prefilled) / (options.output_len - 1) for e in counted)
        if options.output_len > 1
        else None
    )
    return EngineReport(
        format_version=FORMAT_VERSION,
        started_at=started_at,
        settings=_settings(options),
        kernels=kernels,
        latency_s=latency,
        prefill_s=prefill,
        time_per_output_token_s=per_token,
        prompt_tokens_per_s=prompt_tokens / prefill_s,
        output_tokens_per_s=output_tokens / total_s,
        total_tokens_per_s=(prompt_tokens + output_tokens) / total_s,
        profile=profile,
    )


def table(report: EngineReport) -> str:
    """Return the report as a table, with times in milliseconds."""
    lines = [
        f"{'prompt tokens/s in prefill':<28}{report.prompt_tokens_per_s:.1f}",
        f"{'output tokens/s':<28}{report.output_tokens_per_s:.1f}",
        f"{'prompt + output tokens/s':<28}{report.total_tokens_per_s:.1f}",
        "",
        f"{'ms':<28}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}",
    ]
    for name, values in (
        ("latency", report.latency_s),
        ("prefill", report.prefill_s),
        ("time per output token", report.time_per_output_token_s),
    ):
        cells = ["-"] * 5 if values is None else [f"{value * 1e3:.2f}" for value in asdict(values).values()]
        lines.append(f"{name:<28}" + "".join(f"{cell:>10}" for cell in cells))
    profile = report.profile
    if profile is not None:
        lines += [
            "",
            f"memory reads run at {profile.read_bytes_per_s / 1e9:.1f} GB/s, torch multiplies "
            f"{profile.gemm_dtype} matrices, ",
        ]
        lines[-1] += (
            f"the faster of fp32 and bf16 here, at {profile.gemm_flops_per_s / 1e9:.0f} GFLOP/s (both "
            f"measured just now)"
        )
        for name, phase in (("prefill", profile.prefill), ("decode", profile.decode)):
            if phase is not None:
                lines += [
                    "",
                    f"{name}: {phase.num_steps} steps of {phase.step_s * 1e3:.2f} ms; the columns are per "
                    f"step",
                    "",
                ]
                lines.append(
                    profile_table(
                        phase.operations,
                        profile.read_bytes_per_s,
                        profile.gemm_flops_per_s,
                        profile.gemm_dtype,
                    )
                )
    return "\n".join(lines)


def _iterate(
    llm: LLM, options: argparse.Namespace, index: int, profile: StepProfile | None = None
) -> _Iteration:
    """Submit the prompts of an iteration and wait for all their tokens. The profile is notified of
    the start and of the end of prefill."""
    requests = _requests(llm, options, index)
    reader = ThreadReader()
    if profile is not None:
        profile.mark()
    started = prefilled = time.perf_counter()
    streams = [llm.engine.submit(request, reader) for request in requests]
    waiting = {stream.seq_id for stream in streams}
    for stream, output in reader.read(streams):
        if output.finish_reason in ("abort", "error"):
            raise stream.failure or EngineDead(output.error or "the engine stopped")
        waiting.discard(stream.seq_id)
        if not waiting and prefilled == started:
            prefilled = time.perf_counter()
            if profile is not None:
                profile.mark()
    ended = time.perf_counter()
    if profile is not None:
        profile.mark()
    return _Iteration(started, prefilled, ended)


def _requests(llm: LLM, options: argparse.Namespace, index: int) -> list[EngineRequest]:
    """Return the requests of an iteration. No two iterations share prompts."""
    generator = random.Random(f"{options.seed}-{index}")
    vocab_size = llm.engine.vocab_size
    sampling = SamplingParams(
        max_tokens=options.output_len, temperature=options.temperature, ignore_eos=True, seed=options.seed
    )
    return [
        EngineRequest(
            f"{index}-{i}", tuple(generator.randrange(vocab_size) for _ in range(options.input_len)), sampling
        )
        for i in range(options.batch_size)
    ]


def _profile(llm: LLM, options: argparse.Namespace) -> ProfileReport:
    print("profile: one more iteration, with every operation timed", file=sys.stderr, flush=True)
    profile = StepProfile(llm.engine)
    with profile.recording():
        _iterate(llm, options, options.num_iters_warmup + options.num_iters, profile)
    phases = [PhaseProfile(phase.num_steps, phase.step_s, phase.rows()) for phase in profile.phases()]
    print(
        "profile: measuring how fast memory is read and matrices are multiplied", file=sys.stderr, flush=True
    )
    limits = profile.roofline()
    # With one output token there is no decode phase.
    decode = phases[1] if options.output_len > 1 else None
    return ProfileReport(
        limits.read_bytes_per_s, limits.gemm.flops_per_s, limits.gemm.dtype, phases[0], decode
    )


def _settings(options: argparse.Namespace) -> EngineSettings:
    return EngineSettings(
        model=options.model.name,
        dtype=options.dtype,
        device=options.device,
        tensor_parallel_size=options.tensor_parallel_size,
        quantize=options.quantize,
        cpu_dense_dtype=options.cpu_dense_dtype,
        cpu_isa=options.cpu_isa,
        input_len=options.input_len,
        output_len=options.output_len,
        batch_size=options.batch_size,
        num_iters=options.num_iters,
        num_iters_warmup=options.num_iters_warmup,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
