"""The interface between Python and the C++ library: its version, the structures of the operations'
arguments, and the structure of each operation. src/ops.h declares the same structures and describes
their fields. Needs no torch."""

import ctypes
from dataclasses import dataclass

INTERFACE_VERSION = 7
"""Version of the operations and their arguments. setup.py compiles it into the library, which is
refused if it differs. Increment it with every change that an older library does not support."""


class LinearArgs(ctypes.Structure):
    """Arguments of a dense layer on weights in rows."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("num_rows", "width", "num_outputs")),
        ("weight_type", ctypes.c_int32),
    )


class DenseArgs(ctypes.Structure):
    """Arguments of a dense layer on packed weights."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "scales", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("num_rows", "width", "num_outputs")),
    )


class ExpertsArgs(ctypes.Structure):
    """Arguments of the mixture of experts."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "topk_ids", "topk_weights")),
        *(
            (name, ctypes.c_void_p)
            for name in ("gate_up_blocks", "gate_up_scales", "down_blocks", "down_scales")
        ),
        *((name, ctypes.c_void_p) for name in ("gate_up_bias", "down_bias", "out")),
        *(
            (name, ctypes.c_int64)
            for name in ("num_tokens", "top_k", "hidden", "intermediate", "first_expert", "num_experts")
        ),
        ("limit", ctypes.c_float),
        ("alpha", ctypes.c_float),
        ("type", ctypes.c_int32),
        ("bias_type", ctypes.c_int32),
    )


class PackArgs(ctypes.Structure):
    """Arguments of the packing of MXFP4 rows."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("blocks", "scales", "packed_blocks", "packed_scales")),
        *(
            (name, ctypes.c_int64)
            for name in ("num_rows", "num_groups", "blocks_stride", "scales_stride", "packed_groups")
        ),
    )


class PackDenseArgs(ctypes.Structure):
    """Arguments of the packing of a dense layer's weights."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "packed", "scales")),
        *((name, ctypes.c_int64) for name in ("first_row", "num_rows", "width", "packed_width")),
    )


class ReadArgs(ctypes.Structure):
    """A span of memory to read."""

    _fields_ = (("memory", ctypes.c_void_p), ("num_bytes", ctypes.c_int64))


class AttentionArgs(ctypes.Structure):
    """Arguments of sink attention over the paged cache."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("q", "keys", "values", "block_table", "context_lens", "cu_seqlens_q", "sinks", "out")
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("num_tokens", "q_stride", "num_seqs", "max_blocks", "num_blocks", "block_size")
        ),
        *((name, ctypes.c_int64) for name in ("num_heads", "num_kv_heads", "head_dim", "window")),
        ("scale", ctypes.c_float),
        ("type", ctypes.c_int32),
    )


class NormArgs(ctypes.Structure):
    """Arguments of RMSNorm, with or without the residual add."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "delta", "weight", "out")),
        ("num_rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("type", ctypes.c_int32),
        ("weight_type", ctypes.c_int32),
    )


class RopeStoreArgs(ctypes.Structure):
    """Arguments of RoPE with the KV store."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "cos", "sin", "keys", "values", "slot_mapping")),
        *(
            (name, ctypes.c_int64)
            for name in ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "num_slots")
        ),
        ("type", ctypes.c_int32),
    )


class GateTopkArgs(ctypes.Structure):
    """Arguments of the gate's top-k."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "topk_ids", "topk_weights")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_experts", "k")),
    )


class SampleArgs(ctypes.Structure):
    """Arguments of sampling."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("logits", "temperature", "seeds", "output_positions", "top_k", "top_p", "min_p")
        ),
        *((name, ctypes.c_void_p) for name in ("token_ids", "block_maxima", "block_sums")),
        *((name, ctypes.c_int64) for name in ("num_rows", "vocab", "row_stride")),
    )


class LogprobArgs(ctypes.Structure):
    """Arguments of log probabilities."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("logits", "rows", "token_ids", "logprobs", "top_ids", "top_logprobs")
        ),
        *((name, ctypes.c_void_p) for name in ("block_maxima", "block_sums")),
        *((name, ctypes.c_int64) for name in ("num_rows", "vocab", "row_stride", "num_top")),
    )


class AutomatonArgs(ctypes.Structure):
    """Arguments of the automata's mask, and of what advances them."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "words", "places", "rows", "token_ids")),
        *((name, ctypes.c_int64) for name in ("num_rows", "vocab", "row_stride")),
    )


class EmbedArgs(ctypes.Structure):
    """Arguments of the embedding lookup."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("token_ids", "weight", "out")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_rows", "width", "first_id")),
        ("type", ctypes.c_int32),
    )


class YarnArgs(ctypes.Structure):
    """Arguments of YaRN's cosines and sines."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("positions", "frequencies", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "half")),
        ("concentration", ctypes.c_float),
    )


class ConvertArgs(ctypes.Structure):
    """Arguments of a conversion between fp32 and bf16."""

    _fields_ = (
        ("from", ctypes.c_void_p),
        ("to", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("to_type", ctypes.c_int32),
    )


class Call(ctypes.Structure):
    """One operation of a recorded program."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("seconds", ctypes.c_void_p),
        ("returns_status", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class Operation:
    """A function `cantata_NAME` of the library, which takes a pointer to its arguments.

    Attributes:
        result: its ctypes type; None for no result.
        returns_status: True if it checks indices, and refuses arguments with a status other than 0.
    """

    arguments: type[ctypes.Structure]
    result: type[ctypes.c_int] | type[ctypes.c_uint64] | None = None
    returns_status: bool = False


OPERATIONS = {
    "linear": Operation(LinearArgs),
    "dense": Operation(DenseArgs),
    "experts": Operation(ExpertsArgs),
    "pack_rows16": Operation(PackArgs, ctypes.c_int),
    "pack_dense": Operation(PackDenseArgs),
    "read_through": Operation(ReadArgs, ctypes.c_uint64),
    "attention": Operation(AttentionArgs, ctypes.c_int, returns_status=True),
    "norm": Operation(NormArgs),
    "rope_and_store": Operation(RopeStoreArgs, ctypes.c_int, returns_status=True),
    "gate_topk": Operation(GateTopkArgs),
    "sample": Operation(SampleArgs),
    "logprobs": Operation(LogprobArgs),
    "automaton_mask": Operation(AutomatonArgs),
    "automaton_advance": Operation(AutomatonArgs),
    "embed": Operation(EmbedArgs),
    "yarn": Operation(YarnArgs),
    "convert": Operation(ConvertArgs),
}
"""Operations by name."""
