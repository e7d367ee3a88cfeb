"""Steps that run before there are requests: small ones, so that their kernels are compiled; and the
largest one and CUDA graphs, to measure their memory beyond the weights before the KV cache is
sized.

Counted is the memory of a serving rank: weights, CUDA's context, compiled kernels, NCCL's buffers
and cuBLAS's workspaces, as they are in use at the end of the profile; the peak of the largest step
with the most expensive sampling; graphs. Not counted, and covered by the share of memory that
`cache.gpu_memory_utilization` leaves free: entries of penalties and biases beyond one per row (20
bytes each), block tables, tables of automata, and processes that start later.
"""

import threading
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.automaton.layout import rows_that_allow_all
from kernels.sampling import AllowedBits, LogitBias, Penalties, SamplingBatch, TokenIds
from kernels.sampling import warm_up as warm_up_sampling
from workers.config import BLOCK_SIZE, KVDtype, SchedulerConfig
from workers.kv_cache.block_pool import NULL_BLOCK
from workers.kv_cache.tensors import KV_TORCH_DTYPES
from workers.model.gpt_oss import GptOss
from workers.model.step_batch import StepBatch
from workers.rank.recorded.cuda_graph import DecodeGraphs, GraphReport, multiply, use_cublas_on_next_stream
from workers.rank.slots import DeviceSlots, SequenceSlots

MAX_TOP_LOGPROBS = 20
"""Maximum number of alternatives that a request may ask for."""
SAMPLED_GRAPHS = 2
MIN_GRAPH_BYTES = 1 << 20


def largest_batch(scheduler: SchedulerConfig, max_model_len: int, device: torch.device) -> StepBatch:
    """Return a batch of max_num_batched_tokens tokens, spread as evenly as possible over as many
    sequences as may sample. All keys go to NULL_BLOCK."""
    num_tokens = min(scheduler.max_num_batched_tokens, scheduler.max_num_seqs * max_model_len)
    num_seqs = min(scheduler.max_num_seqs, num_tokens)
    base, longer = divmod(num_tokens, num_seqs)
    lengths = torch.full((num_seqs,), base, dtype=torch.int32)
    lengths[:longer] += 1
    ends = lengths.cumsum(0, dtype=torch.int64)
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    slots = positions % BLOCK_SIZE + NULL_BLOCK * BLOCK_SIZE
    # As wide as in a captured graph, since attention's scratch memory grows with the width.
    table = torch.full((num_seqs, max_model_len // BLOCK_SIZE + 1), NULL_BLOCK, dtype=torch.int32)
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), ends)).to(torch.int32)
    # Different tokens choose different experts, so that all of them take part.
    token_ids = torch.arange(num_tokens)
    slots, table = slots.to(device), table.to(device)
    return StepBatch(
        token_ids=token_ids.to(device),
        positions=positions.to(device),
        slot_mapping_full=slots,
        slot_mapping_sliding=slots,
        block_table_full=table,
        block_table_sliding=table,
        context_lens=lengths.to(device),
        cu_seqlens_q=cu_seqlens.to(device),
        sample_indices=(ends - 1).to(device),
        max_query_len=int(lengths[0]),
    )


@torch.inference_mode()
def run_largest_step(
    model: GptOss, scheduler: SchedulerConfig, max_model_len: int, kv_dtype: KVDtype
) -> None:
    """Run forward, logits and sampling of the largest step. Keys and values go to one block that is
    freed afterwards. All ranks take part."""
    batch = largest_batch(scheduler, max_model_len, model.device)
    batch.token_ids.remainder_(model.config.vocab_size)
    logits = model.compute_logits(model.forward(batch, _null_caches(model, kv_dtype))[batch.sample_indices])
    if logits is not None:
        model.sampling.run.sample(logits, everything_wanted(logits.shape[0], logits.shape[1], model.device))


