"""Engines whose KV cache cannot hold the model's whole context: they take as much of it as fits,
say so, and hold requests to it."""

import logging
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from tests.support.tiny_model import TINY, TINY_BLOCK_BYTES
from workers.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from workers.engine.llm import LLM, SamplingParams
from workers.engine.progress import summary
from workers.engine.server import EngineServer
from workers.errors import ConfigError, ContextLengthExceeded
from workers.kv_cache.memory import KVMemory, plan_kv_cache
from workers.model.make_checkpoint import write_checkpoint
from workers.parallel.shard import plan_shards
from workers.private_folder import PrivateFolder
from workers.rpc import convert, engine_pb2_grpc
from workers.rpc import engine_pb2 as pb

LONG = replace(TINY, max_context_len=8192)
STEP = 64
CONTEXT = 2560
# Of the full group the context's 160 blocks, of the sliding one 3 for a window of 24; block 0 and
# the 4 of a step in both.
CACHE_BYTES = (160 + 3 + 2 * (1 + STEP // 16)) * TINY_BLOCK_BYTES


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "long"
    write_checkpoint(path, LONG, seed=0)
    return path


def config_of(checkpoint: Path, *, max_model_len: int | None = None, num_ranks: int = 1) -> EngineConfig:
    return EngineConfig(
        checkpoint,
        dtype="float32",
        max_model_len=max_model_len,
        cache=CacheConfig(CACHE_BYTES // num_ranks),
        scheduler=SchedulerConfig(4, STEP),
        parallel=ParallelConfig(num_ranks),
    )


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_an_engine_has_the_context_that_fits(
    checkpoint: Path, num_ranks: int, caplog: pytest.LogCaptureFixture
) -> None:
    with LLM(
        checkpoint,
        dtype="float32",
        max_num_seqs=4,
        max_num_batched_tokens=STEP,
        kv_cache_bytes=CACHE_BYTES // num_ranks,  # each has a third of the key-value heads
        tensor_parallel_size=num_ranks,
    ) as llm:
        assert llm.info.max_model_len == llm.engine.max_model_len == CONTEXT
        prompt = [token % 200 for token in range(CONTEXT - 2)]
        (answer,) = llm.generate(
            [prompt], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True), use_tqdm=False
        )
        assert len(answer.outputs[0].token_ids) == 2
        with pytest.raises(ContextLengthExceeded, match=f"in the context of {CONTEXT};"):
            llm.generate([[1] * CONTEXT], use_tqdm=False)
        with pytest.raises(ContextLengthExceeded, match=f"exceed the context of {CONTEXT}; .* at most 60"):
            llm.generate([[1] * (CONTEXT - 60)], SamplingParams(max_tokens=61), use_tqdm=False)
    (warning,) = [record.getMessage() for record in caplog.records if "context" in record.getMessage()]
    assert warning.startswith(
        f"the context is {CONTEXT} tokens of the model's 8192: the most that a KV cache of "
    )
    assert " (engine.cache.memory_bytes) can hold of one sequence. " in warning
    assert warning.endswith(
        "For more, give the cache more memory, or set engine.cache.dtype to fp8 where the device has it"
    )


def test_one_that_was_set_is_refused(checkpoint: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"one sequence of engine.max_model_len 8192, .* set engine.max_model_len to at most \d+ or",
    ):
        LLM(checkpoint, dtype="float32", max_model_len=8192, kv_cache_bytes=CACHE_BYTES)


@pytest.mark.parametrize("max_model_len", [None, 2048])
def test_the_rank_with_least_memory_decides_for_all(
    checkpoint: Path, max_model_len: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(checkpoint, max_model_len=max_model_len, num_ranks=3)
    shard = plan_shards(LONG, config.parallel)[0]
    memories = [
        KVMemory(num_bytes, f"rank {rank}")
        for rank, num_bytes in enumerate((1 << 30, CACHE_BYTES // 3, CACHE_BYTES // 2))
    ]
    with caplog.at_level(logging.WARNING):
        plans = [
            plan_kv_cache(config, LONG, shard, some) for some in (memories, memories[::-1], memories[:1])
        ]
    if max_model_len is None:
        assert [plan.max_model_len for plan in plans] == [CONTEXT, CONTEXT, 8192]
        assert ["(rank 1)" in record.getMessage() for record in caplog.records] == [True, True]
    else:
        assert [plan.max_model_len for plan in plans] == [2048] * 3
        assert caplog.records == []


async def test_what_it_says_over_grpc_is_what_it_holds_requests_to(checkpoint: Path) -> None:
    server = EngineServer()
    config = config_of(checkpoint)
    folder = PrivateFolder()
    address = await server.start(config, f"unix:{folder.path}/e")
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = engine_pb2_grpc.EngineStub(channel)
            assert (await stub.GetInfo(pb.GetInfoRequest())).max_model_len == CONTEXT
            call = stub.Generate(pb.GenerateRequest(request_id="r", prompt_token_ids=[1] * CONTEXT))
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                _ = [response async for response in call]
        trailing = {key: str(value) for key, value in raised.value.trailing_metadata() or ()}
        error = convert.error_from_status(raised.value.code().name, raised.value.details() or "", trailing)
        assert isinstance(error, ContextLengthExceeded)
        assert f"the context of {CONTEXT};" in error.message
        start_up = server.start_up
        table = summary(
            start_up.executor,
            model="long",
            longest_context=start_up.longest_context,
            address=address,
            metrics_address=None,
            grammars=server.engine.grammars,
        )
        row = next(line for line in table.splitlines() if line.startswith("  grammars "))
        assert "tokenizer loaded, about " in row
        said = (
            f"{CONTEXT} tokens of the model's 8192, limited by a KV cache of {CACHE_BYTES / 1024:.1f} KiB; "
        )
        assert said in table
        whole = replace(start_up.executor, max_model_len=8192)
        table = summary(
            whole, model="long", longest_context=8192, address=address, metrics_address=None, grammars="none"
        )
        assert [line.split(maxsplit=1)[1] for line in table.splitlines() if line.startswith("  context")] == [
            "8192 tokens"
        ]
    finally:
        await server.stop()
        folder.close()
