"""Everything inside the project that the recorder needs: the one file to change when modules move
or are renamed.

Not in here, because they stay: `workers.engine.llm.LLM` and `SamplingParams`, and the command
`cantata`.
"""

import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from cluster.cli import main as cantata_main
from cluster.generation import Limits
from cluster.rpc import inference_pb2, inference_pb2_grpc
from kernels.cpu import native
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, make_encoding, serving
from tests.support.processes import marked
from tests.support.served import Served, standalone
from workers.config import SchedulerConfig
from workers.engine.__main__ import main as engine_main
from workers.engine.llm import LLM
from workers.errors import CantataError, EngineDead, InvalidRequest, Overloaded
from workers.kv_cache.manager import KVCacheManager
from workers.request import EngineRequest, SamplingParams, TokenLogprobs
from workers.scheduler.plan import SequenceStart, StepPlan, StepResult
from workers.scheduler.plan_wire import encode_plan, encode_result
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.sequence import Sequence

__all__ = [
    "CantataError",
    "EngineDead",
    "FakeEngine",
    "Gateway",
    "InvalidRequest",
    "Limits",
    "Overloaded",
    "Script",
    "Served",
    "asked",
    "built_plan",
    "built_result",
    "cantata_main",
    "engine_main",
    "engine_processes",
    "fake_gateway",
    "inference_pb2",
    "inference_pb2_grpc",
    "num_preemptions",
    "restored_instruction_set",
    "scheduled_plans",
    "standalone",
]


@asynccontextmanager
async def fake_gateway(
    folder: Path, *, num_engines: int = 1, limits: Limits | None = None
) -> AsyncIterator[tuple[Gateway, list[FakeEngine]]]:
    """Serve HTTP and gRPC over engines whose `answer` is a script.

    Args:
        folder: where the tokenizer is written.
    """
    engines = [await FakeEngine().start() for _ in range(num_engines)]
    try:
        async with serving(make_encoding(folder), engines, limits=limits) as gateway:
            yield gateway, engines
    finally:
        for engine in engines:
            await engine.stop()


def asked(request: EngineRequest) -> dict[str, Any]:
    """Return what a fake engine was asked: prompt, tokens to resume after, and the sampling that is
    not the default."""
    default = SamplingParams()
    sampling = {
        field.name: _plain(getattr(request.sampling, field.name))
        for field in fields(SamplingParams)
        if getattr(request.sampling, field.name) != getattr(default, field.name)
    }
    found = {"prompt": list(request.prompt_token_ids), "sampling": sampling}
    return found | ({"resumed": list(request.output_token_ids)} if request.output_token_ids else {})


def engine_processes(served: Served) -> list[int]:
    """Return the pids of a server's engines."""
    return [int(line.split()[0]) for line in marked(served.mark) if "-m workers.engine" in line]


def num_preemptions(llm: LLM) -> float:
    """Return how often a sequence lost its KV blocks."""
    value = llm.engine.metrics.registry.get_sample_value("cantata_engine_preemptions_total")
    assert value is not None
    return value


@contextmanager
def restored_instruction_set() -> Iterator[None]:
    """Take the processor's best instruction set again after an LLM that was given another one."""
    try:
        yield
    finally:
        native.choose(native.AUTO)


def built_plan(draw: random.Random, step: int) -> bytes:
    """Return the wire form of a plan in which every field may hold anything that it can."""
    count = draw.randrange(6)
    seq_ids = draw.sample(range(2**20), count)
    starts = tuple(_start(draw) for _ in range(draw.randrange(3)))
    plan = StepPlan(
        step=step,
        starts=starts,
        drops=_ids(draw, 4),
        seq_ids=tuple(seq_ids),
        num_computed_tokens=tuple(draw.randrange(2**17) for _ in seq_ids),
        num_scheduled_tokens=tuple(draw.choice((1, 1, 1, 16, 2048)) for _ in seq_ids),
        samples=tuple(draw.random() < 0.7 for _ in seq_ids),
        new_blocks=tuple(
            (index, _ids(draw, 3), _ids(draw, 3)) for index in range(count) if draw.random() < 0.5
        ),
    )
    return encode_plan(plan)