def everything_wanted(num_rows: int, vocab_size: int, device: torch.device) -> SamplingBatch:
    """Return the sampling that takes the most memory: a second copy of the logits, changed by
    biases and masks, and all searches over it."""
    rows = torch.arange(num_rows, device=device)
    tokens = rows % vocab_size
    ones, counts = torch.ones(num_rows, device=device), torch.ones(num_rows, dtype=torch.int32, device=device)
    some = TokenIds(rows, tokens)
    return SamplingBatch(
        temperature=ones,
        seeds=rows,
        output_positions=rows,
        top_k=torch.full_like(rows, min(50, vocab_size)),
        top_p=ones * 0.9,
        min_p=ones * 0.01,
        logit_bias=LogitBias(rows, tokens, ones),
        penalties=Penalties(rows, tokens, counts, ones, ones, ones * 1.1),
        automaton=rows_that_allow_all(num_rows, device),
        allowed_ids=some,
        allowed_bits=AllowedBits(
            rows, torch.full((num_rows, -(-vocab_size // 8)), 255, dtype=torch.uint8, device=device)
        ),
        forbidden_ids=some,
        logprob_rows=rows,
        num_top_logprobs=min(MAX_TOP_LOGPROBS, vocab_size),
    )


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes of GPU memory beyond those in use now: the largest step's peak, and CUDA graphs.

    Torch counts both for this process alone, except for the driver's part of a graph, which shows
    only in the whole GPU's free memory. The sampled graph with the smallest driver part counts, so
    that memory taken meanwhile by another process is not multiplied by the number of graphs.
    """

    activation_bytes: int
    graph_bytes: int


def profile_step(
    model: GptOss, scheduler: SchedulerConfig, max_model_len: int, kv_dtype: KVDtype, *, graphs: bool
) -> StepMemory:
    """Run the largest step and measure its memory (CUDA only). Memory that stays allocated
    afterwards, such as libraries' workspaces, is in use and not counted. All ranks take part.

    Args:
        graphs: whether decode steps will be captured.
    """
    device = model.device
    _run_in_another_thread(device)
    activations = activation_bytes(model, scheduler, max_model_len, kv_dtype)
    captured = _captured_bytes(model, scheduler, max_model_len, kv_dtype) if graphs else 0
    torch.cuda.empty_cache()
    return StepMemory(activations, captured)


def activation_bytes(model: GptOss, scheduler: SchedulerConfig, max_model_len: int, kv_dtype: KVDtype) -> int:
    """Return the bytes of GPU memory that the largest step takes at its peak beyond those in use
    now (CUDA only), as torch takes them from the driver: in whole segments."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    run_largest_step(model, scheduler, max_model_len, kv_dtype)
    peak: int = torch.cuda.max_memory_reserved(model.device)
    torch.cuda.empty_cache()
    return peak - before


def _captured_bytes(model: GptOss, scheduler: SchedulerConfig, max_model_len: int, kv_dtype: KVDtype) -> int:
    """Return the bytes that the graphs of all sizes will keep: the two largest are captured and
    released. A newer torch frees cuBLAS's memory for their stream with them; it is then allocated
    again, since it exists while graphs do."""
    slots = SequenceSlots(scheduler.max_num_seqs, max_model_len)
    kv_caches = _null_caches(model, kv_dtype)
    graphs = DecodeGraphs(
        slots, DeviceSlots(slots, model.device), lambda batch: model.forward(batch, kv_caches)
    )
    report = graphs.capture(lambda phase, done, total: None, limit=SAMPLED_GRAPHS)
    num_graphs = len(graphs.sizes)
    del graphs
    use_cublas_on_next_stream(model.device)
    return expected_graph_bytes(report, num_graphs)


def expected_graph_bytes(sampled: GraphReport, num_graphs: int) -> int:
    """Return the bytes of all graphs, estimated from the sampled ones. The smaller graphs share the
    first graph's pool; each is assumed to need as much beyond it as the last sampled one (as vLLM's
    `profile_cudagraph_memory` does). The driver's part of each graph is assumed to be the smallest
    of the sampled ones, and at least MIN_GRAPH_BYTES."""
    pools = sampled.pool_bytes
    others = (num_graphs - len(pools)) * (pools[-1] if len(pools) > 1 else 0)
    return sum(pools) + others + num_graphs * max(min(sampled.driver_bytes), MIN_GRAPH_BYTES)


def _run_in_another_thread(device: torch.device) -> None:
    """Compute a matrix product on a thread that ends. cuBLAS has a handle for each thread, with a
    workspace for each stream; the thread that will run the steps takes over this thread's
    handle."""

    def run() -> None:
        torch.cuda.set_device(device)
        multiply(device)

    thread = threading.Thread(target=run, name="cantata-cublas")
    thread.start()
    thread.join()


def _null_caches(model: GptOss, kv_dtype: KVDtype) -> list[Tensor]:
    """Return a KV cache of one block for each layer."""
    shape = (2, NULL_BLOCK + 1, BLOCK_SIZE, model.num_kv_heads, model.config.head_dim)
    return [torch.zeros(shape, dtype=KV_TORCH_DTYPES[kv_dtype], device=model.device) for _ in model.layers]


def warm_up(model: GptOss, scheduler: SchedulerConfig, max_model_len: int, kv_dtype: KVDtype) -> None:
    """Run prompts of 1, 2, 4, … tokens up to the token budget of a step, then each way to sample.
    All ranks take part.

    Triton compiles a kernel at the first step of a kind, which takes seconds and must not happen
    while requests wait.
    """
    num_tokens = 1
    while num_tokens < scheduler.max_num_batched_tokens:
        run_largest_step(
            model,
            replace(scheduler, max_num_seqs=1, max_num_batched_tokens=num_tokens),
            max_model_len,
            kv_dtype,
        )
        num_tokens *= 2
    if model.collectives.rank == 0:
        warm_up_sampling(model.config.vocab_size, model.device)
