"""The arrays of one step, passed from the module that lays them out (`slots`) to the one that
uploads them (`step_inputs`) and those that run the model over them (`runner`, `recorded/`)."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from workers.rank.step_inputs import Array, InputBuffers

A = TypeVar("A", Array, Tensor)
"""Type of the arrays: numpy on the host, torch on the device."""

TOKEN_KNOWN = -1
"""Value in `ModelArrays.newest_of` for a token that the host knows."""


@dataclass(frozen=True, slots=True)
class ModelArrays(Generic[A]):
    """Input of the model: T tokens of S rows. A row is a run of consecutive tokens of one sequence.
    Shapes depend on T and S only, so that every batch of a size fits the addresses at which a CUDA
    graph of that size was captured.

    Attributes:
        token_ids: [T] int64; 0 where `newest_of` names a slot.
        newest_of: [T] int64: slot whose newest sampled token this is, known only to the device;
            TOKEN_KNOWN if the token is in `token_ids`.
        positions: [T] int64, position of each token in its sequence.
        slot_mapping_full, slot_mapping_sliding: [T] int64, as in StepBatch.
        slots: [S] int64, the slot of each row's sequence.
        context_lens: [S] int32, position of the row's last token, plus one.
        cu_seqlens_q: [S + 1] int32, from 0 to T.
    """

    token_ids: A
    newest_of: A
    positions: A
    slot_mapping_full: A
    slot_mapping_sliding: A
    slots: A
    context_lens: A
    cu_seqlens_q: A

    def in_order(self) -> list[A]:
        """Return the arrays in the order of upload."""
        return [
            self.token_ids,
            self.newest_of,
            self.positions,
            self.slot_mapping_full,
            self.slot_mapping_sliding,
            self.slots,
            self.context_lens,
            self.cu_seqlens_q,
        ]


NUM_MODEL_ARRAYS = len(ModelArrays.__slots__)


@dataclass(frozen=True, slots=True)
class EdgeArrays(Generic[A]):
    """Input around the model.

    Attributes:
        sample_indices: [num_samples] int64, tokens (of T) after which one is sampled.
        sampled_slots: [num_samples] int64, the slots of their sequences.
        table_at, table_ids: [n] int64, int32: block table entries that this step sets, as flat
            indices into `DeviceSlots.tables`, and their blocks.
    """

    sample_indices: A
    sampled_slots: A
    table_at: A
    table_ids: A

    def in_order(self) -> list[A]:
        """Return the arrays in the order of upload."""
        return [self.sample_indices, self.sampled_slots, self.table_at, self.table_ids]


def upload_model_arrays(
    buffers: InputBuffers, arrays: ModelArrays[Array], into: Tensor | None = None
) -> ModelArrays[Tensor]:
    """Copy the model's input to the device, as `InputBuffers.upload` does."""
    return ModelArrays(*buffers.upload(arrays.in_order(), into))


def upload_edge_arrays(buffers: InputBuffers, arrays: EdgeArrays[Array]) -> EdgeArrays[Tensor]:
    """Copy the input around the model to the device, as `InputBuffers.upload` does."""
    return EdgeArrays(*buffers.upload(arrays.in_order()))


def upload_step(
    buffers: InputBuffers, model: ModelArrays[Array], edges: EdgeArrays[Array], into: Tensor | None = None
) -> tuple[ModelArrays[Tensor], EdgeArrays[Tensor]]:
    """Copy all arrays of a step to the device at once, the model's first, as `InputBuffers.upload`
    does."""
    tensors = buffers.upload(model.in_order() + edges.in_order(), into)
    return ModelArrays(*tensors[:NUM_MODEL_ARRAYS]), EdgeArrays(*tensors[NUM_MODEL_ARRAYS:])