def _start(draw: random.Random) -> SequenceStart:
    token_ids = _ids(draw, 20)
    constraint = None
    if draw.random() < 0.4:
        # Its id; drawn as whole automata were, so that what follows stays the same.
        for _ in range(2):
            draw.choice((None, ()))
            _ids(draw, 3)
            for _ in _ids(draw, 3):
                draw.randrange(2)
        constraint = bytes([draw.randrange(2)]) * 16
    sampling = SamplingParams(
        max_tokens=draw.choice((None, 1, 300)),
        temperature=draw.choice((0.0, 0.7, 1.0, 2.0)),
        top_p=draw.choice((1.0, 0.9)),
        top_k=draw.choice((0, -1, 40)),
        min_p=draw.choice((0.0, 0.05)),
        presence_penalty=draw.choice((0.0, -2.0, 0.5)),
        frequency_penalty=draw.choice((0.0, 1.25)),
        repetition_penalty=draw.choice((1.0, 1.1)),
        logit_bias=tuple((token_id, draw.choice((-100.0, 2.5))) for token_id in _ids(draw, 2)),
        seed=draw.choice((0, 5, 2**63, 2**64 - 1)),
        logprobs=draw.choice((None, 0, 20)),
        stop_token_ids=_ids(draw, 3),
        min_tokens=draw.choice((0, 9)),
        ignore_eos=draw.random() < 0.3,
    )
    return SequenceStart(
        seq_id=draw.randrange(2**31),
        token_ids=token_ids,
        num_prompt_tokens=draw.randrange(len(token_ids) + 1),
        sampling=sampling,
        stop_token_ids=_ids(draw, 3),
        constraint=constraint,
        full_blocks=_ids(draw, 5),
        sliding_blocks=_ids(draw, 5),
    )


def built_result(draw: random.Random, step: int) -> bytes:
    """Return the wire form of a result."""
    seq_ids = _ids(draw, 6)
    logprobs = {
        seq_id: (
            TokenLogprobs(-draw.randrange(64) / 8, tuple((token_id, -1.5) for token_id in _ids(draw, 3))),
        )
        for seq_id in seq_ids
        if draw.random() < 0.5
    }
    result = StepResult(
        step=step,
        seq_ids=seq_ids,
        token_ids=tuple(draw.randrange(201_088) for _ in seq_ids),
        logprobs=logprobs,
        elapsed_s=draw.randrange(64) / 64,
        error=draw.choice((None, None, "rank 1 is out of memory")),
        idle_s=draw.randrange(64) / 64,
    )
    return encode_result(result)


def _ids(draw: random.Random, most: int) -> tuple[int, ...]:
    return tuple(
        draw.choice((0, 7, 127, 128, 255, 256, 65_535, 65_536, 201_087))
        for _ in range(draw.randrange(most + 1))
    )


def scheduled_plans(seed: int) -> list[bytes]:
    """Return the plans of a scheduler with too few KV blocks, up to two in flight, until all
    requests have ended."""
    draw = random.Random(seed)
    kv = KVCacheManager(num_full_blocks=17, num_sliding_blocks=24, window=24, prefix_caching=seed % 3 != 0)
    scheduler = Scheduler(SchedulerConfig(5, 64, 1024), kv, max_model_len=200)
    shared = tuple(draw.randrange(900) for _ in range(48))
    arriving = []
    for seq_id in range(9):
        prompt = shared[: draw.choice((0, 16, 33, 48))] + tuple(
            draw.randrange(900) for _ in range(draw.choice((1, 15, 16, 40)))
        )
        sampling = SamplingParams(
            max_tokens=draw.choice((1, 60, 90)), seed=seq_id, stop_token_ids=(3,), min_tokens=1
        )
        arriving.append(Sequence(seq_id, EngineRequest(f"r{seq_id}", prompt, sampling), (2,)))
    plans: list[bytes] = []
    flights: list[StepPlan] = []
    while True:
        if arriving and draw.random() < 0.8:
            scheduler.add(arriving.pop(0))
        if draw.random() < 0.01:
            scheduler.abort(draw.randrange(9), "the client left")
        plan = scheduler.schedule()
        if plan is not None:
            plans.append(encode_plan(plan))
            flights.append(plan)
        if flights and (plan is None or len(flights) == 2 or draw.random() < 0.5):
            flown = flights.pop(0)
            seq_ids = tuple(
                seq_id for seq_id, samples in zip(flown.seq_ids, flown.samples, strict=True) if samples
            )
            sampled = tuple((flown.step * 31 + seq_id * 7) % 400 for seq_id in seq_ids)
            scheduler.update(StepResult(flown.step, seq_ids, sampled))
        scheduler.check_integrity()
        if not (arriving or flights or scheduler.has_work):
            break
    assert scheduler.num_preemptions, "the pool was meant to be too small"
    return plans


def _plain(value: Any) -> Any:
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value
