"""Operations around the layers: RMSNorm, YaRN tables, embedding lookup and reads by slot, at the
widths of gpt-oss."""

from benchmarks.kernel_specs.spec import KernelSpec, Limits, Pass
from kernels.embedding.lookup import BLOCK as EMBED_BLOCK
from kernels.embedding.lookup import embed_kernel
from kernels.pointwise.norm import add_rms_norm_kernel, rms_norm_kernel, tile
from kernels.pointwise.yarn import BLOCK_TOKENS, yarn_kernel
from kernels.slots.read import BLOCK as SLOTS_BLOCK
from kernels.slots.read import read_slots_kernel

_HIDDEN = 2880
_BLOCK = tile(_HIDDEN)
_WIDE = {target: Limits(load_bits=128) for target in ("sm_90", "sm_100", "gfx950")}

SPECS = (
    KernelSpec(
        name="pointwise/rms_norm",
        kernel=rms_norm_kernel,
        signature={
            "x_ptr": "*bf16",
            "weight_ptr": "*bf16",
            "out_ptr": "*bf16",
            "x_stride": "i32",
            "out_stride": "i32",
            "width": "i32",
        }
        | {"eps": "fp32"},
        constexprs={"BLOCK": _BLOCK["BLOCK"]},
        options={"num_warps": _BLOCK["num_warps"]},
        work=Pass(bytes=2 * _BLOCK["BLOCK"] * 2),
        limits=_WIDE,
    ),
    KernelSpec(
        name="pointwise/add_rms_norm",
        kernel=add_rms_norm_kernel,
        signature={
            "residual_ptr": "*bf16",
            "delta_ptr": "*bf16",
            "weight_ptr": "*bf16",
            "out_ptr": "*bf16",
            "residual_stride": "i32",
        }
        | {"delta_stride": "i32", "out_stride": "i32", "width": "i32", "eps": "fp32"},
        constexprs={"BLOCK": _BLOCK["BLOCK"]},
        options={"num_warps": _BLOCK["num_warps"]},
        work=Pass(bytes=3 * _BLOCK["BLOCK"] * 2),
        limits=_WIDE,
    ),
    KernelSpec(
        name="pointwise/yarn",
        kernel=yarn_kernel,
        signature={
            "positions_ptr": "*i64",
            "frequencies_ptr": "*fp32",
            "cos_ptr": "*fp32",
            "sin_ptr": "*fp32",
            "num_tokens": "i32",
        }
        | {"half": "i32", "concentration": "fp32"},
        constexprs={"BLOCK_TOKENS": BLOCK_TOKENS, "BLOCK_HALF": 32},
        unaligned=("num_tokens",),
    ),
    KernelSpec(
        name="embedding/lookup",
        kernel=embed_kernel,
        signature={
            "token_ids_ptr": "*i64",
            "weight_ptr": "*bf16",
            "out_ptr": "*bf16",
            "weight_stride": "i32",
            "first_id": "i32",
        }
        | {"num_rows": "i32", "width": "i32"},
        constexprs={"BLOCK": EMBED_BLOCK},
        unaligned=("first_id", "num_rows"),
        work=Pass(bytes=2 * EMBED_BLOCK + 8),
    ),
    KernelSpec(
        name="slots/read",
        kernel=read_slots_kernel,
        signature={
            "token_ids_ptr": "*i64",
            "newest_of_ptr": "*i64",
            "slots_ptr": "*i64",
            "newest_ptr": "*i64",
            "tables_ptr": "*i32",
            "ids_out_ptr": "*i64",
        }
        | {
            "tables_out_ptr": "*i32",
            "num_tokens": "i32",
            "num_seqs": "i32",
            "num_blocks": "i32",
            "slot_stride": "i32",
            "group_stride": "i32",
        },
        constexprs={"BLOCK": SLOTS_BLOCK},
        options={"num_warps": 4},
        unaligned=(
            "token_ids_ptr",
            "newest_of_ptr",
            "slots_ptr",
            "num_tokens",
            "num_seqs",
            "num_blocks",
            "slot_stride",
            "group_stride",
        ),
    ),
)
