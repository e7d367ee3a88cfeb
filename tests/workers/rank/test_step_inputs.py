"""The upload of a step: packing, padding and the choice of a CUDA graph, as far as they need no
GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tiny_model import TINY, write_tiny_checkpoint
from workers.config import BLOCK_SIZE
from workers.kv_cache.block_pool import NULL_BLOCK
from workers.model.checkpoint import load_model
from workers.rank.recorded.cuda_graph import graph_size, graph_sizes
from workers.rank.slots import DeviceSlots, SequenceSlots, padded, padding
from workers.rank.step_arrays import upload_model_arrays, upload_step
from workers.rank.step_inputs import ALIGNMENT, NUM_BUFFERS, InputBuffers, packed_layout
from workers.request import SamplingParams
from workers.scheduler.plan import SequenceStart, StepPlan

CPU = torch.device("cpu")


def test_arrays_come_through_a_packed_buffer_unchanged() -> None:
    arrays = [
        np.arange(3, dtype=np.int32),
        np.zeros(0, dtype=np.int64),
        np.arange(10, dtype=np.uint8).reshape(2, 5),
        np.arange(12, dtype=np.int64).reshape(3, 4)[:, ::2],
        np.array([0.5, -1.0], dtype=np.float32),
    ]
    offsets, num_bytes = packed_layout(arrays)
    assert offsets == [0, 16, 16, 32, 80]
    assert num_bytes == 96
    tensors = InputBuffers(CPU).upload(arrays)
    for array, tensor in zip(arrays, tensors, strict=True):
        assert (tensor.numpy() == array).all()
        assert tensor.numpy().dtype == array.dtype
        assert tensor.shape == array.shape
        assert tensor.numel() == 0 or tensor.data_ptr() % ALIGNMENT == 0


def test_equal_shapes_have_equal_addresses_whatever_follows() -> None:
    """The replayed batch lies at the addresses with which the graph was captured."""
    captured = padding(24, 7).in_order()
    replayed = [np.full_like(array, 3) for array in captured]
    assert packed_layout(captured)[0] == packed_layout([*replayed, np.zeros(5, dtype=np.int64)])[0][:-1]


def test_a_buffer_is_left_alone_while_a_step_may_still_read_it() -> None:
    inputs = InputBuffers(CPU)
    kept = [
        inputs.upload([np.full(size, size, dtype=np.int64)])[0]
        for size in (5, 3000, 7, 100_000)[:NUM_BUFFERS]
    ]
    assert [tensor.unique().tolist() for tensor in kept] == [[5], [3000], [7], [100_000]], (
        "also where a buffer had to grow"
    )


@pytest.mark.parametrize(
    ("max_num_seqs", "sizes"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (30, (1, 2, 4, 8, 16, 24, 30)),
        (256, (1, 2, 4, *range(8, 257, 8))),
        (300, (1, 2, 4, *range(8, 257, 8), 272, 288, 300)),
        (5000, (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))),
    ],
)
def test_graph_sizes(max_num_seqs: int, sizes: tuple[int, ...]) -> None:
    assert graph_sizes(max_num_seqs) == sizes


def test_the_smallest_graph_that_holds_the_batch() -> None:
    sizes = graph_sizes(300)
    assert [graph_size(sizes, number) for number in (1, 3, 5, 9, 248, 249, 257, 289, 300)] == [
        1,
        4,
        8,
        16,
        248,
        256,
        272,
        300,
        300,
    ]
    assert graph_size(sizes, 301) is None


def test_padding_writes_and_reads_the_null_block_only() -> None:
    rows = padding(5, 9)
    assert rows.slots.tolist() == [9] * 5
    assert rows.newest_of.tolist() == [-1] * 5
    assert (
        rows.slot_mapping_full.tolist() == rows.slot_mapping_sliding.tolist() == [NULL_BLOCK * BLOCK_SIZE] * 5
    )
    assert rows.context_lens.tolist() == [1] * 5
    assert rows.cu_seqlens_q.tolist() == [0, 1, 2, 3, 4, 5]
    slots = SequenceSlots(max_num_seqs=9, max_model_len=33)
    device, inputs = DeviceSlots(slots, CPU), InputBuffers(CPU)
    assert device.padding_slot == 9
    batch = device.batch(
        upload_model_arrays(inputs, rows), torch.zeros(0, dtype=torch.int64), slots.max_blocks, 1
    )
    assert (
        batch.block_table_full.unique().tolist()
        == batch.block_table_sliding.unique().tolist()
        == [NULL_BLOCK]
    )


def test_a_padded_batch_computes_what_an_unpadded_one_does(tmp_path: Path) -> None:
    """Bit for bit, with block tables as wide as a graph has them. All KV slots start as NaN, so a
    stray read shows."""
    model = load_model(write_tiny_checkpoint(tmp_path), TINY, dtype=torch.float32, device=CPU)
    lengths = (17, 1, 40)
    prompts = [tuple(range(1 + index, 1 + index + length)) for index, length in enumerate(lengths)]
    tables = [(3, 5), (2,), (6, 1, 4)]

    def run(size: int | None) -> torch.Tensor:
        shape = (2, 8, BLOCK_SIZE, TINY.num_kv_heads, TINY.head_dim)
        caches = [torch.full(shape, float("nan")) for _ in TINY.layer_windows]
        slots = SequenceSlots(max_num_seqs=4, max_model_len=200)
        device, inputs = DeviceSlots(slots, CPU), InputBuffers(CPU)
        hidden = torch.empty(0)
        for seq_id, prompt in enumerate(prompts):
            slots.start(SequenceStart(seq_id, prompt, len(prompt), SamplingParams(seed=0)))
        added = tuple((index, table, tuple(reversed(table))) for index, table in enumerate(tables))
        for plan in (
            StepPlan(0, (), (), (0, 1, 2), (0, 0, 0), lengths, (True,) * 3, added),
            StepPlan(1, (), (), (2, 0, 1), (40, 17, 1), (1, 1, 1), (True,) * 3),
        ):
            rows = slots.build(plan)
            pads = rows.is_decode and size is not None
            model_arrays = padded(rows.model, size, device.padding_slot) if pads else rows.model
            arrays, edges = upload_step(inputs, model_arrays, rows.edges)
            device.set_blocks(edges)
            width = rows.num_blocks if size is None else slots.max_blocks
            hidden = model.forward(
                device.batch(arrays, edges.sample_indices, width, rows.max_query_len), caches
            )[edges.sample_indices]
            device.newest.index_copy_(0, edges.sampled_slots, torch.tensor([7, 8, 9]))
        return hidden

    plain = run(None)
    assert plain.isfinite().all()
    for size in (4, 8):
        assert torch.equal(run(size), plain)


def test_a_token_that_only_the_device_knows_is_read_there() -> None:
    slots = SequenceSlots(max_num_seqs=3, max_model_len=64)
    device, inputs = DeviceSlots(slots, CPU), InputBuffers(CPU)
    for seq_id, prompt in enumerate(((5, 6), (7,))):
        slots.start(
            SequenceStart(
                seq_id, prompt, len(prompt), SamplingParams(seed=0), (), None, (1 + seq_id,), (1 + seq_id,)
            )
        )
    slots.build(StepPlan(0, (), (), (0, 1), (0, 0), (2, 1), (True, True)))
    # Laid out before the first step's tokens are anywhere.
    rows = slots.build(StepPlan(1, (), (), (1, 0), (1, 2), (1, 1), (True, True)))
    assert rows.model.newest_of.tolist() == [slots.slot(1), slots.slot(0)]
    device.newest.index_copy_(0, torch.tensor([slots.slot(0), slots.slot(1)]), torch.tensor([50, 70]))
    batch = device.batch(upload_model_arrays(inputs, rows.model), torch.zeros(0, dtype=torch.int64), 1, 1)
    assert batch.token_ids.tolist() == [70, 50]
